"""Nucleus-Image: the image's tokens alone, which see the text's keys beside their own; experts that choose their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import pack, unpack
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    batch, _, height, width = latents.shape
    shapes = [(1, height // 2, width // 2)] * batch
    return {"hidden_states": pack(latents), "timestep": time, "img_shapes": shapes, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim), "encoder_hidden_states_mask": (tokens,)}


def _negated_unpack(output: Any, latents: torch.Tensor) -> torch.Tensor:
    return -unpack(output, latents)


NUCLEUS_MOE = Family(
    "nucleus_moe",
    "transformer",
    {"": Shape(32, 2048, 2, 8)},
    network=Network(
        model="NucleusMoEImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=_inputs,
        condition=_condition,
        output=_negated_unpack,
        channels=16,
        parameters=16_922_679_296,
        config={  # Nucleus-Image, from a copy of its configuration
            "out_channels": 16,
            "num_layers": 32,
            "num_key_value_heads": 4,
            "joint_attention_dim": 4096,
            "dense_moe_strategy": "leave_first_three_blocks_dense",
            "num_experts": 64,
            "capacity_factors": [0.0] * 3 + [4.0] * 2 + [2.0] * 27,
            "use_grouped_mm": True,
        },
        tiny={
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 6.0,  # inside, a multiple of 128
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 2,
            "moe_intermediate_dim": 24,
            "capacity_factors": 2.0,  # every expert takes every token, so that none depends on another
        },
    ),
)
