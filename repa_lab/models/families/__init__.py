"""Every family that the lab knows, by name. Importing it costs no torch, so that `plan` answers in a second."""

from __future__ import annotations

from repa_lab.models.facts import SIT, SIT_DOWN, UNET, Family, UnknownFactError
from repa_lab.models.families.auraflow import AURAFLOW
from repa_lab.models.families.bria import BRIA
from repa_lab.models.families.bria_fibo import BRIA_FIBO
from repa_lab.models.families.bria_fibo2 import BRIA_FIBO2
from repa_lab.models.families.chroma import CHROMA
from repa_lab.models.families.cogview3plus import COGVIEW3PLUS
from repa_lab.models.families.cogview4 import COGVIEW4
from repa_lab.models.families.dit import DIT
from repa_lab.models.families.ernie_image import ERNIE_IMAGE
from repa_lab.models.families.flux import FLUX
from repa_lab.models.families.flux2 import FLUX2
from repa_lab.models.families.flux3 import FLUX3
from repa_lab.models.families.glm_image import GLM_IMAGE
from repa_lab.models.families.hidream import HIDREAM
from repa_lab.models.families.hunyuan_dit import HUNYUAN_DIT
from repa_lab.models.families.hunyuan_image import HUNYUAN_IMAGE
from repa_lab.models.families.ideogram4 import IDEOGRAM4
from repa_lab.models.families.kandinsky5 import KANDINSKY5
from repa_lab.models.families.kandinsky6 import KANDINSKY6
from repa_lab.models.families.kolors import KOLORS
from repa_lab.models.families.krea2 import KREA2
from repa_lab.models.families.longcat_image import LONGCAT_IMAGE
from repa_lab.models.families.lumina2 import LUMINA2
from repa_lab.models.families.lumina_next import LUMINA_NEXT
from repa_lab.models.families.nucleus_moe import NUCLEUS_MOE
from repa_lab.models.families.omnigen import OMNIGEN
from repa_lab.models.families.ovis_image import OVIS_IMAGE
from repa_lab.models.families.pixart import PIXART
from repa_lab.models.families.prx import PRX
from repa_lab.models.families.qwen_image import QWEN_IMAGE
from repa_lab.models.families.qwen_image21 import QWEN_IMAGE21
from repa_lab.models.families.sana import SANA
from repa_lab.models.families.sd3 import SD3
from repa_lab.models.families.sd15 import SD15
from repa_lab.models.families.sdxl import SDXL
from repa_lab.models.families.z_image import Z_IMAGE
from repa_lab.registry import Registry

FAMILIES: Registry[Family] = Registry("family")


def family(facts: Family) -> Family:
    """Register a family of denoisers under its name, by which ``model.family`` calls it.

    Raises:
        PluginError: the name is taken.
    """
    FAMILIES.add(facts.name, facts)
    return facts


for _facts in (
    SIT,
    UNET,
    SIT_DOWN,
    SD15,
    SDXL,
    KOLORS,
    FLUX,
    FLUX2,
    SD3,
    CHROMA,
    SANA,
    PIXART,
    HIDREAM,
    AURAFLOW,
    LUMINA2,
    QWEN_IMAGE,
    Z_IMAGE,
    DIT,
    HUNYUAN_DIT,
    COGVIEW4,
    KANDINSKY5,
    LUMINA_NEXT,
    HUNYUAN_IMAGE,
    BRIA,
    BRIA_FIBO,
    BRIA_FIBO2,
    COGVIEW3PLUS,
    OMNIGEN,
    OVIS_IMAGE,
    LONGCAT_IMAGE,
    PRX,
    ERNIE_IMAGE,
    GLM_IMAGE,
    IDEOGRAM4,
    KREA2,
    NUCLEUS_MOE,
    QWEN_IMAGE21,
    FLUX3,
    KANDINSKY6,
):
    family(_facts)

TRAINABLE = tuple(facts.name for facts in FAMILIES.values() if facts.trainable)


def family_facts(name: str) -> Family:
    """The facts of a family.

    Raises:
        UnknownFactError: no such family.
    """
    if name not in FAMILIES:
        raise UnknownFactError("family", name, FAMILIES.names)
    return FAMILIES[name]
