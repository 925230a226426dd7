"""Tiny autoencoders of every form of latent, with weights large enough that their outputs are no plain images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
)

MEAN, STD = (0.3, -0.2, 0.1, 0.05), (1.5, 0.7, 2.0, 0.9)
_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}


def kl(**config: Any) -> AutoencoderKL:
    """Halves the sides, 4 channels."""
    return AutoencoderKL(**{**_BLOCKS, **config})


def flux2(**config: Any) -> AutoencoderKLFlux2:
    """Halves the sides, 4 channels, 16 in patches; statistics as after training."""
    vae = AutoencoderKLFlux2(**{**_BLOCKS, "batch_norm_eps": 1e-2, **config})
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.2, 3, 16))
    return vae


def dc(**config: Any) -> AutoencoderDC:
    """Halves the sides, 4 channels, nothing left to chance."""
    sides = ("encoder", "decoder")
    blocks = {f"{side}_block_types": ("ResBlock", "ResBlock") for side in sides}
    channels = {f"{side}_block_out_channels": (8, 16) for side in sides}
    layers = {f"{side}_layers_per_block": (1, 1) for side in sides}
    scales = {f"{side}_qkv_multiscales": ((), ()) for side in sides}
    return AutoencoderDC(
        **{**blocks, **channels, **layers, **scales, "latent_channels": 4, "scaling_factor": 0.4, **config}
    )


def qwen(**config: Any) -> AutoencoderKLQwenImage:
    """Of films; halves the sides, 4 channels."""
    options = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    return AutoencoderKLQwenImage(**{**options, "latents_mean": list(MEAN), "latents_std": list(STD), **config})


def tiny(**config: Any) -> AutoencoderTiny:
    """Halves the sides, 4 channels."""
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**{**channels, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), **config})
