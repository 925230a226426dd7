"""Remarks on an imported config: what is not carried over, stand-ins, and differences between the trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repa_lab.bridge.config import PREFIXES, Config
from repa_lab.bridge.simpletuner import (
    CREPA_MODEL,
    CUMULATIVE,
    FLAVOURS,
    FRAMES,
    LOST,
    NEVER_ATTACHED,
    READABLE,
    REST,
    STAND_IN_STEPS,
    WITHOUT_EFFECT,
    is_language_model,
)
from repa_lab.models.family import Family

Fields = Mapping[str, Any]  # of the spec, by dotted path
Remark = tuple[str, str]  # a key or nothing, and the message

_FEW_SAMPLES = 2048  # the width of Inception's features


def remarks(config: Config, fields: Fields) -> Iterator[Remark]:
    """Yield all remarks, the most important first."""
    if config.prefix:
        yield from _differences(config, fields)
    if config.regularizer == "crepa":
        yield from _frames(config, fields)
    yield from _added(config)
    if not config.prefix and not config.added and not any(key.name in config.values for key in REST):
        yield "", "neither crepa_enabled nor urepa_enabled is true: there is no regularizer"
    yield from _not_carried(config, fields)
    if config.family is None:
        yield "", "no model_family, so this is a fragment: name it with use: in a spec, or add model_family"
    if config.family or "data_backend_config" in config.values:
        yield from _images(config, fields)
    if config.family:
        yield from _stand_ins(config, config.family, fields)


def _differences(config: Config, fields: Fields) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else from the same number."""
    prefix, family, schedule = config.prefix, config.family, "regularizer.schedule"
    if family is not None and family.name in NEVER_ATTACHED:
        never = f"SimpleTuner never attaches its regularizer to {family.name}"
        yield f"{prefix}_enabled", f"{never}: what it trained there was a baseline; here it attaches"
    yield (
        f"{prefix}_enabled",
        "SimpleTuner's target is the encoder's CLS token alone, to which it shrinks the student's grid; here the "
        "targets are the patch tokens, so neither losses nor good weights carry over",
    )
    if prefix == "crepa":
        block = fields["regularizer.block_index"]
        yield "crepa_block_index", f"counted from 0, as there: block_index {block} is the papers' depth {block + 1}"
    elif config.value("urepa_manifold_weight") == 0:
        yield "urepa_manifold_weight", "SimpleTuner takes 0 for 3.0; here 0 is 0. Write 3.0 to compute what it computed"
    else:
        message = "with one target token there, its manifold loss is 0 whatever the weight"
        yield "urepa_manifold_weight", f"{message}; here it compares pairs of patches"
    if config.value(f"{prefix}_lambda") == 0:
        message = "here 0 is 0, and the encoder is not run; SimpleTuner runs it all the same"
        yield f"{prefix}_lambda", message + (", and takes 0 for 0.5 without a schedule" if prefix == "urepa" else "")
    yield (
        f"{prefix}_use_tae",
        "SimpleTuner's encoder looks at decoded latents, squashed to a square, not at the images: pixels: "
        f"{fields['regularizer.encoder.pixels']} does the same but for the squash (the papers' way is image)",
    )
    if config.irepa:
        yield "irepa_enabled", "projector.type: conv and spatial_norm are SimpleTuner's iREPA"
    else:
        yield "", "projector: {type: linear} is SimpleTuner's LayerNorm + Linear; the papers' is mlp"
    if side := fields.get("regularizer.resample.side"):
        larger = "the larger grid" if family else "the larger grid (unknown without model_family)"
        yield "", f"resample.side: {side}, because SimpleTuner shrinks {larger}; the papers resample the student"
    if config.value(f"{prefix}_decay_steps") != (decay := fields[f"{schedule}.decay_steps"]):
        message = "the decay ends within the warm-up, so SimpleTuner drops the weight one step after the warm-up"
        yield f"{prefix}_decay_steps", f"{message}: decay_steps: {decay} does the same"
    elif fields[f"{schedule}.type"] != "constant":
        message = "the step at which the decay ends, warm-up included, in both; SimpleTuner's documentation calls it a"
        yield f"{prefix}_decay_steps", f"{message} duration"
    if fields[f"{schedule}.similarity_threshold"] is not None:
        yield (
            f"{prefix}_similarity_threshold",
            "SimpleTuner has no bias correction and no minimum count, and acts a step earlier: similarity_min_count: 1 "
            "comes nearest, though one spike then ends the regularizer; repa-lab's own default is 100",
        )
    if prefix == "crepa" and CREPA_MODEL.name in config.values:
        yield CREPA_MODEL.name, "SimpleTuner documents this key and refuses it; export writes crepa_encoder"


def _frames(config: Config, fields: Fields) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else from the frames of a clip."""
    if CUMULATIVE.name in config.values:
        yield CUMULATIVE.name, "SimpleTuner documents this key and refuses it; export leaves it out"
    message = "a distance that no two latent frames have is refused here; SimpleTuner shortens it"
    yield "crepa_adjacent_distance", message
    if fields["regularizer.schedule.similarity_threshold"] is not None:
        message = "SimpleTuner adds the neighbours' cosines, which may exceed 1; here each frame's own count alone"
        yield "crepa_similarity_threshold", message


def _added(config: Config) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else in the regularizers that it adds to others."""
    if "layersync" in config.added:
        student, teacher = (config.value(f"layersync_{name}_block") for name in ("student", "teacher"))
        yield "layersync_student_block", f"counted from 1 there, and from 0 here: block_index is {student}"
        if teacher is None:
            message = (
                "SimpleTuner takes the student for its own teacher, which teaches nothing; here null is a later block"
            )
            yield "layersync_teacher_block", message
        if str(config.given.get("layersync_lambda")) in ("0", "0.0"):
            yield "layersync_lambda", "SimpleTuner takes 0 for 0.2, and so does the import"
    if "self_transcendence" in config.added:
        message = "the mean over the images in range there; here the others count as 0 in the mean over all"
        yield "distillation_config.weight", message


