"""Denoisers that are trained from scratch, by the name of their family; the class-conditional UNet among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from repa_lab.align.tokens import flatten_map
from repa_lab.models.family import UNET, BlockIndex, Shape, shape_of
from repa_lab.models.sit import SiT, SiTDown
from repa_lab.models.tap import Denoiser, Tap, TapError


class UNet(Denoiser):
    """diffusers' `UNet2DModel`, tapped at its mid block: the velocity of images ``(B, C, H, W)`` under class labels.

    Label ``num_classes`` is the null label. Every level but the first has attention, as in the papers' UNets.
    """

    def __init__(self, shape: Shape, in_channels: int, input_size: tuple[int, int], num_classes: int) -> None:
        from diffusers import UNet2DModel  # here, because the import takes two seconds

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

    @classmethod
    def from_size(cls, size: str, in_channels: int, input_size: tuple[int, int], num_classes: int) -> UNet:
        """Build ``nano``, ``S`` or ``B``; another size is a ValueError."""
        return cls(shape_of(UNET, size), in_channels, input_size, num_classes)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the velocity ``(B, C, H, W)``; see :meth:`repa_lab.models.sit.SiT.forward`."""
        velocity: torch.Tensor = self.net(x, t * 1000, class_labels=y).sample  # diffusers takes times in [0, 1000]
        return velocity

    def tap(self, block_index: BlockIndex) -> Tap:
        """Tap the mid block; see :meth:`Denoiser.tap`."""
        if block_index != "mid":
            raise TapError(f"unet is tapped at its mid block: block_index must be 'mid', got {block_index!r}")
        return Tap(self.net.mid_block, flatten_map)


CLASSES: dict[str, type[SiT | SiTDown | UNet]] = {"sit": SiT, "sit_down": SiTDown, "unet": UNet}


@dataclass(frozen=True)
class Input:
    """What a denoiser is built for: an image or latent of so many channels and of ``(height, width)``, and classes.

    ``num_classes`` is without the null label.
    """

    channels: int
    size: tuple[int, int]
    num_classes: int


def build(family: str, size: str, given: Input) -> SiT | SiTDown | UNet:
    """Build a freshly initialised denoiser with ``forward(x, t, y)``, which returns the velocity.

    A size that is not known, or an input whose height or width does not fit, is a ValueError.
    """
    return CLASSES[family].from_size(size, given.channels, given.size, given.num_classes)
