"""Sana: linear attention over latents of a deep autoencoder, a token per 32x32 pixels; text by cross-attention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from repa_lab.models.families.shared import MASKED_TEXT, encode_prompt, masked_text, negative_rows
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape, Tensor
from repa_lab.models.tiny import FLOW_SIGMAS, gemma, tiny_pipeline, tiny_transformer


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    # The call puts instructions before a caption, and only the call's default has their text.
    instructions = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    options = {"do_classifier_free_guidance": False, "complex_human_instruction": instructions}
    return encode_prompt(*MASKED_TEXT, if_empty=negative_rows, **options)(pipeline, captions)


_LEVELS = 6  # of the autoencoder, which shrinks 32-fold
_VAE = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "encoder_block_out_channels": (8,) * _LEVELS,
    "decoder_block_out_channels": (8,) * _LEVELS,
    "encoder_layers_per_block": (1,) * _LEVELS,
    "decoder_layers_per_block": (1,) * _LEVELS,
    "encoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "decoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
SANA = Family(
    "sana",
    "transformer",
    {"": Shape(20, 2240, 1, 10)},
    latent_stride=32,
    network=Network(
        model="SanaTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=lambda config, latents, time, condition: {
            "hidden_states": latents,
            "timestep": time * 1000 * config.timestep_scale,
            **condition,
        },
        condition=masked_text("caption_channels"),
        channels=32,
        parameters=1_604_462_752,  # Sana_1600M_1024px has the constructor's defaults
        tiny=tiny_transformer(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            cross_attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_dim=32,
            caption_channels=12,
        ),
    ),
    pipeline=Pipeline(
        released="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        classes=("SanaPipeline",),
        encode=_encode,
        # Without this the pipeline encodes a negative prompt itself and samples at the nearest size of its own list.
        options={"negative_prompt": None, "use_resolution_binning": False},
        tiny=tiny_pipeline(
            Component("diffusers.AutoencoderDC", _VAE),
            Component("diffusers.DPMSolverMultistepScheduler", FLOW_SIGMAS),  # the shift is not checked
            gemma(12),
        ),
    ),
)
