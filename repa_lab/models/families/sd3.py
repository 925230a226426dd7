"""Stable Diffusion 3 and 3.5: joint blocks that return text and image apart."""

from __future__ import annotations

from typing import Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.shared import map_inputs
from repa_lab.models.network import Blocks, Network


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (tokens, config.joint_attention_dim)
    return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}


SD3 = Family(
    "sd3",
    "transformer",
    {"": Shape(24, 1536, 2, 8)},
    network=Network(
        model="SD3Transformer2DModel",
        blocks=(Blocks("transformer_blocks", item=1),),
        inputs=map_inputs,
        condition=_condition,
        channels=16,
        parameters=2_028_328_000,
        config={  # stable-diffusion-3-medium
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        tiny={
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 16,
        },
    ),
)
