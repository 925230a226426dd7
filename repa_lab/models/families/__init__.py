"""Every family that repa-lab knows, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from repa_lab.models.families.auraflow import AURAFLOW
from repa_lab.models.families.chroma import CHROMA
from repa_lab.models.families.cogview4 import COGVIEW4
from repa_lab.models.families.dit import DIT
from repa_lab.models.families.ernie_image import ERNIE_IMAGE
from repa_lab.models.families.flux import FLUX
from repa_lab.models.families.flux2 import FLUX2
from repa_lab.models.families.hidream import HIDREAM
from repa_lab.models.families.hunyuan_dit import HUNYUAN_DIT
from repa_lab.models.families.kandinsky5 import KANDINSKY5
from repa_lab.models.families.kolors import KOLORS
from repa_lab.models.families.krea2 import KREA2
from repa_lab.models.families.longcat_image import LONGCAT_IMAGE
from repa_lab.models.families.ltxvideo import LTXVIDEO
from repa_lab.models.families.lumina2 import LUMINA2
from repa_lab.models.families.pixart import PIXART
from repa_lab.models.families.qwen_image import QWEN_IMAGE
from repa_lab.models.families.sana import SANA
from repa_lab.models.families.sd3 import SD3
from repa_lab.models.families.sd15 import SD15
from repa_lab.models.families.sdxl import SDXL
from repa_lab.models.families.wan import WAN
from repa_lab.models.families.z_image import Z_IMAGE
from repa_lab.models.family import SIT, SIT_DOWN, UNET, BlockIndex, Family
from repa_lab.models.flops import forward_of
from repa_lab.registry import Registry

FAMILIES: Registry[Family] = Registry("family")


def family(facts: Family) -> Family:
    """Register a family of denoisers under its name, which a spec gives as ``model.family``.

    Raises:
        PluginError: the name is taken.
    """
    FAMILIES.add(facts.name, facts)
    return facts


for _facts in (
    *(SIT, UNET, SIT_DOWN),
    *(SD15, SDXL, KOLORS),
    *(FLUX, FLUX2, SD3, CHROMA, SANA, PIXART, HIDREAM, AURAFLOW, LUMINA2, QWEN_IMAGE, Z_IMAGE),
    *(DIT, HUNYUAN_DIT, COGVIEW4, KANDINSKY5, LONGCAT_IMAGE, ERNIE_IMAGE, KREA2),
    *(WAN, LTXVIDEO),
):
    family(_facts)


@dataclass(frozen=True)
class Entry:
    """A row of `repa-lab families`: a pretrained family, or one size of a family that is trained from scratch.

    Attributes:
        family: name in a spec, with the size.
        regularizer: the suggested one.
        blocks: number of blocks that ``block_index`` counts.
        width: width D of a tapped token.
        block_index: the suggested one.
        pixels: side of the image for which ``grid`` is given.
        grid: height and width of the tapped tokens of such an image.
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


_SCRATCH_PIXELS, _SCRATCH_STRIDE, _SCRATCH_CHANNELS, _SCRATCH_CLASSES = 256, 8, 4, 1000


def catalogue() -> list[Entry]:
    """Return the rows: SiT with patch 2, SiT-down and the UNet over latents of 256 px, and every released family."""
    return [
        _entry(facts, size) for facts in FAMILIES.values() for size in facts.shapes if not size.endswith(("/4", "/8"))
    ]


def _entry(facts: Family, size: str) -> Entry:
    shape, network = facts.shapes[size], facts.network
    pixels = network.native if network else _SCRATCH_PIXELS
    side = pixels // (facts.latent_stride if network else _SCRATCH_STRIDE) // shape.stride
    if network:
        parameters = network.parameters
    else:
        parameters = forward_of(facts, size, side**2, _SCRATCH_CHANNELS, _SCRATCH_CLASSES).parameters
    return Entry(
        family=f"{facts.name} {size}".strip(),
        regularizer=facts.regularizer,
        blocks=shape.depth,
        width=shape.width,
        block_index=shape.block,
        pixels=pixels,
        grid=(side, side),
        parameters=parameters,
        use="pretrained" if network else "from scratch",
    )
