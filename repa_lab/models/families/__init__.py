"""Every family that repa-lab knows, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from repa_lab.models.family import SIT, SIT_DOWN, UNET, BlockIndex, Family
from repa_lab.models.flops import forward_of
from repa_lab.registry import Registry

FAMILIES: Registry[Family] = Registry("family")


def family(facts: Family) -> Family:
    """Register a family of denoisers under its name, which a spec gives as ``model.family``, or raise a PluginError."""
    FAMILIES.add(facts.name, facts)
    return facts


# A released family `sd15` is the constant SD15 of the file sd15.py.
_RELEASED = (
    *("sd15", "sdxl", "kolors"),
    *("flux", "flux2", "sd3", "chroma", "sana", "pixart", "hidream", "auraflow", "lumina2", "qwen_image", "z_image"),
    *("dit", "hunyuan_dit", "cogview4", "kandinsky5", "longcat_image", "ernie_image", "krea2"),
    *("wan", "ltxvideo"),
)
for _facts in (SIT, UNET, SIT_DOWN):
    family(_facts)
for _name in _RELEASED:
    family(getattr(import_module(f"{__name__}.{_name}"), _name.upper()))


@dataclass(frozen=True)
class Entry:
    """A row of `repa-lab families`: a pretrained family, or one size of a family that is trained from scratch.

    Attributes:
        family: name in a spec, with the size.
        blocks: number of blocks that ``block_index`` counts.
        width: width D of a tapped token.
        block_index: the suggested one, as is the ``regularizer``.
        pixels: side of the image for which ``grid`` is given, the height and width of its tapped tokens.
        parameters: number of parameters of the denoiser.
        use: `from scratch` or `pretrained`.
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
    """Return the rows: SiT with patch 2, SiT-down and the UNet over latents of 256 px, and every released family."""
    return [
        _entry(facts, size) for facts in FAMILIES.values() for size in facts.shapes if not size.endswith(("/4", "/8"))
    ]


def _entry(facts: Family, size: str) -> Entry:
    shape, pixels, stride = facts.shapes[size], 256, 8
    if facts.network:
        pixels, stride = facts.network.native, facts.latent_stride
    side = pixels // stride // shape.stride
    return Entry(
        family=f"{facts.name} {size}".strip(),
        regularizer=facts.regularizer,
        blocks=shape.depth,
        width=shape.width,
        block_index=shape.block,
        pixels=pixels,
        grid=(side, side),
        parameters=forward_of(facts, size, side**2, channels=4, classes=1000).parameters,
        use="pretrained" if facts.network else "from scratch",
    )
