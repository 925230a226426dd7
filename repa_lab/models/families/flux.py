"""FLUX.1: text and image in streams of their own, then in one sequence, text first. 2x2 latent cells are a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import full_guidance
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    text = condition["encoder_hidden_states"]
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": positions((height // 2, width // 2), 3, latents),
        "txt_ids": latents.new_zeros(text.shape[1], 3),
        **condition,
        **full_guidance(config, time),
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (tokens, config.joint_attention_dim)
    return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}


FLUX = Family(
    "flux",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="FluxTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        config={"guidance_embeds": True},  # FLUX.1-dev
        channels=16,
        parameters=11_901_408_320,
        tiny={
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
)
