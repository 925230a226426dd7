"""Stable Diffusion XL: a UNet of three levels, so its mid block has a quarter of the latent cells along each side."""

from __future__ import annotations

from typing import Any

from repa_lab.models.families.shared import encode_prompt, rename, zero_rows
from repa_lab.models.family import Blocks, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import EULER, clip, kl_autoencoder, tiny_pipeline

TIME_IDS = 6  # original height and width, crop top and left, target height and width


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
    text = (tokens, config.encoder_hid_dim or config.cross_attention_dim)  # Kolors projects a text of another width
    return {"encoder_hidden_states": text, "text_embeds": (pooled,), "time_ids": (TIME_IDS,)}


_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
NETWORK = Network(
    model="UNet2DConditionModel",
    blocks=(Blocks("mid_block", place="map"),),
    inputs=lambda config, latents, time, condition: {
        "sample": latents,
        "timestep": time * 1000,
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "added_cond_kwargs": {name: condition[name] for name in ("text_embeds", "time_ids")},
    },
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
        "projection_class_embeddings_input_dim": 1280 + TIME_IDS * 256,
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
        "projection_class_embeddings_input_dim": 10 + TIME_IDS * 8,
    },
)
PIPELINE = Pipeline(
    released="stabilityai/stable-diffusion-xl-base-1.0",
    classes=("StableDiffusionXLPipeline",),
    encode=encode_prompt(
        "encoder_hidden_states", None, "text_embeds", if_empty=zero_rows, do_classifier_free_guidance=False
    ),
    prompt=rename(prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="text_embeds"),
    sizes=lambda config, frames: {"time_ids": frames},
    tiny=tiny_pipeline(kl_autoencoder(4, 0.13025), EULER, clip(4), clip(8, projection_dim=10)),
)
SDXL = Family("sdxl", "unet", {"": Shape(1, 1280, 4, "mid")}, network=NETWORK, pipeline=PIPELINE)
