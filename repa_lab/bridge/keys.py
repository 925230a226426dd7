"""SimpleTuner's keys, as data: what each is called here, how it is read and written, and what it is when it is left
out.

Defaults and rules are those of SimpleTuner's registry (2026-08-22). What it computes with them differs from the lab in
places; `DIFFERENCES` in `remarks` says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from repa_lab.registry import did_you_mean

Prefix = Literal["crepa", "urepa"]
Read = Callable[[Any], Any]


class UnfitError(ValueError):
    """A value that a key cannot have: what it can, and a suggestion."""

    def __init__(self, wish: str, hint: str = "") -> None:
        super().__init__(wish)
        self.wish, self.hint = wish, hint


@dataclass(frozen=True)
class Key:
    """One key: its name there, its dotted path here, its value there when it is left out, and the ways between the two."""

    name: str
    field: str
    default: Any
    read: Read
    write: Callable[[Any], Any] = lambda value: value


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def truth(value: Any) -> bool:
    """True or false, also as text or as 1 and 0.

    Raises:
        UnfitError: it is neither.
    """
    known = _TRUTH.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if known is None:
        raise UnfitError("true or false")
    return known


def number(value: Any) -> float:
    """A finite number, also as text.

    Raises:
        UnfitError: it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UnfitError("a number")
    return found


def whole(value: Any) -> int:
    """A whole number, also as text or with a fraction of zero.

    Raises:
        UnfitError: it is none.
    """
    try:
        found = number(value)
    except UnfitError:
        found = math.nan
    if not found.is_integer():
        raise UnfitError("an integer")
    return int(found)


def text(value: Any) -> str:
    """Text that is not empty.

    Raises:
        UnfitError: it is something else.
    """
    if not isinstance(value, str) or not value.strip():
        raise UnfitError("text")
    return value.strip()


def one_of(*allowed: str, **renamed: str) -> Read:
    """Return a reader of words in any case, some of which have another name here; it raises UnfitError for other words."""
    words = {**{word: word for word in allowed}, **renamed}

    def read(value: Any) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in words:
            raise UnfitError(f"one of {', '.join(words)}", did_you_mean(word, words))
        return words[word]

    return read


def _or_default(read: Read, default: Any) -> Read:
    """A reader for which 0 means something else, as it does in SimpleTuner."""
    return lambda value: read(value) or default


def _frames(value: Any) -> int | None:
    found = whole(value)
    return found if found > 0 else None


# Its other names for the encoders that torch hub has.
_ENCODER_NAMES = {
    "dino_v2_g": "dinov2_vitg14",
    "dinov2_g": "dinov2_vitg14",
    "dinov2-vitg14": "dinov2_vitg14",
    "dino_v2_s": "dinov2_vits14",
    "dinov2_s": "dinov2_vits14",
    "dinov2-vitb14": "dinov2_vitb14",
}
HUB_ENCODERS = tuple(f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg"))


def is_language_model(encoder: str) -> bool:
    """Whether an encoder is one of its vision-language models."""
    return "qwen" in encoder.lower() and "vl" in encoder.lower()


def _encoder(value: Any) -> str:
    name = text(value)
    known = name.lower()
    return _ENCODER_NAMES.get(known, known if known in HUB_ENCODERS else name)


def _pixels(value: Any) -> str:
    return "tae" if truth(value) else "vae"


def _shared(prefix: Prefix, encoder: str) -> tuple[Key, ...]:
    """The keys that both regularizers have."""
    schedule = "regularizer.schedule"
    return (
        Key(f"{prefix}_lambda", "regularizer.weight", 0.5, number),
        Key(encoder, "regularizer.encoder.name", "dinov2_vitg14", _encoder),
        Key(f"{prefix}_encoder_image_size", "regularizer.encoder.image_size", 518, _or_default(whole, 518)),
        Key(f"{prefix}_use_tae", "regularizer.encoder.pixels", False, _pixels, lambda pixels: pixels == "tae"),
        Key(
            f"{prefix}_scheduler", f"{schedule}.type", "constant", one_of("constant", "linear", "cosine", "polynomial")
        ),
        Key(f"{prefix}_warmup_steps", f"{schedule}.warmup_steps", 0, whole),
        Key(f"{prefix}_decay_steps", f"{schedule}.decay_steps", 0, whole),
        Key(f"{prefix}_lambda_end", f"{schedule}.end", 0.0, number),
        Key(f"{prefix}_power", f"{schedule}.power", 1.0, _or_default(number, 1.0)),
        Key(f"{prefix}_cutoff_step", f"{schedule}.cutoff_step", 0, _or_default(whole, None), lambda step: step or 0),
        Key(f"{prefix}_similarity_threshold", f"{schedule}.similarity_threshold", None, number),
        Key(f"{prefix}_similarity_ema_decay", f"{schedule}.similarity_ema_decay", 0.99, number),
        Key(f"{prefix}_threshold_mode", f"{schedule}.threshold_mode", "permanent", one_of("permanent", "recoverable")),
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
# What a whole spec needs besides, key by key.
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
# What several keys decide together.
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
# Other names of a key.
ALIASES = {"checkpointing_steps": "checkpoint_step_interval"}
SWITCHES = tuple(Key(f"{prefix}_enabled", "regularizer.type", False, truth) for prefix in ("crepa", "urepa", "irepa"))

_VIDEO = "it relates the frames of a video; an image has one"
_BACKBONE = "the lab aligns with a frozen encoder, not with the denoiser's own features"
_SELF_FLOW = "the lab has no self-flow: it aligns with a frozen encoder, not with the denoiser's own average"
_LAYERSYNC = "LayerSync is another regularizer, between two blocks of the denoiser"
# Keys that a spec has no place for, and why; at the values of HARMLESS nothing is lost.
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
    "lora_type": "the lab trains PEFT's LoRA; SimpleTuner's LyCORIS is another adapter, beside which it trains no projector",
}
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "crepa_drop_vae_encoder": ("false",),
    "crepa_feature_source": ("encoder", "external"),
    "crepa_use_backbone_features": ("false",),
    "crepa_self_flow": ("false",),
    "layersync_enabled": ("false",),
    "lora_type": ("standard",),
}
# Documented there, though its own parser refuses it; where it is read, it wins over crepa_encoder.
CREPA_MODEL = Key("crepa_model", "regularizer.encoder.name", None, _encoder)

# For a config that counts epochs.
STAND_IN_STEPS = 5000
# SimpleTuner's own default of validation_num_inference_steps.
SAMPLING_STEPS = 30
# Its names of families that have another here.
FAMILY_NAMES = {
    "sd1x": "sd15",
    "pixart_sigma": "pixart",
    "kandinsky5_image": "kandinsky5",
    "ernie": "ernie_image",
}
_TAESDXL, _TAEF1 = "madebyollin/taesdxl", "madebyollin/taef1"
# Tiny autoencoders by the latents that a family has.
TINY_AUTOENCODERS = {
    "sd15": "madebyollin/taesd",
    **dict.fromkeys(("sdxl", "kolors", "pixart", "auraflow"), _TAESDXL),
    "sd3": "madebyollin/taesd3",
    **dict.fromkeys(("flux", "chroma", "hidream", "lumina2", "z_image", "longcat_image"), _TAEF1),
}
# The largest max_grad_norm that SimpleTuner lets a family have.
GRAD_CLIP_CAPS = {"pixart": 0.01}
# Families whose loader in SimpleTuner never starts the regularizer: a run with it is one without.
NEVER_ATTACHED = ("sdxl", "kolors", "pixart")
