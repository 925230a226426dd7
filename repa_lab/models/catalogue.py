"""The table of families: what `repa-lab families` prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repa_lab.models.facts import BlockIndex, Family, Shape
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import BUILDERS, Input

_SCRATCH_PIXELS = 256
_SCRATCH_INPUT = Input(4, (32, 32), 1000)


@dataclass(frozen=True)
class Entry:
    """One family, or one size of a family that is trained from scratch.

    Attributes:
        family: its name in a spec, with the size.
        regularizer: those that fit, the suggested one first.
        blocks: how many ``block_index`` counts.
        width: D of a tapped token.
        block_index: the suggested one.
        pixels: along each side of the image that the grid is for.
        grid: tapped tokens (height, width) for such an image.
        parameters: of the denoiser.
        use: `from scratch` or `pretrained`: how the lab trains the family.
    """

    family: str
    regularizer: str
    blocks: int
    width: int
    block_index: BlockIndex
    pixels: int
    grid: tuple[int, int]
    parameters: int
    use: str


def catalogue() -> list[Entry]:
    """Every family, those of diffusers as released; SiT with patch 2 and the UNet over latents of 256 px images."""
    return [entry for family in FAMILIES.values() for entry in _entries(family)]


def _entries(family: Family) -> list[Entry]:
    if family.network is not None:
        pixels, shape = family.network.native, family.shapes[""]
        side = pixels // family.latent_stride // shape.stride
        return [_entry(family.name, family, shape, pixels, side, family.network.parameters)]
    sizes = {size: shape for size, shape in family.shapes.items() if not size.endswith(("/4", "/8"))}
    return [_from_scratch(family, size, shape) for size, shape in sizes.items()]


def _from_scratch(family: Family, size: str, shape: Shape) -> Entry:
    with torch.device("meta"):
        denoiser = BUILDERS[family.name].build(size, shape, _SCRATCH_INPUT)
    side = _SCRATCH_INPUT.size[0] // shape.stride
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return _entry(f"{family.name} {size}", family, shape, _SCRATCH_PIXELS, side, parameters)


def _entry(name: str, family: Family, shape: Shape, pixels: int, side: int, parameters: int) -> Entry:
    grid = (side, side)
    use = "from scratch" if family.from_scratch else "pretrained"
    return Entry(
        name, ", ".join(family.regularizers), shape.depth, shape.width, shape.block, pixels, grid, parameters, use
    )
