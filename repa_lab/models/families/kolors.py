"""Kolors: the UNet of Stable Diffusion XL, whose text comes from a language model and is projected to its width."""

from __future__ import annotations

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.sdxl import RELEASED, TIME_IDS, TIME_WIDTH, TINY, sized_condition, sized_inputs
from repa_lab.models.network import Blocks, Network

_TEXT = 4096  # ChatGLM3's, pooled too

KOLORS = Family(
    "kolors",
    "unet",
    {"": Shape(1, 1280, 4, "mid")},
    network=Network(
        model="UNet2DConditionModel",
        blocks=(Blocks("mid_block", place="map"),),
        inputs=sized_inputs,
        condition=sized_condition,
        parameters=2_579_458_820,
        config={
            **RELEASED,
            "encoder_hid_dim": _TEXT,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": _TEXT + TIME_IDS * TIME_WIDTH,
        },
        tiny={**TINY, "encoder_hid_dim": 14, "encoder_hid_dim_type": "text_proj"},
    ),
)
