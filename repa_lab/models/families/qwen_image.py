"""Qwen-Image: joint blocks that return text and image apart. 2x2 latent cells are a token."""

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
    shapes = [[(1, height // 2, width // 2)]] * batch
    return {"hidden_states": pack(latents), "timestep": time, "img_shapes": shapes, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.joint_attention_dim), "encoder_hidden_states_mask": (tokens,)}


QWEN_IMAGE = Family(
    "qwen_image",
    "transformer",
    {"": Shape(60, 3072, 2, 8)},
    network=Network(
        model="QwenImageTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1),),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        channels=16,
        parameters=20_430_401_088,  # Qwen-Image is the constructor's defaults
        tiny={
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
)
