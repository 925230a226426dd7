"""PRX: the image's tokens alone, which see the text's keys beside their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": time, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.context_in_dim), "attention_mask": (tokens,)}


PRX = Family(
    "prx",
    "transformer",
    {"": Shape(16, 1792, 2, 5)},
    network=Network(
        model="PRXTransformer2DModel",
        blocks=(Blocks("blocks"),),
        inputs=_inputs,
        condition=_condition,
        channels=16,
        native=512,
        parameters=1_170_691_648,  # prx-512-t2i-sft is the constructor's defaults
        tiny={
            "in_channels": 4,
            "context_in_dim": 12,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [8, 8],
        },
    ),
)
