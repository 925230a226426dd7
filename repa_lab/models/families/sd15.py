"""Stable Diffusion 1.5: a UNet of four levels, so its mid block sees an eighth of the latents along each side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"sample": latents, "timestep": time * 1000, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.cross_attention_dim)}


SD15 = Family(
    "sd15",
    "unet",
    {"": Shape(1, 1280, 8, "mid")},
    network=Network(
        model="UNet2DConditionModel",
        blocks=(Blocks("mid_block", place="map"),),
        inputs=_inputs,
        condition=_condition,
        native=512,
        parameters=859_520_964,
        config={"sample_size": 64, "cross_attention_dim": 768},  # stable-diffusion-v1-5
        tiny={
            "sample_size": 16,
            "block_out_channels": (8, 16, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 12,
        },
    ),
)
