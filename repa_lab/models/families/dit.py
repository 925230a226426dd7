"""DiT of diffusers: conditioned on a class, over square latents."""

from __future__ import annotations

from typing import Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import map_inputs
from repa_lab.models.network import Blocks, Network


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"class_labels": ()}


DIT = Family(
    "dit",
    "transformer",
    {"": Shape(28, 1152, 2, 8)},
    network=Network(
        model="DiTTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=map_inputs,
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
