"""Remarks on an imported config: what is not carried over, stand-ins, and differences between the trainers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repa_lab.bridge.config import Config
from repa_lab.bridge.simpletuner import (
    ASSISTED,
    BLOCKS,
    CREPA_MODEL,
    FLAVOURS,
    GRAD_CLIP_CAPS,
    HARMLESS,
    IREPA,
    KEYS,
    NEVER_ATTACHED,
    NOT_CARRIED,
    OTHER_DEFAULTS,
    PARTS,
    READABLE,
    REFUSED,
    REST,
    STAND_IN_STEPS,
    is_language_model,
)
from repa_lab.models.family import Family
from repa_lab.spec.evaluate import EvaluateConfig

Fields = Mapping[str, Any]  # of the spec, by dotted path
Remark = tuple[str, str]  # a key or nothing, and the message

_PASSES = 3  # forward passes that a training step costs: a backward pass costs about two
_FEW_SAMPLES = 2048  # the width of Inception's features
_CAPTIONS = ("textfile", None)  # caption strategies that repa-lab reads alike


def remarks(config: Config, fields: Fields) -> Iterator[Remark]:
    """Yield all remarks, the most important first.

    Args:
        config: the config.
        fields: the spec's fields, by dotted path.
    """
    yield from _differences(config, fields)
    yield from _zeros(config)
    yield from _not_carried(config, fields)
    yield from _defaults(config)
    if config.prefix is None and not any(key.name in config.values for key in REST):
        yield "", "neither crepa_enabled nor urepa_enabled is true: there is no regularizer"
    if config.family is None:
        message = "no model_family, so this is a fragment"
        yield "", f"{message}: name it with use: in a spec, or add model_family and import again"
        if "model_flavour" in config.values:
            yield "model_flavour", "not carried without model_family, whose release it names"
        yield from _images(config, fields) if "data_backend_config" in config.values else ()
        return
    yield from _images(config, fields)
    yield from _release(config, config.family)
    yield from _stand_ins(config, config.family)
    yield _evaluation(config, fields)


def training_passes(fields: Fields) -> int:
    """Return the cost of the training in forward passes of one image."""
    return int(fields["train.steps"] * fields["train.batch_size"] * _PASSES)


def _differences(config: Config, fields: Fields) -> Iterator[Remark]:
    """Name where SimpleTuner computes something else from the same number."""
    prefix, family, schedule = config.prefix, config.family, "regularizer.schedule"
    if prefix is None:
        return
    if family is not None and family.name in NEVER_ATTACHED:
        never = f"SimpleTuner never attaches its regularizer to {family.name}"
        yield f"{prefix}_enabled", f"{never}: what it trained there was a baseline; here it attaches"
    yield (
        f"{prefix}_enabled",
        "SimpleTuner's target is the encoder's CLS token alone, to which it shrinks the student's grid; here the "
        "targets are the patch tokens, so neither losses nor good weights carry over",
    )
    if prefix == "urepa":
        message = "with one target token there, its manifold loss is 0 whatever the weight"
        yield "urepa_manifold_weight", f"{message}; here it compares pairs of patches"
    else:
        block = fields["regularizer.block_index"]
        depth = f"block_index {block} is their depth {block + 1}"
        yield "crepa_block_index", f"counted from 0, as there; the papers count depth from 1, so {depth}"
    yield (
        f"{prefix}_use_tae",
        "SimpleTuner's encoder looks at decoded latents, squashed to a square, not at the images: pixels: "
        f"{fields['regularizer.encoder.pixels']} does the same but for the squash (the papers' way is image)",
    )
    if not config.irepa:
        yield "", "projector: {type: linear} is SimpleTuner's LayerNorm + Linear; the papers' is mlp"
    if side := fields.get("regularizer.resample.side"):
        larger = "the larger grid" if family else "the larger grid (unknown without model_family)"
        yield "", f"resample.side: {side}, because SimpleTuner shrinks {larger}; the papers resample the student"
    if fields[f"{schedule}.type"] != "constant":
        yield (
            f"{prefix}_decay_steps",
            "the step at which the decay ends, counted from 0 and warm-up included, as SimpleTuner computes it; its "
            "documentation calls it a duration. 0 is the end of training in both",
        )
    if config.value(f"{prefix}_decay_steps") != (decay := fields[f"{schedule}.decay_steps"]):
        yield (
            f"{prefix}_decay_steps",
            "the decay ends no later than the warm-up, so SimpleTuner drops the weight to its end one step after the "
            f"warm-up: decay_steps: {decay} does the same",
        )
    if fields[f"{schedule}.similarity_threshold"] is not None:
        yield (
            f"{prefix}_similarity_threshold",
            "SimpleTuner has no bias correction and no minimum count, judges every step, each process for itself, and "
            "acts in the step that reaches the threshold, repa-lab from the next one on: similarity_min_count: 1 comes "
            "nearest, though one spike then ends the regularizer; repa-lab's own default is 100",
        )
    if prefix == "crepa" and CREPA_MODEL.name in config.values:
        message = "crepa_model is in SimpleTuner's documentation, but its parser refuses it"
        yield "", f"{message}; it wins over crepa_encoder, and export writes crepa_encoder"
    if config.irepa:
        message = "iREPA puts a convolution in the projector's place and normalises the target"
        yield "", f"{message}: projector.type: conv, spatial_norm"


# Keys of which SimpleTuner replaces 0 by another value, or computes at full cost for nothing.
_ZEROS = {
    "crepa_lambda": "0 is 0: nothing is added, and the encoder is not run (SimpleTuner decodes and encodes all the "
    "same)",
    "urepa_lambda": "SimpleTuner takes 0 for 0.5, and only its schedule makes it 0 again, at full cost; here 0 is 0, "
    "and the encoder is not run",
    "urepa_manifold_weight": "SimpleTuner takes 0 for 3.0; here 0 is 0. Write 3.0 to compute what it computed",
    **dict.fromkeys(
        ("crepa_encoder_image_size", "urepa_encoder_image_size"), "SimpleTuner takes 0 for 518, and so does the import"
    ),
    **dict.fromkeys(("crepa_power", "urepa_power"), "SimpleTuner takes 0 for 1.0, and so does the import"),
}


def _zeros(config: Config) -> Iterator[Remark]:
    for name, message in _ZEROS.items():
        if name in config.values and config.is_on(name) and float(config.text.values[name]) == 0:
            yield name, message


def _not_carried(config: Config, fields: Fields) -> Iterator[Remark]:
    given = config.text.values
    for name, reason in NOT_CARRIED.items():
        if given.get(name) is not None and str(given[name]).lower() not in HARMLESS.get(name, ()):
            yield name, f"not carried: {reason}"
    for name in ("crepa_encoder", CREPA_MODEL.name, "urepa_model"):
        if config.is_on(name) and is_language_model(config.values.get(name, "")):
            message = "a vision-language model yields no grid of patch tokens here; dinov2_vitg14 stands in"
            yield name, f"not carried: {message}"
    tae = f"{config.prefix}_use_tae"
    if config.prefix and config.value(tae) == "tae" and fields["regularizer.encoder.pixels"] == "vae":
        latents = f"for the latents of {config.family.name}" if config.family else "without model_family"
        yield tae, f"not carried: no tiny autoencoder is known {latents}; give pixels: tae and tae: yourself"
    rest = [name for name in given if name not in READABLE and name not in NOT_CARRIED]
    if rest:
        yield "", f"not carried, because a spec has no field for them: {', '.join(rest)}"
    for prefix in ("crepa", "urepa", "irepa"):  # keys of a regularizer that is off have no effect in SimpleTuner either
        names = [name for name in config.values if name.startswith(f"{prefix}_") and not config.is_on(name)]
        if names:
            yield "", f"not carried, because {prefix}_enabled is not true: {', '.join(names)}"


def _defaults(config: Config) -> Iterator[Remark]:
    keys = [*(KEYS[config.prefix] if config.prefix else ()), *(IREPA if config.irepa else ())]
    keys += [*REST, *PARTS] if config.family else []
    absent = [key for key in keys if key.name not in config.values and key.default is not None]
    replaced = {"crepa_encoder" if CREPA_MODEL.name in config.values else "", "" if config.averages else "ema_decay"}
    replaced |= set(config.data_set.values) if config.data_set else set()
    if absent:
        values = ", ".join(f"{key.name} {json.dumps(key.default)}" for key in absent if key.name not in replaced)
        yield "", f"left out of the config, so SimpleTuner's defaults are written down: {values}"


def _images(config: Config, fields: Fields) -> Iterator[Remark]:
    """Describe what comes from the data backend's file, or what is missing without it."""
    key, images = "data_backend_config", config.data_set
    if not (images and images.folder):
        message = "fill in data.path, the folder of images (--set data.path=FOLDER)"
        yield "", f"{message}; SimpleTuner has it in data_backend_config"
    if images is None:
        if key in config.values:
            message = "is not found here or beside the config, or has no image data set; it may have another resolution"
            yield key, f"'{config.values[key]}' {message}"
        return
    name = f"data set '{images.name}' of {images.file}"
    if images.folder:
        is_absolute = Path(images.folder).is_absolute()
        relative = "" if is_absolute else ", relative to the folder that SimpleTuner starts in"
        yield key, f"data.path is '{images.folder}', from {name}{relative}"
    elif images.kind:
        saved = "save its images to a folder, or with `Dataset.save_to_disk` (data.source: datasets)"
        yield key, f"{name} is of type {images.kind}: {saved}"
    if "resolution" in images.values:
        yield key, f"data.resolution is {fields['data.resolution']}, from {name}, which overrides the config's"
    if images.keeps_aspect:
        is_edge = images.values.get("resolution_type", config.value("resolution_type")) == "pixel"
        edge = "; the resolution stands for the area here, and for the shorter edge there" if is_edge else ""
        sides = "data.buckets keeps aspects, up to 2 to 1, in sides that are multiples of 64"
        yield key, f"{name} is not cut to squares: {sides}{edge}"
    if images.captions not in _CAPTIONS:
        here = "here they are read from metadata.jsonl or a .txt beside each image"
        yield key, f"{name}: captions are by {images.captions} there; {here}"
    if images.others:
        yield key, f"not carried: a spec has one data set; the others of {images.file} are {', '.join(images.others)}"