def _not_carried(config: Config, fields: Fields) -> Iterator[Remark]:
    given = config.given
    for name, (harmless, reason) in LOST.items():
        if name in given and str(given[name]).lower() not in harmless:
            yield name, f"not carried: {reason}"
    for name in ("crepa_encoder", CREPA_MODEL.name, "urepa_model"):
        if config.is_on(name) and is_language_model(config.values.get(name, "")):
            message = "a vision-language model yields no grid of patch tokens here; dinov2_vitg14 stands in"
            yield name, f"not carried: {message}"
    tae = f"{config.prefix}_use_tae"
    if config.prefix and config.value(tae) == "tae" and fields["regularizer.encoder.pixels"] == "vae":
        latents = f"for the latents of {config.family.name}" if config.family else "without model_family"
        yield tae, f"not carried: no tiny autoencoder is known {latents}; give pixels: tae and tae: yourself"
    of_frames = () if config.is_video else tuple(key.name for key in (*FRAMES, CUMULATIVE))
    without_effect = (*WITHOUT_EFFECT, *of_frames)
    rest = [name for name in given if name in without_effect or not (name in READABLE or name in LOST)]
    if rest:
        yield "", f"not carried, because a spec has no field for them: {', '.join(rest)}"
    off = [name for name in config.values if not config.is_on(name)]
    for prefix in PREFIXES:  # keys of a regularizer that is off have no effect in SimpleTuner either
        if names := [name for name in off if name.startswith(prefix)]:
            yield "", f"not carried, because {prefix}enabled is not true: {', '.join(names)}"


def _images(config: Config, fields: Fields) -> Iterator[Remark]:
    """Describe what comes from the data backend's file, or what is missing without it."""
    key, images = "data_backend_config", config.data_set
    if not (images and images.folder):
        kind = "clips" if config.is_video else "images"
        yield "", f"fill in data.path, the folder of {kind} (--set data.path=FOLDER)"
    if images is None:
        if key in config.values:
            kind = "video" if config.is_video else "image"
            yield key, f"'{config.values[key]}' is not found here or beside the config, or has no {kind} data set"
        return
    if config.is_video:
        message = "here a clip is a subfolder of frames, or a .gif, .webp or .npy: bring the videos into one of them"
        yield key, f"{images.name}: {message}"
    if "video.num_frames" in images.values:
        yield key, f"data.frames is {images.values['video.num_frames']}, from {images.name}"
    if images.folder:
        yield key, f"data.path is '{images.folder}', from {images.name}"
    elif images.kind != "local":
        saved = "save its images to a folder, or with `Dataset.save_to_disk` (data.source: datasets)"
        yield key, f"{images.name} is of type {images.kind}: {saved}"
    if "resolution" in images.values:
        yield key, f"data.resolution is {fields['data.resolution']}, from {images.name}, which overrides the config's"
    if images.keeps_aspect:
        sides = "data.buckets keeps aspects, up to 2 to 1, and the resolution stands for the area"
        yield key, f"{images.name} is not cut to squares: {sides}"
    if images.captions != "textfile":
        here = "here they are read from metadata.jsonl or a .txt beside each image"
        yield key, f"{images.name}: captions are by {images.captions} there; {here}"
    if images.others:
        yield key, f"not carried: a spec has one data set; the others are {', '.join(images.others)}"


def _stand_ins(config: Config, family: Family, fields: Fields) -> Iterator[Remark]:
    """Name values that the config does not give, and those that mean something else without a regularizer too."""
    named, flavour = config.value("pretrained_model_name_or_path"), config.values.get("model_flavour")
    if config.pretrained is None:
        yield "", "fill in model.pretrained: the config names no weights"
    elif flavour and (named or family.name not in FLAVOURS):
        yield "model_flavour", f"not carried: model.pretrained is {config.pretrained}"
    elif not named and not flavour:
        yield "", f"no model_flavour: {config.pretrained} stands in"
    if config.value("gradient_checkpointing") and not fields["run.gradient_checkpointing"]:
        yield "gradient_checkpointing", f"not carried: diffusers cannot checkpoint the blocks of {family.name}"
    if not config.value("max_train_steps"):
        yield "", f"fill in train.steps: there is no max_train_steps, so {STAND_IN_STEPS:,} stand in"
    if not fields["train.ema"]:
        yield "", "use_ema is off, so train.ema is 0.0: the weights of the last step are measured"
    alpha, rank = config.value("lora_alpha"), config.value("lora_rank")
    if alpha not in (None, rank):
        scale = f"the adapter's scale is 1, and {alpha / rank:g} there"
        yield "lora_alpha", f"not carried: here alpha is the rank, so that {scale}"
    if config.given.get("grad_clip_method", "value") != "norm":
        message = "max_grad_norm clips the gradient's norm here, and each of its values there"
        yield "", f"{message} unless grad_clip_method is norm"
    samples = fields["evaluate.samples"]
    noise = ". A Frechet distance of so few samples is mostly noise: raise evaluate.samples"
    cost = f"evaluate: {samples:,} samples, drawn at the end alone, cost about as much as the training"
    yield "", cost + (noise if samples < _FEW_SAMPLES else "")
