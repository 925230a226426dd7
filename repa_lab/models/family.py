"""How each trainable family is built and tapped. A family is an object: adding one is a class and a row in `BUILDERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from repa_lab.align.tokens import Tokens, flatten_map
from repa_lab.models.facts import BlockIndex, Shape
from repa_lab.models.sit import SiT
from repa_lab.models.tap import Tap, TapError


@dataclass(frozen=True)
class Input:
    """What the denoiser sees: channels, ``(height, width)`` of image or latent, number of classes without the null label."""

    channels: int
    size: tuple[int, int]
    num_classes: int


class FamilyBuilder(Protocol):
    """What a family can do; its facts stand in `facts`."""

    def build(self, size: str, shape: Shape, given: Input) -> nn.Module:
        """A freshly initialised denoiser with ``forward(x, t, y) -> velocity``."""
        ...

    def tap(self, denoiser: nn.Module, block_index: BlockIndex) -> Tap:
        """Hook the block ``block_index`` of the denoiser.

        Raises:
            TapError: there is no such block.
        """
        ...


class SiTFamily:
    """SiT, tapped at the output of a block."""

    def build(self, size: str, shape: Shape, given: Input) -> nn.Module:
        """See :class:`FamilyBuilder`."""
        return SiT.from_size(size, given.channels, given.size, given.num_classes)

    def tap(self, denoiser: nn.Module, block_index: BlockIndex) -> Tap:
        """See :class:`FamilyBuilder`."""
        assert isinstance(denoiser, SiT)
        depth, grid = len(denoiser.blocks), denoiser.grid
        if not isinstance(block_index, int) or not 0 <= block_index < depth:
            raise TapError(f"sit has {depth} blocks: block_index must be 0 to {depth - 1}, got {block_index!r}")
        return Tap(denoiser.blocks[block_index], lambda output: Tokens(output, grid))


class UNetFamily:
    """diffusers' class-conditional UNet, tapped at its mid block."""

    def build(self, size: str, shape: Shape, given: Input) -> nn.Module:
        """See :class:`FamilyBuilder`."""
        from repa_lab.models.unet import UNet  # diffusers takes two seconds to import, which a transformer need not wait for

        return UNet(shape, given.channels, given.size, given.num_classes)

    def tap(self, denoiser: nn.Module, block_index: BlockIndex) -> Tap:
        """See :class:`FamilyBuilder`."""
        if block_index != "mid":
            raise TapError(f"unet is tapped at its mid block: block_index must be 'mid', got {block_index!r}")
        to_tokens: Callable[[Any], Tokens] = flatten_map
        return Tap(denoiser.get_submodule("net.mid_block"), to_tokens)


BUILDERS: dict[str, FamilyBuilder] = {"sit": SiTFamily(), "unet": UNetFamily()}
