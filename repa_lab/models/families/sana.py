"""Sana: linear attention over latents of a deep autoencoder, a token per cell of 32x32 pixels; text by cross-attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": time * 1000 * config.timestep_scale, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.caption_channels), "encoder_attention_mask": (tokens,)}


SANA = Family(
    "sana",
    "transformer",
    {"": Shape(20, 2240, 1, 10)},
    latent_stride=32,
    network=Network(
        model="SanaTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=_inputs,
        condition=_condition,
        channels=32,
        parameters=1_604_462_752,  # Sana_1600M_1024px, which the constructor's defaults are
        tiny={
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "num_cross_attention_heads": 2,
            "cross_attention_dim": 32,
            "caption_channels": 12,
        },
    ),
)
