"""SimpleTuner's flavours: the releases of a family that ``model_flavour`` names, as hub ids for ``model.pretrained``.

As of SimpleTuner's models of 2026-08. Flavours that the lab does not train are in `REFUSED`, each with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping

_EDITS = "it edits images, and the lab trains text to image"
_REFINER = "a refiner takes images and other texts than the base model, so the lab does not train it"
_KLEIN = "its pipeline, Flux2KleinPipeline, reads texts with another language model; the lab trains Flux2Pipeline"
_STAGE = "it is trained on one part of the noise levels, and the lab trains on all of them"

# Flavour to hub id; the first one stands in where a config names none: SimpleTuner's default, if the lab trains it.
FLAVOURS: Mapping[str, Mapping[str, str]] = {
    "sd15": {
        "dreamshaper": "Lykon/dreamshaper-8",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "1.4": "CompVis/stable-diffusion-v1-4",
    },
    "sdxl": {
        "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
        "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
    },
    "kolors": {"1.0": "terminusresearch/kwai-kolors-1.0"},
    "flux": {
        "krea": "black-forest-labs/FLUX.1-Krea-dev",
        "dev": "black-forest-labs/FLUX.1-dev",
        "schnell": "black-forest-labs/FLUX.1-schnell",
        "fluxbooru": "terminusresearch/fluxbooru-v0.3",
    },
    "flux2": {"dev": "black-forest-labs/FLUX.2-dev"},
    "sd3": {
        "medium": "stabilityai/stable-diffusion-3.5-medium",
        "large": "stabilityai/stable-diffusion-3.5-large",
    },
    "chroma": {
        "base": "lodestones/Chroma1-Base",
        "hd": "lodestones/Chroma1-HD",
        "flash": "lodestones/Chroma1-Flash",
    },
    "sana": {
        "sana1.5-4.8b-1024": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
        "sana1.5-1.6b-1024": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "sana1.0-1.6b-2048": "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers",
        "sana1.0-1.6b-1024": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "sana1.0-600m-1024": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
        "sana1.0-600m-512": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    },
    "pixart": {
        "900M-1024-v0.6": "terminusresearch/pixart-900m-1024-ft-v0.6",
        "600M-512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
        "600M-1024": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "600M-2048": "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS",
    },
    "hidream": {
        "full": "HiDream-ai/HiDream-I1-Full",
        "dev": "HiDream-ai/HiDream-I1-Dev",
        "fast": "HiDream-ai/HiDream-I1-Fast",
    },
    "auraflow": {
        "v0.3": "terminusresearch/auraflow-v0.3",
        "v0.2": "fal/AuraFlow-v0.2",
        "v0.1": "fal/AuraFlow",
        "pony": "purplesmartai/pony-v7-base",
    },
    "lumina2": {"2.0": "Alpha-VLLM/Lumina-Image-2.0", "neta-lumina": "terminusresearch/neta-lumina-v1"},
    "qwen_image": {"v2.0": "Qwen/Qwen-Image-2512", "v1.0": "Qwen/Qwen-Image"},
    "z_image": {
        "turbo-ostris-v2": "Tongyi-MAI/Z-Image-Turbo",
        "turbo": "Tongyi-MAI/Z-Image-Turbo",
        "base": "Tongyi-MAI/Z-Image",
    },
    "kandinsky5": {
        "t2i-lite-sft": "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
        "t2i-lite-pretrain": "kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers",
    },
    "krea2": {"raw": "krea/Krea-2-Raw", "turbo": "krea/Krea-2-Turbo"},
    "ernie_image": {"base": "baidu/ERNIE-Image", "turbo": "baidu/ERNIE-Image-Turbo"},
    "longcat_image": {"final": "meituan-longcat/LongCat-Image", "dev": "meituan-longcat/LongCat-Image-Dev"},
}
REFUSED: Mapping[str, Mapping[str, str]] = {
    "sd15": {"realvis": "it is RealVisXL, an SDXL model; use model_family sdxl and pretrained_model_name_or_path"},
    "sdxl": dict.fromkeys(("refiner-1.0", "refiner-0.9"), _REFINER),
    "flux": {
        "kontext": _EDITS,
        "libreflux": "it masks the padding of texts (flux_attention_masked_training), which the lab does not",
    },
    "flux2": dict.fromkeys(("klein-9b", "klein-4b"), _KLEIN),
    "pixart": dict.fromkeys(("900M-1024-v0.7-stage1", "900M-1024-v0.7-stage2"), _STAGE),
    "qwen_image": dict.fromkeys(("edit-v1", "edit-v2", "edit-v2+", "edit-v3"), _EDITS),
    "z_image": {
        "ostris-de-turbo": "its transformer is in a repository of its own, ostris/Z-Image-De-Turbo, and model.pretrained"
        " names a whole pipeline"
    },
    "kandinsky5": dict.fromkeys(("i2i-lite-sft", "i2i-lite-pretrain"), _EDITS),
    "longcat_image": {"edit": _EDITS},
}
# Families whose default flavour there is one that the lab does not train.
OTHER_DEFAULTS = {"flux2": "klein-9b"}
# Flavours that SimpleTuner trains a LoRA of beside a frozen assistant LoRA, which keeps them distilled.
ASSISTED = {("flux", "schnell"), ("z_image", "turbo"), ("z_image", "turbo-ostris-v2"), ("ernie_image", "turbo")}
# Blocks of releases that have other ones than the release that the family's facts describe, where they are known.
BLOCKS = {
    "stabilityai/stable-diffusion-3.5-large": 38,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": 28,
    "Efficient-Large-Model/Sana_600M_512px_diffusers": 28,
}


def find_flavour(family: str, name: str) -> str | None:
    """Return a flavour, named in any case, as SimpleTuner spells it; None if the family has no such flavour."""
    known = {flavour.lower(): flavour for flavour in (*FLAVOURS.get(family, ()), *REFUSED.get(family, ()))}
    return known.get(name.lower())
