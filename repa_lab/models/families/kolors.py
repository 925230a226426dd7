"""Kolors: the UNet of Stable Diffusion XL, whose text comes from a language model and is projected to its width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import EULER, VOCABULARY, kl_autoencoder
from repa_lab.models.families.sdxl import (
    RELEASED,
    TIME_IDS,
    TIME_WIDTH,
    TINY,
    framed,
    pooled_call,
    sized_condition,
    sized_inputs,
)
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Part, Pipeline

if TYPE_CHECKING:
    import torch

_TEXT = 4096  # ChatGLM3's, pooled too
_TINY_TEXT = 14


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    # Its tokenizer pads on the left and no other side, and its model takes the padding for text.
    text, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "text_embeds": pooled}


_CHATGLM = {
    "num_layers": 2,
    "padded_vocab_size": VOCABULARY,
    "hidden_size": _TINY_TEXT,
    "ffn_hidden_size": _TINY_TEXT,
    "kv_channels": 8,
    "num_attention_heads": 2,
    "seq_length": 512,
    "original_rope": True,
}

KOLORS = Family(
    "kolors",
    "unet",
    {"": Shape(1, 1280, 4, "mid")},
    network=Network(
        model="UNet2DConditionModel",
        depths=(),
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
        tiny={
            **TINY,
            "encoder_hid_dim": _TINY_TEXT,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": _TINY_TEXT + TIME_IDS * TINY["addition_time_embed_dim"],
        },
    ),
    pipeline=Pipeline(
        released="Kwai-Kolors/Kolors-diffusers",
        classes=("KolorsPipeline",),
        encode=_encode,
        call=pooled_call,
        sizes=framed,
        denoiser="unet",
        tiny={
            "vae": kl_autoencoder(4, 0.13025),
            "tokenizer": Part("diffusers.pipelines.kolors.ChatGLMTokenizer"),
            "text_encoder": Part("diffusers.pipelines.kolors.ChatGLMModel", _CHATGLM),
            "scheduler": Part(EULER.name, {**EULER.config, "beta_end": 0.014, "num_train_timesteps": 1100}),
        },
    ),
)
