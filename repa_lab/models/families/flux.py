"""FLUX.1: text and image in streams of their own, then in one sequence, text first. 2x2 latent cells are a token."""

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
from repa_lab.models.families.shared import full_guidance
from repa_lab.models.layout import pack, positions, unpack
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import ATTENTION, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    text = condition["encoder_hidden_states"]
    return {
        "hidden_states": pack(latents),
        "timestep": time,
        "img_ids": positions((height // 2, width // 2), 3, latents),
        "txt_ids": latents.new_zeros(text.shape[1], 3),
        **condition,
        **full_guidance(config, time),
    }


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    text = (tokens, config.joint_attention_dim)
    return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, pooled, _ = pipeline.encode_prompt(list(captions), None)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    return {
        "prompt_embeds": condition["encoder_hidden_states"],
        "pooled_prompt_embeds": condition["pooled_projections"],
        "guidance_scale": guidance,  # which the model was distilled from, so nothing is computed without text
    }


FLUX = Family(
    "flux",
    "transformer",
    {"": Shape(57, 3072, 2, 8)},
    network=Network(
        model="FluxTransformer2DModel",
        depths=("num_layers", "num_single_layers"),
        blocks=(Blocks("transformer_blocks", item=1), Blocks("single_transformer_blocks", item=1)),
        inputs=_inputs,
        condition=_condition,
        output=unpack,
        config={"guidance_embeds": True},  # FLUX.1-dev
        channels=16,
        parameters=11_901_408_320,
        tiny={
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    pipeline=Pipeline(
        released="black-forest-labs/FLUX.1-dev",
        classes=("FluxPipeline",),
        encode=_encode,
        call=_call,
        tiny={
            "vae": kl_autoencoder(4, 0.3611, 0.1159),
            "tokenizer": CLIP_TOKENIZER,
            "text_encoder": clip_text(10),
            "tokenizer_2": T5_TOKENIZER,
            "text_encoder_2": t5_text(12),
            "scheduler": flow_scheduler(use_dynamic_shifting=True, shift=3.0),
        },
        adapted=(*ATTENTION, *TEXT_ATTENTION),
    ),
)
