"""Encoders by name, as data: what `plan` can check of them without loading anything.

The guide's names lead to timm's models. Any other name is taken as timm's own and checked when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of an encoder by its name.

    Attributes:
        timm_name: the model and weights in timm.
        stride: pixels per patch token along each side.
        dim: width D of a token.
        options: further arguments of `timm.create_model`.
        bundled: whether its weights come with a package the lab depends on, so that no hub is needed.
    """

    timm_name: str
    stride: int
    dim: int
    options: Mapping[str, bool] = field(default_factory=dict)
    bundled: bool = False


_DINOV2 = {"s": ("small", 384), "b": ("base", 768), "l": ("large", 1024), "g": ("giant", 1536)}
# DINOv2 is published for 518 pixels only; other sizes need its position table resampled.
_ANY_SIZE = {"dynamic_img_size": True}

ENCODERS: dict[str, EncoderFacts] = {
    "efficientnet_lite0": EncoderFacts("tf_efficientnet_lite0", stride=16, dim=112, bundled=True),
    **{
        f"dinov2_vit{letter}14": EncoderFacts(f"vit_{size}_patch14_dinov2.lvd142m", 14, dim, _ANY_SIZE)
        for letter, (size, dim) in _DINOV2.items()
    },
    **{
        f"dinov2_vit{letter}14_reg": EncoderFacts(f"vit_{size}_patch14_reg4_dinov2.lvd142m", 14, dim, _ANY_SIZE)
        for letter, (size, dim) in _DINOV2.items()
    },
}


def default_image_size(stride: int, resolution: int) -> int:
    """The papers' input size: as many patches as there are 16-pixel cells in the image (256 px -> 224 for patch 14).

    A ``SiT-*/2`` over 8x latents then has exactly the encoder's grid: REPA, preprocessing in the released code.
    """
    return stride * (resolution // 16)


def grid_problem(name: str, image_size: int | None, resolution: int) -> str | None:
    """Why a known encoder cannot give a patch grid at this size, or None if it can or is not known."""
    facts = ENCODERS.get(name)
    if facts is None:
        return None
    size = image_size or default_image_size(facts.stride, resolution)
    if size == 0:
        return f"the papers' rule has no size for {resolution} px images; set image_size to a multiple of {facts.stride}"
    if size % facts.stride:
        lower = size // facts.stride * facts.stride
        allowed = f"{lower or facts.stride}, {lower + facts.stride}, ..."
        return f"{name} has patches of {facts.stride}: {size} is no multiple; allowed: {allowed}"
    if size < 2 * facts.stride:
        return f"{name} gives one token at {size} px; patch tokens are required: use {2 * facts.stride} px or more"
    return None
