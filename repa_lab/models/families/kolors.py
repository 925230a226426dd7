"""Kolors: the UNet of Stable Diffusion XL with the text of a language model, projected to the UNet's width."""

from __future__ import annotations

from repa_lab.models.families.components import EULER, VOCABULARY, kl_autoencoder
from repa_lab.models.families.sdxl import (
    RELEASED,
    TIME_IDS,
    TIME_WIDTH,
    TINY,
    pooled_prompt,
    sized_condition,
    sized_inputs,
    sizes,
)
from repa_lab.models.families.shared import encode_prompt
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape

_TEXT = 4096  # width of ChatGLM3's text and pooled text
_TINY_TEXT = 14
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
        # The padding is always on the left, and the UNet takes it for text.
        encode=encode_prompt("encoder_hidden_states", None, "text_embeds", do_classifier_free_guidance=False),
        prompt=pooled_prompt,
        sizes=sizes,
        denoiser="unet",
        tiny={
            "vae": kl_autoencoder(4, 0.13025),
            "tokenizer": Component("diffusers.pipelines.kolors.ChatGLMTokenizer"),
            "text_encoder": Component("diffusers.pipelines.kolors.ChatGLMModel", _CHATGLM),
            "scheduler": Component(EULER.name, {**EULER.config, "beta_end": 0.014, "num_train_timesteps": 1100}),
        },
    ),
)
