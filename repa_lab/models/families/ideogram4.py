"""Ideogram 4: one sequence, text first, in and out; an image's places begin at 65,536.

Its VAE is that of FLUX.2, but the 128 values of a patch are in the order (row, column, channel).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.layout import flatten, positions, unflatten
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition

_AXES, _FIRST_PLACE = 3, 65536
_WORD, _IMAGE = 3, 2  # what a token of the sequence is


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    import torch

    text, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"].long()
    image = flatten(latents)
    cells, noise = mask.new_ones(image.shape[:2]), latents.new_zeros(*text.shape[:2], image.shape[2])
    return {
        "hidden_states": torch.cat([noise, image], 1),
        "timestep": 1 - time,
        "encoder_hidden_states": torch.cat([text, text.new_zeros(*cells.shape, text.shape[2])], 1),
        "position_ids": torch.cat([_words(mask), _cells(latents)], 1),
        "segment_ids": torch.cat([mask * 2 - 1, cells], 1),  # 1, and -1 for the padding
        "indicator": torch.cat([mask * _WORD, cells * _IMAGE], 1),
    }


def _words(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).unsqueeze(2).expand(-1, -1, _AXES)


def _cells(latents: torch.Tensor) -> torch.Tensor:
    height, width = latents.shape[-2:]
    return (positions((height, width), _AXES, latents).long() + _FIRST_PLACE).expand(latents.shape[0], -1, -1)


def _output(output: Any, latents: torch.Tensor) -> torch.Tensor:
    return -unflatten(output[:, -latents.shape[2] * latents.shape[3] :], latents)


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.llm_features_dim), "encoder_attention_mask": (tokens,)}


IDEOGRAM4 = Family(
    "ideogram4",
    "transformer",
    {"": Shape(34, 4608, 1, 8)},
    latent_stride=16,
    network=Network(
        model="Ideogram4Transformer2DModel",
        blocks=(Blocks("layers", place="tail"),),
        inputs=_inputs,
        condition=_condition,
        output=_output,
        channels=128,
        parameters=9_279_288_448,  # Ideogram 4 is taken to be the constructor's defaults
        tiny={
            "in_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "adaln_dim": 8,
            "llm_features_dim": 12,
            "mrope_section": (4, 2, 2),
        },
    ),
)
