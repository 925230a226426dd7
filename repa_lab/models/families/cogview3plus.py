"""CogView3-Plus: as CogView4, but with a table of places, and trained to predict DDIM's velocity rather than a flow's."""

from __future__ import annotations

from typing import Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import map_inputs
from repa_lab.models.network import Blocks, Network


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (tokens, config.text_embed_dim)
    return {"encoder_hidden_states": text, "original_size": (2,), "target_size": (2,), "crop_coords": (2,)}


COGVIEW3PLUS = Family(
    "cogview3plus",
    "transformer",
    {"": Shape(30, 2560, 2, 8)},
    network=Network(
        model="CogView3PlusTransformer2DModel",
        blocks=(Blocks("transformer_blocks", item=0),),
        inputs=map_inputs,
        condition=_condition,
        channels=16,
        parameters=2_848_836_672,  # CogView3-Plus-3B is the constructor's defaults
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
            "pos_embed_max_size": 16,
        },
    ),
)
