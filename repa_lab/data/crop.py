"""Cropping: the papers' crop of an image of any size, and the sizes that the images of a data set are brought to."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from repa_lab.data import DataError

Size = tuple[int, int]  # height, width
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # between two levels of grey of 2 and 4 bits, as Pillow unpacks them


@dataclass(frozen=True)
class Framing:
    """How an image is brought to a size: halved, resized, and cut at the centre.

    Attributes:
        halvings: number of times that the image is halved.
        resized: height and width that the halved image is resized to.
        frame: original height and width, top and left of the cut, height and width, in the order of SDXL's
            conditioning.
    """

    halvings: int
    resized: Size
    frame: tuple[int, ...]


def framing(original: Size, size: Size) -> Framing:
    """Return ADM's crop, which the REPA papers use: halve while twice too large, cover the size, cut at the centre."""
    (height, width), halvings = original, 0
    while min(height / size[0], width / size[1]) >= 2:
        height, width, halvings = height // 2, width // 2, halvings + 1
    scale = max(size[0] / height, size[1] / width)
    resized = round(height * scale), round(width * scale)
    return Framing(halvings, resized, (*original, (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2, *size))


def crop(image: Image.Image, size: Size) -> Image.Image:
    """Return an image brought to (height, width): halved with a box filter, resized with a bicubic one, and cut."""
    steps = framing((image.height, image.width), size)
    for _ in range(steps.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(steps.resized[::-1], Image.Resampling.BICUBIC)
    top, left = steps.frame[2:4]
    return image.crop((left, top, left + size[1], top + size[0]))


def opaque(image: Image.Image) -> Image.Image:
    """Return an image as RGB, over white where it is transparent: by alpha channel, palette or colour."""
    key = _transparent_colour(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip to white
        levels = np.asarray(image)
        return Image.fromarray(np.where(levels == key, 255, np.rint(levels / 257)).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | None:
    """Return the colour that a PNG's tRNS chunk makes transparent, on the scale of the image's pixels, or None.

    Pillow scales the pixels of other depths than 8 bits, and leaves the colour as the file has it.
    """
    colour = image.info.get("transparency")
    packing = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
    if isinstance(colour, int) and packing in _GREY_STEPS:
        return colour * _GREY_STEPS[packing]
    if isinstance(colour, tuple) and packing == "RGB;16B":
        return tuple(level >> 8 for level in colour)
    return colour if isinstance(colour, (int, tuple)) and image.mode != "P" else None


@dataclass(frozen=True)
class Buckets:
    """Image sizes of at most the area of a square of ``side`` pixels at several aspects, as SDXL was trained with.

    Sides are multiples of ``step`` pixels, and at most ``max_aspect`` times the other.

    Raises:
        DataError: there is no such size.
    """

    side: int
    step: int
    max_aspect: float

    def __post_init__(self) -> None:
        if not self.sizes:
            around = f"of about the area of {self.side}x{self.side} px with aspects up to {self.max_aspect:g}"
            raise DataError("buckets", f"no size in steps of {self.step} px is {around}; choose a smaller step")

    @functools.cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes, from the tallest to the widest."""
        sides = range(self.step, int(self.side * math.sqrt(self.max_aspect)) + 1, self.step)
        pairs = [(self.side**2 // side // self.step * self.step, side) for side in sides]
        fitting = [pair for pair in pairs if min(pair) and max(pair) / min(pair) <= self.max_aspect]
        upright_and_wide = {size for pair in fitting for size in (pair, pair[::-1])}
        return tuple(sorted(upright_and_wide, key=lambda size: size[1] / size[0]))

    def choose(self, original: Size) -> Size:
        """Return the size whose aspect is nearest to an image's, so that the least is cut off."""
        aspect = math.log(original[1] / original[0])
        return min(self.sizes, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))
