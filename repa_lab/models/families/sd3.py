"""Stable Diffusion 3 and 3.5: joint blocks that return text and image apart."""

from __future__ import annotations

from repa_lab.models.families.shared import JOINT_ATTENTION, JOINT_BLOCKS, encode_prompt, map_inputs, text_shapes
from repa_lab.models.family import Family, Network, Pipeline, Shape
from repa_lab.models.tiny import clip, flow_scheduler, kl_autoencoder, t5, tiny_pipeline, tiny_transformer

SD3 = Family(
    "sd3",
    "transformer",
    {"": Shape(24, 1536, 2, 8)},
    network=Network(
        model="SD3Transformer2DModel",
        blocks=(JOINT_BLOCKS,),
        inputs=map_inputs(),
        condition=text_shapes("joint_attention_dim", pooled_projections=("pooled_projection_dim",)),
        channels=16,
        parameters=2_028_328_000,
        config={  # stable-diffusion-3-medium
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        tiny=tiny_transformer(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=10,
            pos_embed_max_size=16,
        ),
    ),
    pipeline=Pipeline(
        released="stabilityai/stable-diffusion-3-medium-diffusers",
        classes=("StableDiffusion3Pipeline",),
        encode=encode_prompt(
            "encoder_hidden_states",
            None,
            "pooled_projections",
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
        ),
        tiny=tiny_pipeline(
            kl_autoencoder(4, 1.5305, 0.0609),
            flow_scheduler(shift=3.0),
            clip(4, projection_dim=4),
            clip(6, projection_dim=6),
            t5(12),
        ),
        adapted=JOINT_ATTENTION,
    ),
)
