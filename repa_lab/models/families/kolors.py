"""Kolors: the UNet of Stable Diffusion XL with the text of a language model, projected to the UNet's width."""

from __future__ import annotations

from dataclasses import replace

from repa_lab.models.families.sdxl import NETWORK, PIPELINE, SDXL, TIME_IDS
from repa_lab.models.families.shared import encode_prompt
from repa_lab.models.family import Component
from repa_lab.models.tiny import EULER, VOCABULARY, kl_autoencoder, tiny_pipeline

_TEXT, _TINY_TEXT = 4096, 14  # widths of ChatGLM3's text and pooled text
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

KOLORS = replace(
    SDXL,
    name="kolors",
    network=replace(
        NETWORK,
        parameters=2_579_458_820,
        config={
            **NETWORK.config,
            "encoder_hid_dim": _TEXT,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": _TEXT + TIME_IDS * 256,
        },
        tiny={
            **NETWORK.tiny,
            "encoder_hid_dim": _TINY_TEXT,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": _TINY_TEXT + TIME_IDS * 8,
        },
    ),
    pipeline=replace(
        PIPELINE,
        released="Kwai-Kolors/Kolors-diffusers",
        classes=("KolorsPipeline",),
        # The padding is always on the left, and the UNet takes it for text.
        encode=encode_prompt("encoder_hidden_states", None, "text_embeds", do_classifier_free_guidance=False),
        tiny=tiny_pipeline(
            kl_autoencoder(4, 0.13025),
            Component(EULER.name, {**EULER.config, "beta_end": 0.014, "num_train_timesteps": 1100}),
            (
                Component("diffusers.pipelines.kolors.ChatGLMTokenizer"),
                Component("diffusers.pipelines.kolors.ChatGLMModel", _CHATGLM),
            ),
        ),
    ),
)
