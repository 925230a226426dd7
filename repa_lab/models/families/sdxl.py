"""Stable Diffusion XL, a UNet of three levels whose mid block has a quarter of the latent cells of a side; Kolors.

Kolors is the same UNet with the text of a language model, projected to the UNet's width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from repa_lab.models.families.components import CLIP_TOKENIZER, EULER, VOCABULARY, clip_text, kl_autoencoder
from repa_lab.models.families.shared import encode_prompt, rename, zero_rows
from repa_lab.models.family import Blocks, Component, Condition, Family, Network, Pipeline, Shape, Tensor

_TIME_IDS = 6  # original height and width, crop top and left, target height and width


def _inputs(config: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    added = {"text_embeds": condition["text_embeds"], "time_ids": condition["time_ids"]}
    text = condition["encoder_hidden_states"]
    return {"sample": latents, "timestep": time * 1000, "encoder_hidden_states": text, "added_cond_kwargs": added}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
    text = (tokens, config.encoder_hid_dim or config.cross_attention_dim)  # Kolors projects a text of another width
    return {"encoder_hidden_states": text, "text_embeds": (pooled,), "time_ids": (_TIME_IDS,)}


_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_NETWORK = Network(
    model="UNet2DConditionModel",
    depths=(),
    blocks=(Blocks("mid_block", place="map"),),
    inputs=_inputs,
    condition=_condition,
    parameters=2_567_463_684,
    config={
        **_BLOCKS,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + _TIME_IDS * 256,
    },
    tiny={
        **_BLOCKS,
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 10 + _TIME_IDS * 8,
    },
)
_PIPELINE = Pipeline(
    released="stabilityai/stable-diffusion-xl-base-1.0",
    classes=("StableDiffusionXLPipeline",),
    encode=encode_prompt(
        "encoder_hidden_states", None, "text_embeds", if_empty=zero_rows, do_classifier_free_guidance=False
    ),
    prompt=rename(prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="text_embeds"),
    sizes=lambda config, frames: {"time_ids": frames},
    denoiser="unet",
    tiny={
        "vae": kl_autoencoder(4, 0.13025),
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
        "text_encoder": clip_text(4),
        "text_encoder_2": clip_text(8, projection_dim=10),
        "scheduler": EULER,
    },
)
SDXL = Family("sdxl", "unet", {"": Shape(1, 1280, 4, "mid")}, network=_NETWORK, pipeline=_PIPELINE)

# ---- Kolors

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
        _NETWORK,
        parameters=2_579_458_820,
        config={
            **_NETWORK.config,
            "encoder_hid_dim": _TEXT,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": _TEXT + _TIME_IDS * 256,
        },
        tiny={
            **_NETWORK.tiny,
            "encoder_hid_dim": _TINY_TEXT,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": _TINY_TEXT + _TIME_IDS * 8,
        },
    ),
    pipeline=replace(
        _PIPELINE,
        released="Kwai-Kolors/Kolors-diffusers",
        classes=("KolorsPipeline",),
        # The padding is always on the left, and the UNet takes it for text.
        encode=encode_prompt("encoder_hidden_states", None, "text_embeds", do_classifier_free_guidance=False),
        tiny={
            "vae": kl_autoencoder(4, 0.13025),
            "tokenizer": Component("diffusers.pipelines.kolors.ChatGLMTokenizer"),
            "text_encoder": Component("diffusers.pipelines.kolors.ChatGLMModel", _CHATGLM),
            "scheduler": Component(EULER.name, {**EULER.config, "beta_end": 0.014, "num_train_timesteps": 1100}),
        },
    ),
)
