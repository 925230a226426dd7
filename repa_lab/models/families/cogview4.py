"""CogView4: blocks that return image and text apart, told the image's original size, its target size and its crop."""

from __future__ import annotations

from typing import Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import map_inputs
from repa_lab.models.network import Blocks, Network


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (tokens, config.text_embed_dim)
    return {"encoder_hidden_states": text, "original_size": (2,), "target_size": (2,), "crop_coords": (2,)}


COGVIEW4 = Family(
    "cogview4",
    "transformer",
    {"": Shape(28, 4096, 2, 8)},
    network=Network(
        model="CogView4Transformer2DModel",
        blocks=(Blocks("transformer_blocks", item=0),),
        inputs=map_inputs,
        condition=_condition,
        channels=16,
        parameters=6_369_118_272,
        config={"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},  # CogView4-6B
        tiny={
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
        },
    ),
)
