"""SimpleTuner's config as data: its keys and defaults, the releases of each family, its encoders and rules.

Defaults and rules are those of SimpleTuner's registry of 2026-08-22. Where the same number means another computation in
repa-lab, an import says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter

from repa_lab.encoders.registry import ENCODERS
from repa_lab.models.family import Family, shape_of

Prefix = Literal["crepa", "urepa"]


def _refuse_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


# Values are also read from text, which is how a command line gives them.
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_refuse_boolean)]
Whole = Annotated[int, BeforeValidator(_refuse_boolean)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_any_case = BeforeValidator(lambda value: value.strip().lower() if isinstance(value, str) else value)
Scheduler = Annotated[Literal["constant", "linear", "cosine", "polynomial"], _any_case]
ThresholdMode = Annotated[Literal["permanent", "recoverable"], _any_case]
ModelType = Annotated[Literal["full", "lora"], _any_case]
Precision = Annotated[Literal["bf16", "fp16", "no"], _any_case]
ResolutionType = Annotated[Literal["pixel", "area", "pixel_area"], _any_case]
CropAspect = Annotated[Literal["square", "preserve", "random", "closest"], _any_case]


@dataclass(frozen=True)
class Key:
    """A key of SimpleTuner, and the field of a spec, as a dotted path, that has its value.

    Attributes:
        type: the type of SimpleTuner's value.
        default: SimpleTuner's value if the key is left out.
        convert: converts SimpleTuner's value to the field's.
        write: converts the field's value to SimpleTuner's.
    """

    name: str
    field: str
    type: Any
    default: Any = None
    convert: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value

    def read(self, value: Any) -> Any:
        """Return the field's value for SimpleTuner's.

        Raises:
            ValidationError: the value has another type.
        """
        return self.convert(TypeAdapter(self.type).validate_python(value))


@dataclass(frozen=True)
class Added:
    """A regularizer that SimpleTuner adds to any other: its keys, their prefix, and the key that turns it on."""

    prefix: str
    switch: str
    keys: tuple[Key, ...]


def _or(default: Any) -> Callable[[Any], Any]:
    """Return a function that replaces 0 by a default, as SimpleTuner does."""
    return lambda value: value or default


# ---- encoders and grids

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


def _encoder(name: str) -> str:
    known = name.lower()
    return _ENCODER_NAMES.get(known, known if known in HUB_ENCODERS else name)


def encoder_stride(encoder: str) -> int:
    """Return the pixels per token of an encoder along each side."""
    return ENCODERS[encoder].stride if encoder in ENCODERS else _HUB_STRIDE


def resample_side(
    family: Family, size: str | None, pixels: int, encoder: str, image_size: int, latents: bool = True
) -> Literal["student", "teacher"] | None:
    """Return SimpleTuner's rule as a ``resample.side``: the larger grid shrinks to the smaller. None for equal grids.

    Args:
        size: of a family that is trained from scratch.
        image_size: side of the encoder's input in pixels.
        latents: whether a family without latents of its own is given latents.
    """
    cell = _LATENT_STRIDE if latents and family.latent_stride == 1 else family.latent_stride
    student = pixels // (cell * shape_of(family, size).stride)
    teacher = image_size // encoder_stride(encoder)
    return None if student == teacher else "teacher" if teacher > student else "student"


# ---- keys


def _shared(prefix: Prefix, encoder: str) -> tuple[Key, ...]:
    """Return the keys that both regularizers have."""
    schedule = "regularizer.schedule"
    return (
        Key(f"{prefix}_lambda", "regularizer.weight", Number, 0.5),
        Key(encoder, "regularizer.encoder.name", Text, "dinov2_vitg14", _encoder),
        Key(f"{prefix}_encoder_image_size", "regularizer.encoder.image_size", Whole, 518, _or(518)),
        Key(
            f"{prefix}_use_tae", "regularizer.encoder.pixels", bool, False,
            lambda tae: "tae" if tae else "vae", lambda pixels: pixels == "tae",
        ),
        Key(f"{prefix}_scheduler", f"{schedule}.type", Scheduler, "constant"),
        Key(f"{prefix}_warmup_steps", f"{schedule}.warmup_steps", Whole, 0),
        Key(f"{prefix}_decay_steps", f"{schedule}.decay_steps", Whole, 0),
        Key(f"{prefix}_lambda_end", f"{schedule}.end", Number, 0.0),
        Key(f"{prefix}_power", f"{schedule}.power", Number, 1.0, _or(1.0)),
        Key(f"{prefix}_cutoff_step", f"{schedule}.cutoff_step", Whole, 0, _or(None), _or(0)),
        Key(f"{prefix}_similarity_threshold", f"{schedule}.similarity_threshold", Number),
        Key(f"{prefix}_similarity_ema_decay", f"{schedule}.similarity_ema_decay", Number, 0.99),
        Key(f"{prefix}_threshold_mode", f"{schedule}.threshold_mode", ThresholdMode, "permanent"),
    )  # fmt: skip


KEYS: Mapping[Prefix, tuple[Key, ...]] = {
    "crepa": (
        Key("crepa_block_index", "regularizer.block_index", Whole, 8),
        Key("crepa_spatial_align", "regularizer.spatial_align", bool, True),
        *_shared("crepa", "crepa_encoder"),
        Key("crepa_encoder_frames_batch_size", "run.encoder_batch_size", Whole, -1, lambda n: n if n > 0 else None),
    ),
    "urepa": (
        Key("urepa_manifold_weight", "regularizer.manifold_weight", Number, 3.0),
        *_shared("urepa", "urepa_model"),
    ),
}
# Keys that relate the frames of a video: crepa_* is the type crepa for families of videos, and repa for others.
FRAMES = (
    Key("crepa_adjacent_distance", "regularizer.distance", Whole, 1),
    Key("crepa_adjacent_tau", "regularizer.tau", Number, 1.0),
    Key("crepa_normalize_by_frames", "regularizer.normalize_frames", bool, True),
    Key("crepa_normalize_neighbour_sum", "regularizer.normalize_neighbours", bool, False),
)
IREPA = (
    Key("irepa_spatial_norm_alpha", "regularizer.spatial_norm", Number, 0.6),
    Key("irepa_projector_kernel_size", "regularizer.projector.kernel", Whole, 3),
)
_DEPTH = (lambda depth: max(depth - 1, 0), lambda index: index + 1)
# Regularizers that SimpleTuner adds to any other, by their type in a spec.
ADDED: Mapping[str, Added] = {
    # LayerSync counts blocks from 1, and takes 0 for the first one too; its weight 0 stands for 0.2.
    "layersync": Added(
        "layersync_",
        "layersync_enabled",
        (
            Key("layersync_student_block", "regularizer.block_index", Whole, None, *_DEPTH),
            Key("layersync_teacher_block", "regularizer.teacher_block", Whole, None, *_DEPTH),
            Key("layersync_lambda", "regularizer.weight", Number, 0.2, _or(0.2)),
        ),
    ),
    # The keys inside `distillation_config`, for the method self_transcendence and its stage self.
    "self_transcendence": Added(
        "distillation_config.",
        "distillation_config.stage",
        (
            Key("distillation_config.student_block", "regularizer.block_index", Whole),
            Key("distillation_config.teacher_block", "regularizer.teacher_block", Whole),
            Key("distillation_config.weight", "regularizer.weight", Number, 0.5),
            Key("distillation_config.cfg_scale", "regularizer.guidance", Number, 30.0),
            Key("distillation_config.timestep_min", "regularizer.low", Number, 0.4),
            Key("distillation_config.timestep_max", "regularizer.high", Number, 0.7),
            Key("distillation_config.stop_step", "regularizer.schedule.cutoff_step", Whole, 0, _or(None), _or(0)),
            Key("distillation_config.projector_hidden_dim", "regularizer.projector.width", Whole, 2048),
        ),
    ),
}
STAGE = Key("distillation_config.stage", "regularizer.type", Literal["self"])
# Keys that set one field each of a whole spec.
REST = (
    Key("pretrained_model_name_or_path", "model.pretrained", Text),
    Key("model_type", "model.train", ModelType, "full"),
    Key("lora_rank", "model.rank", Whole, 16),
    Key("pretrained_vae_model_name_or_path", "data.vae", Text),
    Key("max_train_steps", "train.steps", Whole, None, _or(None)),
    Key("learning_rate", "train.lr", Number, 4e-7),
    Key("adam_weight_decay", "train.weight_decay", Number, 0.01),
    Key("caption_dropout_probability", "train.label_dropout", Number, 0.0),
    Key("max_grad_norm", "train.grad_clip", Number, 2.0, _or(None)),
    Key("mixed_precision", "run.precision", Precision, "bf16", lambda word: "fp32" if word == "no" else word),
    Key("gradient_checkpointing", "run.gradient_checkpointing", bool, True),
    Key("checkpoint_step_interval", "run.checkpoint_every", Whole, None, _or(None)),
)
# Keys of which several decide a field together.
PARTS = (
    Key("model_family", "model.family", Text),
    Key("model_flavour", "model.pretrained", Text),
    Key("lora_alpha", "model.rank", Number),
    Key("data_backend_config", "data.path", Text),
    Key("train_batch_size", "train.batch_size", Whole, 4),
    Key("gradient_accumulation_steps", "train.batch_size", Whole, 1),
    Key("resolution", "data.resolution", Number, 1024),
    Key("resolution_type", "data.resolution", ResolutionType, "pixel_area"),
    Key("use_ema", "train.ema", bool, False),
    Key("ema_decay", "train.ema", Number, 0.995),
    Key("seed", "seeds", Whole),
    Key("validation_num_inference_steps", "evaluate.sampler.steps", Whole, 30),
    Key("validation_guidance", "evaluate.guidance.scale", Number, None, lambda scale: max(scale, 1.0)),
)
# Keys of a data set in the file that `data_backend_config` names; the first two override those of the config.
DATA_SET = (
    Key("resolution", "data.resolution", Number),
    Key("resolution_type", "data.resolution", ResolutionType),
    Key("instance_data_dir", "data.path", Text),
    Key("crop", "data.buckets", bool, True),
    Key("crop_aspect", "data.buckets", CropAspect, "square"),
    Key("video.num_frames", "data.frames", Whole),
)
SWITCHES = tuple(
    Key(f"{prefix}_enabled", "regularizer.type", bool, False) for prefix in ("crepa", "urepa", "irepa", "layersync")
)
# SimpleTuner's documentation has these keys, its parser refuses them; crepa_model wins over crepa_encoder.
CREPA_MODEL = Key("crepa_model", "regularizer.encoder.name", Text, None, _encoder)
CUMULATIVE = Key("crepa_cumulative_neighbors", "regularizer.cumulative", bool, False)
ALIASES = {"checkpointing_steps": "checkpoint_step_interval"}
_OTHERS = (CREPA_MODEL, CUMULATIVE, STAGE)
_ADDED = [kind.keys for kind in ADDED.values()]
READABLE = {
    key.name: key for keys in (*KEYS.values(), FRAMES, IREPA, *_ADDED, REST, PARTS, SWITCHES, _OTHERS) for key in keys
}

_BACKBONE = "repa-lab has no projector between two blocks of one pass; the type layersync is nearest"
_SELF_FLOW = "the type self_flow needs a time for every token, which this model does not take here"
# Keys without a field in a spec: the values at which nothing is lost, and what is lost at the others.
LOST: Mapping[str, tuple[tuple[str, ...], str]] = {
    "crepa_feature_source": (("encoder", "external"), f"{_BACKBONE}; {_SELF_FLOW}"),
    "crepa_use_backbone_features": (("false",), _BACKBONE),
    "crepa_self_flow": (("false",), _SELF_FLOW),
    "distillation_method": ((), "of SimpleTuner's distillations, repa-lab has self_transcendence's stage self"),
    "distillation_config.teacher_adapter_path": (
        (),
        "the teacher is the pretrained model; weights names a whole model",
    ),
    "lora_type": (("standard",), "repa-lab trains PEFT's LoRA; SimpleTuner's LyCORIS is another adapter"),
}
# Keys that do nothing without those above, or save memory where repa-lab uses none.
WITHOUT_EFFECT = ("crepa_drop_vae_encoder", "crepa_self_flow_mask_ratio", "crepa_teacher_block_index")
STAND_IN_STEPS = 5000  # for a config that counts epochs


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
# Families whose loader in SimpleTuner never starts the regularizer: a run with a regularizer is a baseline.
NEVER_ATTACHED = ("sdxl", "kolors", "pixart")
# Flavours (releases that ``model_flavour`` names) as hub ids. The first stands in if a config names none: SimpleTuner's
# default, if repa-lab trains it. Flavours that repa-lab does not train (docs/simpletuner.md says why) are left out.
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
    "wan": {
        "t2v-480p-1.3b-2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "t2v-480p-14b-2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    },
    "ltxvideo": {"0.9.0": "Lightricks/LTX-Video"},
    "krea2": {"raw": "krea/Krea-2-Raw", "turbo": "krea/Krea-2-Turbo"},
    "ernie_image": {"base": "baidu/ERNIE-Image", "turbo": "baidu/ERNIE-Image-Turbo"},
    "longcat_image": {"final": "meituan-longcat/LongCat-Image", "dev": "meituan-longcat/LongCat-Image-Dev"},
}
