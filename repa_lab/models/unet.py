"""The class-conditional UNet: diffusers' `UNet2DModel`, tapped at its mid block."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from repa_lab.models.facts import Shape


class UNet(nn.Module):
    """Velocity prediction for ``(B, C, H, W)`` at t in [0, 1] and class labels; label ``num_classes`` is the null
    label.

    Attention stands in every level but the first, as in the papers' UNets.
    """

    def __init__(self, shape: Shape, in_channels: int, input_size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        deeper = len(shape.channels) - 1
        untyped: Any = UNet2DModel
        self.net = untyped(
            sample_size=input_size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=shape.channels,
            layers_per_block=shape.layers,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * deeper),
            up_block_types=(*["AttnUpBlock2D"] * deeper, "UpBlock2D"),
            norm_num_groups=math.gcd(32, *shape.channels),
            attention_head_dim=min(64, shape.channels[0]),
            num_class_embeds=num_classes + 1,
        )

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass, which then runs each block once more."""
        self.net.enable_gradient_checkpointing()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Velocity ``(B, C, H, W)``; diffusers' sinusoids expect t in [0, 1000]."""
        velocity: torch.Tensor = self.net(x, t * 1000, class_labels=y).sample
        return velocity
