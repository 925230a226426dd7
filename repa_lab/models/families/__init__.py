"""Every family that the lab knows, by name. Importing it costs no torch, so that `plan` answers in a second."""

from __future__ import annotations

from repa_lab.models.facts import SIT, UNET, Family, Shape, UnknownFactError
from repa_lab.models.families.flux import FLUX
from repa_lab.models.families.sd3 import SD3
from repa_lab.models.families.sdxl import SDXL


def _transformer(
    name: str, depth: int, width: int, block: int = 8, stride: int = 2, latent_stride: int = 8
) -> Family:
    return Family(name, "transformer", {"": Shape(depth, width, stride, block)}, latent_stride=latent_stride)


def _mid_block(name: str, stride: int) -> Family:
    return Family(name, "unet", {"": Shape(1, 1280, stride, "mid")})


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        SIT,
        UNET,
        _mid_block("sd15", stride=8),
        SDXL,
        _mid_block("kolors", stride=4),
        FLUX,
        _transformer("flux2", 56, 6144),
        SD3,
        _transformer("chroma", 57, 3072),
        _transformer("sana", 20, 2240, block=10, stride=1, latent_stride=32),
        _transformer("pixart", 28, 1152, block=10),
        _transformer("hidream", 48, 2560),
        _transformer("auraflow", 36, 3072),
        _transformer("lumina2", 26, 2304),
    )
}

TRAINABLE = tuple(family.name for family in FAMILIES.values() if family.trainable)


def family_facts(name: str) -> Family:
    """The facts of a family.

    Raises:
        UnknownFactError: no such family.
    """
    if name not in FAMILIES:
        raise UnknownFactError("family", name, tuple(FAMILIES))
    return FAMILIES[name]
