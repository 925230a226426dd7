"""SimpleTuner's config as data: its keys and defaults, the releases of each family, its encoders and rules.

Defaults and rules are those of SimpleTuner's registry of 2026-08-22. Where the same number means another computation in
repa-lab, `remarks` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from repa_lab.encoders.registry import ENCODERS, input_size
from repa_lab.models.family import Family
from repa_lab.registry import did_you_mean

Prefix = Literal["crepa", "urepa"]
Read = Callable[[Any], Any]


# ---- values


class UnfitError(ValueError):
    """A value that a key cannot have: what was expected, and a suggestion."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.expected, self.hint = expected, hint


@dataclass(frozen=True)
class Key:
    """A key of SimpleTuner.

    Attributes:
        name: its name in SimpleTuner.
        field: the field of a spec, as a dotted path.
        default: SimpleTuner's value if the key is left out.
        read: converts SimpleTuner's value to the field's.
        write: converts the field's value to SimpleTuner's.
    """

    name: str
    field: str
    default: Any
    read: Read
    write: Callable[[Any], Any] = lambda value: value


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def truth(value: Any) -> bool:
    """Read a boolean, also as text or as 1 and 0.

    Raises:
        UnfitError: the value is none.
    """
    known = _TRUTH.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if known is None:
        raise UnfitError("true or false")
    return known


def number(value: Any) -> float:
    """Read a finite number, also as text.

    Raises:
        UnfitError: the value is none.
    """
    try:
        result = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise UnfitError("a number")
    return result


def whole(value: Any) -> int:
    """Read an integer, also as text or with a fraction of zero.

    Raises:
        UnfitError: the value is none.
    """
    try:
        result = number(value)
    except UnfitError:
        result = math.nan
    if not result.is_integer():
        raise UnfitError("an integer")
    return int(result)


def text(value: Any) -> str:
    """Read text that is not empty.

    Raises:
        UnfitError: the value is none.
    """
    if not isinstance(value, str) or not value.strip():
        raise UnfitError("text")
    return value.strip()


def one_of(*allowed: str, **renamed: str) -> Read:
    """Return a reader of words in any case, some of them renamed; it raises UnfitError for other words."""
    words = {**{word: word for word in allowed}, **renamed}

    def read(value: Any) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in words:
            raise UnfitError(f"one of {', '.join(words)}", did_you_mean(word, words))
        return words[word]

    return read


def _or_default(read: Read, default: Any) -> Read:
    """Return a reader that replaces 0 by a default, as SimpleTuner does."""
    return lambda value: read(value) or default


def _frames(value: Any) -> int | None:
    frames = whole(value)
    return frames if frames > 0 else None


# ---- encoders

