"""Stable Diffusion 1.5: a UNet of four levels, so its mid block sees an eighth of the latents along each side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.models.facts import Family, Shape
from repa_lab.models.families.parts import CLIP_TOKENIZER, LATENT_BETAS, clip_text, kl_autoencoder
from repa_lab.models.network import Blocks, Network
from repa_lab.models.pipeline import Part, Pipeline

if TYPE_CHECKING:
    import torch

    from repa_lab.models.network import Condition


def _inputs(config: Any, latents: torch.Tensor, time: torch.Tensor, condition: Condition) -> dict[str, Any]:
    return {"sample": latents, "timestep": time * 1000, **condition}


def _condition(config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, config.cross_attention_dim)}


def _encode(pipeline: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    text, _ = pipeline.encode_prompt(list(captions), pipeline.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text}


def _call(condition: Condition, null: Condition, guidance: float) -> dict[str, Any]:
    return {
        "prompt_embeds": condition["encoder_hidden_states"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "guidance_scale": guidance,
    }


SD15 = Family(
    "sd15",
    "unet",
    {"": Shape(1, 1280, 8, "mid")},
    network=Network(
        model="UNet2DConditionModel",
        depths=(),
        blocks=(Blocks("mid_block", place="map"),),
        inputs=_inputs,
        condition=_condition,
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
        encode=_encode,
        call=_call,
        denoiser="unet",
        tiny={
            "vae": kl_autoencoder(4, 0.18215),
            "tokenizer": CLIP_TOKENIZER,
            "text_encoder": clip_text(12),
            "scheduler": Part("diffusers.PNDMScheduler", {**LATENT_BETAS, "skip_prk_steps": True}),
        },
    ),
)
