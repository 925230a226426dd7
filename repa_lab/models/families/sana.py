"""Sana: linear attention over latents of a deep autoencoder, a token per cell of 32x32 pixels; text by cross-attention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.language import GEMMA_TOKENIZER, language_model, negative_where_empty
from repa_lab.models.families.shared import masked_call
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Part, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"hidden_states": latents, "timestep": time * 1000 * config.timestep_scale, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.caption_channels), "encoder_attention_mask": (tokens,)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    # Its call writes instructions before a caption, which only the call's own default spells out.
    instructions = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    text, mask, _, _ = pipeline.encode_prompt(list(captions), False, complex_human_instruction=instructions)
    return negative_where_empty(pipeline, captions, text, mask)


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    # Its empty caption is one that it would encode itself; and the size that is asked for is the one that is sampled.
    return {**masked_call(condition, null, guidance), "negative_prompt": None, "use_resolution_binning": False}


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
# As its conversion to diffusers sets it, with the shift as recalled.
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

SANA = Family(
    "sana",
    "transformer",
    {"": Shape(20, 2240, 1, 10)},
    latent_stride=32,
    network=Network(
        model="SanaTransformer2DModel",
        blocks=(Blocks("transformer_blocks"),),
        inputs=_inputs,
        condition=_condition,
        channels=32,
        parameters=1_604_462_752,  # Sana_1600M_1024px, which the constructor's defaults are
        tiny={
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "num_cross_attention_heads": 2,
            "cross_attention_dim": 32,
            "caption_channels": 12,
        },
    ),
    pipeline=Pipeline(
        released="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        classes=("SanaPipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": Part("diffusers.AutoencoderDC", _VAE),
            "tokenizer": GEMMA_TOKENIZER,
            "text_encoder": language_model("Gemma2Model", 12),
            "scheduler": Part("diffusers.DPMSolverMultistepScheduler", _FLOW),
        },
    ),
)