def _release(config: Config, family: Family) -> Iterator[Remark]:
    """Name the release that is trained, and what is known of it."""
    named, flavour = config.value("pretrained_model_name_or_path"), "model_flavour"
    if family.pipeline is None:
        return
    if family.name not in FLAVOURS:
        if flavour in config.values:
            yield flavour, f"not carried: SimpleTuner does not train {family.name}"
    elif flavour not in config.values and not named:
        default, other = ", as in SimpleTuner", OTHER_DEFAULTS.get(family.name)
        if other is not None:
            reason = REFUSED[family.name][other]
            default = f"; SimpleTuner's own default is '{other}', which repa-lab does not train: {reason}"
        yield "", f"no model_flavour: '{config.flavour}' ({config.pretrained}) stands in{default}"
    elif flavour in config.values and named and FLAVOURS[family.name][str(config.flavour)].lower() != named.lower():
        yield flavour, "pretrained_model_name_or_path names other weights, and wins, as in SimpleTuner"
    if config.pretrained != family.pipeline.released:
        blocks = BLOCKS.get(str(config.pretrained))
        known = f"it has {blocks} blocks, and " if blocks else ""
        is_counted = family.kind == "transformer"  # a UNet has one block to tap
        checked = "; a run checks block_index against the weights before it trains" if is_counted else ""
        counted = "what `plan` says of blocks, parameters, FLOPs and memory is counted for"
        yield "", f"model.pretrained is {config.pretrained}: {known}{counted} {family.pipeline.released}{checked}"
    if (family.name, config.flavour) in ASSISTED and config.value("model_type") == "lora" and not named:
        message = f"SimpleTuner trains '{config.flavour}' beside an assistant LoRA, which keeps it distilled"
        yield flavour if flavour in config.values else "", f"{message}; repa-lab has none"


