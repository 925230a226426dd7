"""Stable Diffusion 3 and 3.5: joint blocks that return text and image apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import (
    CLIP_TOKENIZER,
    T5_TOKENIZER,
    TEXT_ATTENTION,
    clip_text,
    flow_scheduler,
    kl_autoencoder,
    t5_text,
)
from repa_lab.models.families.shared import map_inputs
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (tokens, config.joint_attention_dim)
    return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(list(captions), None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    return {
        "prompt_embeds": condition["encoder_hidden_states"],
        "pooled_prompt_embeds": condition["pooled_projections"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "negative_pooled_prompt_embeds": null["pooled_projections"],
        "guidance_scale": guidance,
    }


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
    pipeline=Pipeline(
        released="stabilityai/stable-diffusion-3-medium-diffusers",
        classes=("StableDiffusion3Pipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 1.5305, 0.0609),
            "tokenizer": CLIP_TOKENIZER,
            "text_encoder": clip_text(4, projection_dim=4),
            "tokenizer_2": CLIP_TOKENIZER,
            "text_encoder_2": clip_text(6, projection_dim=6),
            "tokenizer_3": T5_TOKENIZER,
            "text_encoder_3": t5_text(12),
            "scheduler": flow_scheduler(shift=3.0),
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION),
    ),
)
