"""How each family trained from scratch is built and tapped. Adding one is a class and a row in `BUILDERS`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import nn

from repa_lab.align.tokens import Grid, Tokens, flatten_map
from repa_lab.models.facts import BlockIndex, Shape
from repa_lab.models.sit import SiT, SiTConfig
from repa_lab.models.sit_down import SiTDown, SiTDownConfig
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

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        """Write the denoiser, and nothing else, into a folder, as its users would expect to find it."""
        ...


class SiTFamily:
    """SiT, tapped at the output of a block."""

    def build(self, size: str, shape: Shape, given: Input) -> nn.Module:
        """See :class:`FamilyBuilder`."""
        return SiT.from_size(size, given.channels, given.size, given.num_classes)

    def tap(self, denoiser: nn.Module, block_index: BlockIndex) -> Tap:
        """See :class:`FamilyBuilder`."""
        assert isinstance(denoiser, SiT)
        return _tap_block("sit", denoiser.blocks, block_index, lambda index: denoiser.grid)

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        """See :class:`FamilyBuilder`: weights and the arguments of :class:`SiTConfig`."""
        assert isinstance(denoiser, SiT)
        _export(denoiser, denoiser.config, folder)


class SiTDownFamily:
    """SiT-down, tapped at the output of a block, on the grid of the block's stage."""

    def build(self, size: str, shape: Shape, given: Input) -> nn.Module:
        """See :class:`FamilyBuilder`."""
        return SiTDown.from_size(size, given.channels, given.size, given.num_classes)

    def tap(self, denoiser: nn.Module, block_index: BlockIndex) -> Tap:
        """See :class:`FamilyBuilder`."""
        assert isinstance(denoiser, SiTDown)
        return _tap_block("sit_down", denoiser.blocks, block_index, denoiser.grid_of)

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        """See :class:`FamilyBuilder`: weights and the arguments of :class:`SiTDownConfig`."""
        assert isinstance(denoiser, SiTDown)
        _export(denoiser, denoiser.config, folder)


class UNetFamily:
    """diffusers' class-conditional UNet, tapped at its mid block."""

    def build(self, size: str, shape: Shape, given: Input) -> nn.Module:
        """See :class:`FamilyBuilder`."""
        from repa_lab.models.unet import (
            UNet,
        )  # diffusers takes two seconds to import, which a transformer need not wait for

        return UNet(shape, given.channels, given.size, given.num_classes)

    def tap(self, denoiser: nn.Module, block_index: BlockIndex) -> Tap:
        """See :class:`FamilyBuilder`."""
        if block_index != "mid":
            raise TapError(f"unet is tapped at its mid block: block_index must be 'mid', got {block_index!r}")
        to_tokens: Callable[[Any], Tokens] = flatten_map
        return Tap(denoiser.get_submodule("net.mid_block"), to_tokens)

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        """See :class:`FamilyBuilder`: a folder of diffusers' `UNet2DModel`, whose times are 1,000 times ours."""
        net: Any = denoiser.get_submodule("net")
        net.save_pretrained(folder)


def _tap_block(name: str, blocks: nn.ModuleList, index: BlockIndex, grid_of: Callable[[int], Grid]) -> Tap:
    depth = len(blocks)
    if not isinstance(index, int) or not 0 <= index < depth:
        raise TapError(f"{name} has {depth} blocks: block_index must be 0 to {depth - 1}, got {index!r}")
    grid = grid_of(index)
    return Tap(blocks[index], lambda output: Tokens(output, grid))


def _export(denoiser: nn.Module, config: SiTConfig | SiTDownConfig, folder: Path) -> None:
    save_file(denoiser.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


BUILDERS: dict[str, FamilyBuilder] = {"sit": SiTFamily(), "sit_down": SiTDownFamily(), "unet": UNetFamily()}