def _stand_ins(config: Config, family: Family) -> Iterator[Remark]:
    if config.uncheckpointed and config.value("gradient_checkpointing"):
        message = f"not carried: diffusers cannot checkpoint {family.name}: {config.uncheckpointed}"
        yield "gradient_checkpointing", message
    if config.pretrained is None:
        yield "", "fill in model.pretrained: the config names no weights"
    if not config.value("max_train_steps"):
        yield "", f"fill in train.steps: there is no max_train_steps, so {STAND_IN_STEPS:,} stand in"
    if config.averages and "use_ema" not in config.values:
        yield "ema_decay", "carried, though SimpleTuner keeps no average unless use_ema is true"
    if not config.averages:
        yield "", "use_ema is off, so train.ema is 0.0: the weights of the last step are measured"
    alpha, rank = config.value("lora_alpha"), config.value("lora_rank")
    if alpha not in (None, rank):
        scale = f"the adapter's scale is 1, and {alpha / rank:g} there"
        yield "lora_alpha", f"not carried: here alpha is the rank, so that {scale}"
    cap, clip = GRAD_CLIP_CAPS.get(family.name), config.value("max_grad_norm")
    if cap and clip and clip > cap:
        yield "max_grad_norm", f"SimpleTuner lowers it to {cap} for this family, unless i_know_what_i_am_doing is set"
    if config.text.values.get("grad_clip_method", "value") != "norm":
        message = "max_grad_norm clips the gradient's norm here, and each of its values there"
        yield "", f"{message} unless grad_clip_method is norm"


def _evaluation(config: Config, fields: Fields) -> Remark:
    """Compare the cost of the evaluation with that of the training."""
    default, training = EvaluateConfig(), training_passes(fields)
    calls = 2 if fields.get("evaluate.guidance.scale", 1.0) > 1 else 1
    samples, steps = fields["evaluate.samples"], fields["evaluate.sampler.steps"]
    asked = config.value("validation_num_inference_steps")
    cut = f" (validation_num_inference_steps {asked} would cost more)" if asked and asked > steps else ""
    noise = ". A Frechet distance of so few samples is mostly noise: raise evaluate.samples"
    passes = f"{samples * steps * calls:,} forward passes; training takes about {training:,}"
    default_passes = default.samples * default.sampler.steps * calls
    usual = f"repa-lab's default, {default.samples:,} samples of {default.sampler.steps} steps"
    return "", (
        f"evaluate: {samples:,} samples of {steps} sampling steps{cut}, at the end alone: {passes}. "
        f"{usual}, would take {default_passes:,}{noise if samples < _FEW_SAMPLES else ''}"
    )
