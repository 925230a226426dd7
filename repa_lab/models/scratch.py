"""Denoisers that are trained from scratch, by the name of their family."""

from __future__ import annotations

from dataclasses import dataclass

from repa_lab.models.sit import SiT
from repa_lab.models.sit_down import SiTDown
from repa_lab.models.unet import UNet

CLASSES: dict[str, type[SiT | SiTDown | UNet]] = {"sit": SiT, "sit_down": SiTDown, "unet": UNet}


@dataclass(frozen=True)
class Input:
    """What a denoiser is built for.

    Attributes:
        channels: of an image or latent.
        size: height and width of an image or latent.
        num_classes: classes, without the null label.
    """

    channels: int
    size: tuple[int, int]
    num_classes: int


def build(family: str, size: str, given: Input) -> SiT | SiTDown | UNet:
    """Build a freshly initialised denoiser with ``forward(x, t, y)``, which returns the velocity.

    Raises:
        ValueError: an unknown size, or an input whose height or width does not fit.
    """
    return CLASSES[family].from_size(size, given.channels, given.size, given.num_classes)
