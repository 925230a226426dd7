"""DiT of diffusers: conditioned on a class, over square latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.network import Blocks, Network

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": time * 1000, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"class_labels": ()}


DIT = Family(
    "dit",
    "transformer",
    {"": Shape(28, 1152, 2, 8)},
    network=Network(
        model="DiTTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=_inputs,
        condition=_condition,
        square=True,
        native=256,
        parameters=749_826_464,
        config={"out_channels": 8},  # DiT-XL-2-256, which predicts the variance too
        tiny={
            "sample_size": 16,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_embeds_ada_norm": 10,
        },
    ),
)
