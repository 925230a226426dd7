"""What every family says of itself, as data: no torch, so that `plan` can check a spec in a second.

Depth, width and strides of pretrained families are those of their released configurations in diffusers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from repa_lab.align.settings import REGULARIZERS
from repa_lab.models.network import Network
from repa_lab.models.pipeline import Pipeline

Kind = Literal["transformer", "unet"]
BlockIndex = int | Literal["mid"]
# Before a size: as many blocks or levels, but narrow; what a rehearsal trains instead.
NARROW = "narrow-"
_NARROW_WIDTH = 32


@dataclass(frozen=True)
class Shape:
    """One size of a family.

    Attributes:
        depth: number of blocks that ``block_index`` counts; 1 for a UNet, whose only tap is ``mid``.
        width: the denoiser's width D at the tap.
        stride: input pixels (or latent cells) per token along each side at the tap.
        block: the suggested ``block_index``.
        heads: attention heads (transformers trained from scratch).
        channels: channels per level (UNets trained from scratch).
        layers: residual blocks per level (UNets trained from scratch).
        stages: blocks per stage, the middle one at half the resolution (U-shaped transformers trained from scratch).
    """

    depth: int
    width: int
    stride: int
    block: BlockIndex
    heads: int = 0
    channels: tuple[int, ...] = ()
    layers: int = 0
    stages: tuple[int, ...] = ()

    def stride_at(self, block: BlockIndex | None) -> int:
        """The stride of the tokens that leave a block: half of ``stride`` outside the middle stage of a U-shaped
        transformer. None is the suggested block."""
        if not self.stages or not isinstance(block, int):
            return self.stride
        before, middle, _ = self.stages
        return self.stride if before <= block < before + middle else self.stride // 2


@dataclass(frozen=True)
class Family:
    """The facts of a family; ``shapes`` maps a size to its shape, with the single key ``""`` where a hub folder
    decides.

    ``latent_stride`` is the VAE's: image pixels per latent cell; 1 for families that take what they are given.
    ``network`` is the model in diffusers and ``pipeline`` what surrounds it there; both are None for families trained
    from scratch. ``u_shaped`` are transformers with a stage of fewer tokens.
    """

    name: str
    kind: Kind
    shapes: Mapping[str, Shape]
    latent_stride: int = 8
    network: Network | None = None
    pipeline: Pipeline | None = None
    u_shaped: bool = False

    @property
    def regularizer(self) -> str:
        """The regularizer that fits best: REPA taps transformers, U-REPA the mid block of UNets."""
        return self.regularizers[0]

    @property
    def regularizers(self) -> tuple[str, ...]:
        """Those that fit, the best first: U-REPA was made for U-shaped denoisers, and REPA taps any transformer."""
        own = ("u_shaped",) if self.u_shaped else ()
        kinds = (*own, self.kind)
        fitting = {name: REGULARIZERS[name].settings.kinds for name in REGULARIZERS if name != "none"}
        return tuple(dict.fromkeys(name for kind in kinds for name, fits in fitting.items() if kind in fits))

    @property
    def from_scratch(self) -> bool:
        """Whether the lab builds the family by ``size`` rather than from a pretrained folder."""
        return "" not in self.shapes


class UnknownFactError(ValueError):
    """A family or size that does not exist; the message lists those that do."""

    def __init__(self, what: str, value: str, allowed: tuple[str, ...]) -> None:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {what} '{value}'; allowed: {', '.join(allowed)}{hint}")


# depth, width, heads and the papers' tap: depth 4 for B, 8 for L and XL (1-based), so block_index 3 and 7.
_SIT = {
    "nano": (4, 64, 4, 1),
    "S": (12, 384, 6, 3),
    "B": (12, 768, 12, 3),
    "L": (24, 1024, 16, 7),
    "XL": (28, 1152, 16, 7),
}
_SIT_PATCHES = (2, 4, 8)

SIT_SHAPES: dict[str, Shape] = {
    f"{size}/{patch}": Shape(depth, width, stride=patch, block=block, heads=heads)
    for size, (depth, width, heads, block) in _SIT.items()
    for patch in _SIT_PATCHES
}


def _unet(channels: tuple[int, ...], layers: int) -> Shape:
    return Shape(1, channels[-1], 2 ** (len(channels) - 1), "mid", channels=channels, layers=layers)


# B is the shape of the latent diffusion paper's class-conditional ImageNet UNet (192 channels times 1, 2, 3, 5).
UNET_SHAPES: dict[str, Shape] = {
    "nano": _unet((32, 64), 1),
    "S": _unet((128, 256, 384), 2),
    "B": _unet((192, 384, 576, 960), 2),
}


# Blocks before, in and after the middle stage, width, heads: U-REPA's Table 2, which gives the heads of B alone.
_SIT_DOWN: dict[str, tuple[tuple[int, int, int], int, int]] = {
    "nano": ((2, 2, 2), 64, 4),
    "B": ((5, 5, 5), 768, 12),
    "L": ((9, 14, 9), 1024, 16),
    "XL": ((10, 16, 10), 1152, 16),
}
_SIT_DOWN_PATCH = 2
_SWIGLU_MULTIPLE = 256


def swiglu_width(width: int) -> int:
    """Hidden channels of the MLP in SiT-down's blocks: with a gate, about as many weights as SiT's without."""
    return -(-(8 * width // 3) // _SWIGLU_MULTIPLE) * _SWIGLU_MULTIPLE


def _sit_down(stages: tuple[int, int, int], width: int, heads: int) -> Shape:
    """Tapped at the middle of its depth (Table 4: the 18th of 36 blocks), where the stride is twice the patch."""
    depth = sum(stages)
    return Shape(depth, width, 2 * _SIT_DOWN_PATCH, (depth - 1) // 2, heads=heads, stages=stages)


SIT_DOWN_SHAPES = {f"{size}/{_SIT_DOWN_PATCH}": _sit_down(*shape) for size, shape in _SIT_DOWN.items()}


SIT = Family("sit", "transformer", SIT_SHAPES, latent_stride=1)
UNET = Family("unet", "unet", UNET_SHAPES, latent_stride=1)
SIT_DOWN = Family("sit_down", "transformer", SIT_DOWN_SHAPES, latent_stride=1, u_shaped=True)


def network_of(family: Family) -> Network:
    """The diffusers model of a family that has one."""
    assert family.network is not None
    return family.network


def pipeline_of(family: Family) -> Pipeline:
    """The diffusers pipeline of a family that is trained from one."""
    assert family.pipeline is not None
    return family.pipeline


def shape_of(family: Family, size: str | None) -> Shape:
    """The shape of a family at ``size`` (``None`` for pretrained families).

    Raises:
        UnknownFactError: no such size.
    """
    key = (size or "").removeprefix(NARROW)
    if key not in family.shapes:
        raise UnknownFactError(f"size of {family.name}", key, tuple(family.shapes))
    return family.shapes[key] if size is None or key == size else _narrow(family.shapes[key])


def _narrow(shape: Shape) -> Shape:
    channels = (_NARROW_WIDTH,) * len(shape.channels)
    return replace(
        shape, width=_NARROW_WIDTH, heads=min(shape.heads, 2), channels=channels, layers=min(shape.layers, 1)
    )


def sit_shape(size: str) -> tuple[Shape, int]:
    """The shape and patch size of ``B/2`` and its like.

    Raises:
        UnknownFactError: no such size.
    """
    shape = shape_of(SIT, size)
    return shape, shape.stride


def sit_down_shape(size: str) -> tuple[Shape, int]:
    """The shape and patch size of ``B/2`` and its like.

    Raises:
        UnknownFactError: no such size.
    """
    return shape_of(SIT_DOWN, size), _SIT_DOWN_PATCH
