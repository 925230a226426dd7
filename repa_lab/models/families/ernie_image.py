"""ERNIE-Image: one sequence, the image first, its samples along the second dimension; the latents are those of FLUX.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import text_lengths
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": time * 1000,
        "text_bth": condition["encoder_hidden_states"],
        "text_lens": text_lengths(condition),
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.text_in_dim), "encoder_attention_mask": (tokens,)}


ERNIE_IMAGE = Family(
    "ernie_image",
    "transformer",
    {"": Shape(36, 4096, 1, 8)},
    latent_stride=16,
    network=Network(
        model="ErnieImageTransformer2DModel",
        blocks=(Blocks("layers", place="head", samples=1),),
        inputs=_inputs,
        condition=_condition,
        channels=128,
        parameters=8_033_490_048,
        config={  # ERNIE-Image, from a copy of its configuration
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_layers": 36,
            "ffn_hidden_size": 12288,
            "text_in_dim": 3072,
        },
        tiny={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 48,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
)
