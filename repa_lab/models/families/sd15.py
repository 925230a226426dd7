"""Stable Diffusion 1.5: a UNet of four levels, so its mid block has an eighth of the latent cells along each side."""

from __future__ import annotations

from repa_lab.models.families.shared import map_inputs, text_shapes
from repa_lab.models.family import Blocks, Component, Family, Network, Pipeline, Shape
from repa_lab.models.tiny import LATENT_BETAS, clip, kl_autoencoder, tiny_pipeline

SD15 = Family(
    "sd15",
    "unet",
    {"": Shape(1, 1280, 8, "mid")},
    network=Network(
        model="UNet2DConditionModel",
        blocks=(Blocks("mid_block", place="map"),),
        inputs=map_inputs("sample"),
        condition=text_shapes("cross_attention_dim"),
        native=512,
        parameters=859_520_964,
        config={"sample_size": 64, "cross_attention_dim": 768},  # stable-diffusion-v1-5
        tiny={
            "sample_size": 16,
            "block_out_channels": (8, 16, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 12,
        },
    ),
    pipeline=Pipeline(
        released="stable-diffusion-v1-5/stable-diffusion-v1-5",
        classes=("StableDiffusionPipeline",),
        encode=lambda pipeline, captions: {
            "encoder_hidden_states": pipeline.encode_prompt(
                list(captions), pipeline.device, 1, do_classifier_free_guidance=False
            )[0]
        },
        tiny=tiny_pipeline(
            kl_autoencoder(4, 0.18215),
            Component("diffusers.PNDMScheduler", {**LATENT_BETAS, "skip_prk_steps": True}),
            clip(12),
        ),
    ),
)