_ENCODER_NAMES = {
    "dino_v2_g": "dinov2_vitg14",
    "dinov2_g": "dinov2_vitg14",
    "dinov2-vitg14": "dinov2_vitg14",
    "dino_v2_s": "dinov2_vits14",
    "dinov2_s": "dinov2_vits14",
    "dinov2-vitb14": "dinov2_vitb14",
}
HUB_ENCODERS = tuple(f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg"))
_HUB_STRIDE = 14  # of all encoders that SimpleTuner has
_LATENT_STRIDE = 8  # of the latents that a family trained from scratch is given


def is_language_model(encoder: str) -> bool:
    """Return whether an encoder is one of SimpleTuner's vision-language models."""
    return "qwen" in encoder.lower() and "vl" in encoder.lower()


def _encoder(value: Any) -> str:
    name = text(value)
    known = name.lower()
    return _ENCODER_NAMES.get(known, known if known in HUB_ENCODERS else name)


def _pixels(value: Any) -> str:
    return "tae" if truth(value) else "vae"


def _stride(encoder: str) -> int:
    return ENCODERS[encoder].stride if encoder in ENCODERS else _HUB_STRIDE


def encoder_pixels(encoder: str, image_size: int | None, pixels: int) -> int:
    """Return the side in pixels of an encoder's input; the papers' rule applies without ``image_size``."""
    return input_size(_stride(encoder), (pixels, pixels), image_size)[0]


def encoder_grid(encoder: str, image_size: int) -> int:
    """Return the number of tokens of an encoder along each side of its input."""
    return image_size // _stride(encoder)


def student_grid(family: Family, size: str | None, pixels: int, latents: bool = True) -> int:
    """Return the number of tokens of a denoiser along each side of a square image.

    Args:
        family: the family's facts.
        size: of a family that is trained from scratch.
        pixels: side of the image.
        latents: whether a family without latents of its own is given latents.
    """
    cell = _LATENT_STRIDE if latents and family.latent_stride == 1 else family.latent_stride
    return pixels // (cell * family.shapes[size or ""].stride)


def shrinking_side(student: int, encoder: int) -> str:
    """Return SimpleTuner's rule as a ``resample.side``: the larger grid shrinks to the smaller."""
    return "teacher" if encoder > student else "student"


# ---- keys


def _shared(prefix: Prefix, encoder: str) -> tuple[Key, ...]:
    """Return the keys that both regularizers have."""
    schedule, scheduler = "regularizer.schedule", one_of("constant", "linear", "cosine", "polynomial")
    mode = one_of("permanent", "recoverable")
    return (
        Key(f"{prefix}_lambda", "regularizer.weight", 0.5, number),
        Key(encoder, "regularizer.encoder.name", "dinov2_vitg14", _encoder),
        Key(f"{prefix}_encoder_image_size", "regularizer.encoder.image_size", 518, _or_default(whole, 518)),
        Key(f"{prefix}_use_tae", "regularizer.encoder.pixels", False, _pixels, lambda pixels: pixels == "tae"),
        Key(f"{prefix}_scheduler", f"{schedule}.type", "constant", scheduler),
        Key(f"{prefix}_warmup_steps", f"{schedule}.warmup_steps", 0, whole),
        Key(f"{prefix}_decay_steps", f"{schedule}.decay_steps", 0, whole),
        Key(f"{prefix}_lambda_end", f"{schedule}.end", 0.0, number),
        Key(f"{prefix}_power", f"{schedule}.power", 1.0, _or_default(number, 1.0)),
        Key(f"{prefix}_cutoff_step", f"{schedule}.cutoff_step", 0, _or_default(whole, None), lambda step: step or 0),
        Key(f"{prefix}_similarity_threshold", f"{schedule}.similarity_threshold", None, number),
        Key(f"{prefix}_similarity_ema_decay", f"{schedule}.similarity_ema_decay", 0.99, number),
        Key(f"{prefix}_threshold_mode", f"{schedule}.threshold_mode", "permanent", mode),
    )


KEYS: Mapping[Prefix, tuple[Key, ...]] = {
    "crepa": (
        Key("crepa_block_index", "regularizer.block_index", 8, whole),
        Key("crepa_spatial_align", "regularizer.spatial_align", True, truth),
        *_shared("crepa", "crepa_encoder"),
        Key("crepa_encoder_frames_batch_size", "run.encoder_batch_size", -1, _frames),
    ),
    "urepa": (
        Key("urepa_manifold_weight", "regularizer.manifold_weight", 3.0, number),
        *_shared("urepa", "urepa_model"),
    ),
}
IREPA = (
    Key("irepa_spatial_norm_alpha", "regularizer.spatial_norm", 0.6, number),
    Key("irepa_projector_kernel_size", "regularizer.projector.kernel", 3, whole),
)
# Keys that set one field each of a whole spec.
REST = (
    Key("pretrained_model_name_or_path", "model.pretrained", None, text),
    Key("model_type", "model.train", "full", one_of("full", "lora")),
    Key("lora_rank", "model.rank", 16, whole),
    Key("pretrained_vae_model_name_or_path", "data.vae", None, text),
    Key("max_train_steps", "train.steps", None, _or_default(whole, None)),
    Key("learning_rate", "train.lr", 4e-7, number),
    Key("adam_weight_decay", "train.weight_decay", 0.01, number),
    Key("caption_dropout_probability", "train.label_dropout", 0.0, number),
    Key("max_grad_norm", "train.grad_clip", 2.0, _or_default(number, None)),
    Key("mixed_precision", "run.precision", "bf16", one_of("bf16", "fp16", no="fp32")),
    Key("gradient_checkpointing", "run.gradient_checkpointing", True, truth),
    Key("checkpoint_step_interval", "run.checkpoint_every", None, _or_default(whole, None)),
)
# Keys of which several decide a field together.
PARTS = (
    Key("model_family", "model.family", None, text),
    Key("model_flavour", "model.pretrained", None, text),
    Key("lora_alpha", "model.rank", None, number),
    Key("data_backend_config", "data.path", None, text),
    Key("train_batch_size", "train.batch_size", 4, whole),
    Key("gradient_accumulation_steps", "train.batch_size", 1, whole),
    Key("resolution", "data.resolution", 1024, number),
    Key("resolution_type", "data.resolution", "pixel_area", one_of("pixel", "area", "pixel_area")),
    Key("use_ema", "train.ema", False, truth),
    Key("ema_decay", "train.ema", 0.995, number),
    Key("seed", "seeds", None, whole),
    Key("validation_num_inference_steps", "evaluate.sampler.steps", None, whole),
    Key("validation_guidance", "evaluate.guidance.scale", None, number),
)
# Keys of an image data set in the file that `data_backend_config` names; the first two override those of the config.
DATA_SET = (
    Key("resolution", "data.resolution", None, number),
    Key("resolution_type", "data.resolution", None, one_of("pixel", "area", "pixel_area")),
    Key("instance_data_dir", "data.path", None, text),
    Key("crop", "data.buckets", None, truth),
    Key("crop_aspect", "data.buckets", None, one_of("square", "preserve", "random", "closest")),
)
SWITCHES = tuple(Key(f"{prefix}_enabled", "regularizer.type", False, truth) for prefix in ("crepa", "urepa", "irepa"))
# SimpleTuner's documentation has this key, its parser refuses it; if it is given, it wins over crepa_encoder.
CREPA_MODEL = Key("crepa_model", "regularizer.encoder.name", None, _encoder)
ALIASES = {"checkpointing_steps": "checkpoint_step_interval"}
READABLE = {key.name: key for key in (*KEYS["crepa"], *KEYS["urepa"], *IREPA, *REST, *PARTS, *SWITCHES, CREPA_MODEL)}

_VIDEO = "it relates the frames of a video; an image has one"
_BACKBONE = "repa-lab aligns with a frozen encoder, not with the denoiser's own features"
_SELF_FLOW = "repa-lab has no self-flow: it aligns with a frozen encoder, not with the denoiser's own average"
_LAYERSYNC = "LayerSync is another regularizer, between two blocks of the denoiser"
# Keys without a field in a spec, with the reason; nothing is lost at the values in HARMLESS.
NOT_CARRIED: Mapping[str, str] = {
    "crepa_adjacent_distance": _VIDEO,
    "crepa_adjacent_tau": _VIDEO,
    "crepa_cumulative_neighbors": _VIDEO,
    "crepa_normalize_by_frames": _VIDEO,
    "crepa_normalize_neighbour_sum": _VIDEO,
    "crepa_drop_vae_encoder": "it saves memory there; here latents are cached and the VAE is not kept",
    "crepa_feature_source": _BACKBONE,
    "crepa_use_backbone_features": _BACKBONE,
    "crepa_self_flow": _SELF_FLOW,
    "crepa_teacher_block_index": _BACKBONE,
    "crepa_self_flow_mask_ratio": _SELF_FLOW,
    "layersync_enabled": _LAYERSYNC,
    "layersync_student_block": _LAYERSYNC,
    "layersync_teacher_block": _LAYERSYNC,
    "layersync_lambda": _LAYERSYNC,
    "lora_type": "repa-lab trains PEFT's LoRA; SimpleTuner's LyCORIS is another adapter, and trains no projector",
}
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "crepa_drop_vae_encoder": ("false",),
    "crepa_feature_source": ("encoder", "external"),
    "crepa_use_backbone_features": ("false",),
    "crepa_self_flow": ("false",),
    "layersync_enabled": ("false",),
    "lora_type": ("standard",),
}

