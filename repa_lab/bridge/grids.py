"""Tokens of a denoiser and of an encoder along each side of a square image, and which of the two SimpleTuner shrinks."""

from __future__ import annotations

from repa_lab.encoders.registry import ENCODERS, input_size
from repa_lab.models.family import Family

_HUB_STRIDE = 14  # of all encoders SimpleTuner has
_LATENT_STRIDE = 8  # of the latents that a family trained from scratch is given


def encoder_pixels(name: str, image_size: int | None, pixels: int) -> int:
    """Pixels along each side at which an encoder sees an image of ``pixels``, by the papers' rule where none is given."""
    return input_size(_stride(name), (pixels, pixels), image_size)[0]


def encoder_grid(name: str, image_size: int) -> int:
    """Tokens of an encoder along each side of its input."""
    return image_size // _stride(name)


def student_grid(family: Family, size: str | None, pixels: int, latents: bool = True) -> int:
    """Tokens of a denoiser along each side of an image.

    Args:
        family: the family's facts.
        size: of a family that is trained from scratch.
        pixels: along each side of the image.
        latents: whether a family that takes what it is given sees latents.
    """
    cell = _LATENT_STRIDE if latents and family.latent_stride == 1 else family.latent_stride
    return pixels // (cell * family.shapes[size or ""].stride)


def shrinking_side(student: int, encoder: int) -> str:
    """SimpleTuner's rule as a ``resample.side``: the larger grid shrinks to the smaller."""
    return "teacher" if encoder > student else "student"


def _stride(name: str) -> int:
    return ENCODERS[name].stride if name in ENCODERS else _HUB_STRIDE