STAND_IN_STEPS = 5000  # for a config that counts epochs
SAMPLING_STEPS = 30  # SimpleTuner's default of validation_num_inference_steps


# ---- families and their releases

# SimpleTuner's names of families that have another name in repa-lab.
FAMILY_NAMES = {"sd1x": "sd15", "pixart_sigma": "pixart", "kandinsky5_image": "kandinsky5", "ernie": "ernie_image"}
_TAESDXL, _TAEF1 = "madebyollin/taesdxl", "madebyollin/taef1"
# Tiny autoencoders for the latents of each family.
TINY_AUTOENCODERS = {
    "sd15": "madebyollin/taesd",
    **dict.fromkeys(("sdxl", "kolors", "pixart", "auraflow"), _TAESDXL),
    "sd3": "madebyollin/taesd3",
    **dict.fromkeys(("flux", "chroma", "hidream", "lumina2", "z_image", "longcat_image"), _TAEF1),
}
# The largest max_grad_norm that SimpleTuner allows for a family.
GRAD_CLIP_CAPS = {"pixart": 0.01}
# Families whose loader in SimpleTuner never starts the regularizer: a run with a regularizer is a baseline.
NEVER_ATTACHED = ("sdxl", "kolors", "pixart")

_EDITS = "it edits images, and repa-lab trains text to image"
_REFINER = "a refiner takes images and other texts than the base model, so repa-lab does not train it"
_KLEIN = "its pipeline, Flux2KleinPipeline, reads texts with another language model; repa-lab trains Flux2Pipeline"
_STAGE = "it is trained on one part of the noise levels, and repa-lab trains on all of them"
# Flavours (releases that ``model_flavour`` names) as hub ids. The first stands in if a config names none: SimpleTuner's
# default, if repa-lab trains it.
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
# Flavours that repa-lab does not train, with the reason.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "sd15": {"realvis": "it is RealVisXL, an SDXL model; use model_family sdxl and pretrained_model_name_or_path"},
    "sdxl": dict.fromkeys(("refiner-1.0", "refiner-0.9"), _REFINER),
    "flux": {
        "kontext": _EDITS,
        "libreflux": "it masks the padding of texts (flux_attention_masked_training), which repa-lab does not",
    },
    "flux2": dict.fromkeys(("klein-9b", "klein-4b"), _KLEIN),
    "pixart": dict.fromkeys(("900M-1024-v0.7-stage1", "900M-1024-v0.7-stage2"), _STAGE),
    "qwen_image": dict.fromkeys(("edit-v1", "edit-v2", "edit-v2+", "edit-v3"), _EDITS),
    "z_image": {
        "ostris-de-turbo": "its transformer is in a repository of its own, ostris/Z-Image-De-Turbo, and "
        "model.pretrained names a whole pipeline"
    },
    "kandinsky5": dict.fromkeys(("i2i-lite-sft", "i2i-lite-pretrain"), _EDITS),
    "longcat_image": {"edit": _EDITS},
}
# Families whose default flavour in SimpleTuner is not trained by repa-lab.
OTHER_DEFAULTS = {"flux2": "klein-9b"}
# Flavours of which SimpleTuner trains a LoRA beside a frozen assistant LoRA, which keeps them distilled.
ASSISTED = {("flux", "schnell"), ("z_image", "turbo"), ("z_image", "turbo-ostris-v2"), ("ernie_image", "turbo")}
# Numbers of blocks of releases that differ from the release that the family's facts describe.
BLOCKS = {
    "stabilityai/stable-diffusion-3.5-large": 38,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": 28,
    "Efficient-Large-Model/Sana_600M_512px_diffusers": 28,
}


def find_flavour(family: str, name: str) -> str | None:
    """Return a flavour, named in any case, as SimpleTuner spells it; None if the family has no such flavour."""
    known = {flavour.lower(): flavour for flavour in (*FLAVOURS.get(family, ()), *REFUSED.get(family, ()))}
    return known.get(name.lower())
