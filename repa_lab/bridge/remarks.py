"""What there is to say of an imported config: what was left behind, what stands in, and where the two trainers differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from repa_lab.bridge.flavours import ASSISTED, BLOCKS, FLAVOURS, OTHER_DEFAULTS, REFUSED
from repa_lab.bridge.keys import (
    CREPA_MODEL,
    GRAD_CLIP_CAPS,
    HARMLESS,
    IREPA,
    KEYS,
    NEVER_ATTACHED,
    NOT_CARRIED,
    PARTS,
    REST,
    STAND_IN_STEPS,
    is_language_model,
)
from repa_lab.bridge.read import READABLE, Reading
from repa_lab.spec.evaluate import EvaluateConfig

Fields = Mapping[str, Any]
Remark = tuple[str, str]  # the key it is about, or nothing, and what to say

_PASSES = 3  # forward passes that a training step is worth: backward takes about two
_FEW_SAMPLES = 2048  # as many as Inception's features have dimensions
_CAPTIONS = ("textfile", None)  # captions that the lab reads as they are


def remarks(reading: Reading, fields: Fields) -> Iterator[Remark]:
    """Everything there is to say, most important first.

    Args:
        reading: the config.
        fields: what became of it, by dotted path.
    """
    yield from _differences(reading, fields)
    yield from _zeros(reading)
    yield from _not_carried(reading, fields)
    yield from _without_effect(reading)
    yield from _defaults(reading)
    yield from _to_fill_in(reading, fields)


def training_passes(fields: Fields) -> int:
    """Return how many forward passes of one image the training is worth."""
    return int(fields["train.steps"] * fields["train.batch_size"] * _PASSES)


def _schedules(reading: Reading, fields: Fields) -> bool:
    return bool(fields["regularizer.schedule.type"] != "constant")


def _judges_similarity(reading: Reading, fields: Fields) -> bool:
    return fields["regularizer.schedule.similarity_threshold"] is not None


_DECAY = "regularizer.schedule.decay_steps"


def _always(reading: Reading, fields: Fields) -> bool:
    return True


def _is(prefix: str) -> Callable[[Reading, Fields], bool]:
    return lambda reading, fields: reading.prefix == prefix


# Where SimpleTuner computes something else from the same number: the key, its prefix left out, when, and what to say.
DIFFERENCES: tuple[tuple[str, Callable[[Reading, Fields], bool], str], ...] = (
    (
        "enabled",
        lambda reading, fields: reading.family is not None and reading.family.name in NEVER_ATTACHED,
        "SimpleTuner never attaches its regularizer to {family}: what it trained there was a baseline; here it attaches",
    ),
    (
        "enabled",
        _always,
        "SimpleTuner's target is the encoder's CLS token alone, to which it shrinks the student's grid; here the targets are"
        " the patch tokens, so neither losses nor good weights carry over",
    ),
    (
        "manifold_weight",
        _is("urepa"),
        "with one target token there, its manifold loss is 0 whatever the weight; here it compares pairs of patches",
    ),
    (
        "block_index",
        _is("crepa"),
        "counted from 0, as there; the papers count depth from 1, so block_index {block} is their depth {depth}",
    ),
    (
        "use_tae",
        _always,
        "SimpleTuner's encoder looks at decoded latents, squashed to a square, not at the images: pixels: {pixels} does the"
        " same but for the squash (the papers' way is image)",
    ),
    (
        "",
        lambda reading, fields: not reading.irepa,
        "projector: {{type: linear}} is SimpleTuner's LayerNorm + Linear; the papers' is mlp",
    ),
    (
        "",
        lambda reading, fields: "regularizer.resample.side" in fields,
        "resample.side: {side}, for SimpleTuner shrinks the larger grid{unknown}; the papers resample the student",
    ),
    (
        "decay_steps",
        _schedules,
        "the step at which the decay ends, counted from 0 and warm-up included, as SimpleTuner computes it; its documentation"
        " calls it a duration. 0 is the end of training in both",
    ),
    (
        "decay_steps",
        lambda reading, fields: reading.part(f"{reading.prefix}_decay_steps") != fields[_DECAY],
        "the decay ends no later than the warm-up, so SimpleTuner drops the weight to its end one step after the warm-up:"
        " decay_steps: {decay} does the same",
    ),
    (
        "similarity_threshold",
        _judges_similarity,
        "SimpleTuner has no bias correction and no minimum count, judges every step, each process for itself, and acts in the"
        " step that reaches the threshold, the lab from the next one on:"
        " similarity_min_count: 1 comes nearest, though one spike then ends the regularizer; the lab's own default is 100",
    ),
    (
        "",
        lambda reading, fields: reading.prefix == "crepa" and CREPA_MODEL.name in reading.values,
        "crepa_model stands in SimpleTuner's documentation, but its parser refuses it; it wins over crepa_encoder, and export"
        " writes crepa_encoder",
    ),
    (
        "",
        lambda reading, fields: reading.irepa,
        "iREPA puts a convolution in the projector's place and normalises the target: projector.type: conv, spatial_norm",
    ),
)


def _differences(reading: Reading, fields: Fields) -> Iterator[Remark]:
    if reading.prefix is None:
        return
    block = fields["regularizer.block_index"]
    words = {
        "family": reading.family.name if reading.family else "",
        "unknown": "" if reading.family else " (which that is cannot be told without model_family)",
        "block": block,
        "depth": block + 1 if isinstance(block, int) else "",
        "pixels": fields["regularizer.encoder.pixels"],
        "side": fields.get("regularizer.resample.side"),
        "decay": fields[_DECAY],
    }
    for suffix, applies, message in DIFFERENCES:
        if applies(reading, fields):
            yield f"{reading.prefix}_{suffix}" if suffix else "", message.format(**words)


# Keys at which SimpleTuner takes 0 for something else, or pays for nothing; what to say of a 0.
_ZEROS = {
    "crepa_lambda": "0 is 0: nothing is added, and the encoder is not run (SimpleTuner decodes and encodes all the same)",
    "urepa_lambda": "SimpleTuner takes 0 for 0.5, and only its schedule makes it 0 again, at full cost; here 0 is 0, and the"
    " encoder is not run",
    "urepa_manifold_weight": "SimpleTuner takes 0 for 3.0; here 0 is 0. Write 3.0 to compute what it computed",
    "crepa_encoder_image_size": "SimpleTuner takes 0 for 518, and so does the import",
    "urepa_encoder_image_size": "SimpleTuner takes 0 for 518, and so does the import",
    "crepa_power": "SimpleTuner takes 0 for 1.0, and so does the import",
    "urepa_power": "SimpleTuner takes 0 for 1.0, and so does the import",
}


def _zeros(reading: Reading) -> Iterator[Remark]:
    for name, message in _ZEROS.items():
        if name in reading.values and reading.is_on(name) and float(reading.given.values[name]) == 0:
            yield name, message


def _not_carried(reading: Reading, fields: Fields) -> Iterator[Remark]:
    for name, why in NOT_CARRIED.items():
        value = reading.given.values.get(name)
        if value is not None and str(value).lower() not in HARMLESS.get(name, ()):
            yield name, f"not carried: {why}"
    yield from _encoder_not_carried(reading, fields)
    rest = [name for name in reading.given.values if name not in READABLE and name not in NOT_CARRIED]
    if rest:
        yield "", f"not carried, for a spec has no place for them: {', '.join(rest)}"


def _encoder_not_carried(reading: Reading, fields: Fields) -> Iterator[Remark]:
    for name in ("crepa_encoder", CREPA_MODEL.name, "urepa_model"):
        if reading.is_on(name) and is_language_model(reading.values.get(name, "")):
            yield (
                name,
                "not carried: a vision-language model yields no grid of patch tokens here; dinov2_vitg14 stands in",
            )
    if (
        reading.prefix
        and reading.part(f"{reading.prefix}_use_tae") == "tae"
        and fields["regularizer.encoder.pixels"] == "vae"
    ):
        latents = f"for the latents of {reading.family.name}" if reading.family else "without model_family"
        message = f"not carried: no tiny autoencoder is known {latents}; give pixels: tae and tae: yourself"
        yield f"{reading.prefix}_use_tae", message


def _without_effect(reading: Reading) -> Iterator[Remark]:
    """Keys of a regularizer that is off; they have no effect there either."""
    for prefix in ("crepa", "urepa", "irepa"):
        names = [name for name in reading.values if name.startswith(f"{prefix}_") and not reading.is_on(name)]
        if names:
            yield "", f"not carried, for {prefix}_enabled is not true: {', '.join(names)}"


def _defaults(reading: Reading) -> Iterator[Remark]:
    keys = [*(KEYS[reading.prefix] if reading.prefix else ()), *(IREPA if reading.irepa else ())]
    keys += [*REST, *PARTS] if reading.family else []
    absent = [key for key in keys if key.name not in reading.values and key.default is not None]
    unsaid = {"crepa_encoder" if CREPA_MODEL.name in reading.values else "", "" if reading.averages else "ema_decay"}
    unsaid |= set(reading.data_set.values) if reading.data_set else set()
    if absent:
        values = ", ".join(f"{key.name} {json.dumps(key.default)}" for key in absent if key.name not in unsaid)
        yield "", f"left out of the config, so SimpleTuner's defaults are written down: {values}"


def _to_fill_in(reading: Reading, fields: Fields) -> Iterator[Remark]:
    """What stands in for what the config does not say."""
    if reading.prefix is None and not any(key.name in reading.values for key in REST):
        yield "", "neither crepa_enabled nor urepa_enabled is true: there is no regularizer"
    if reading.family is None:
        yield (
            "",
            "no model_family, so this is a fragment: name it with use: in a spec, or add model_family and import again",
        )
        if "model_flavour" in reading.values:
            yield "model_flavour", "not carried without model_family, whose release it names"
        yield from _images(reading, fields) if "data_backend_config" in reading.values else ()
        return
    yield from _images(reading, fields)
    yield from _release(reading)
    yield from _stand_ins(reading, fields)
    yield from _evaluation(reading, fields)


def _images(reading: Reading, fields: Fields) -> Iterator[Remark]:
    """What the data backend's file says, or what it would."""
    key, images = "data_backend_config", reading.data_set
    if not (images and images.folder):
        message = "fill in data.path, the folder of images (--set data.path=FOLDER)"
        yield "", f"{message}; SimpleTuner has it in data_backend_config"
    if images is None:
        if key in reading.values:
            message = "is not found here or beside the config, or has no image data set; it may have another resolution"
            yield key, f"'{reading.values[key]}' {message}"
        return
    own = f"data set '{images.name}' of {images.file}"
    if images.folder:
        is_absolute = Path(images.folder).is_absolute()
        relative = "" if is_absolute else ", relative to the folder that SimpleTuner starts in"
        yield key, f"data.path is '{images.folder}', from {own}{relative}"
    elif images.kind:
        saved = "save its images to a folder, or with `Dataset.save_to_disk` (data.source: datasets)"
        yield key, f"{own} is of type {images.kind}: {saved}"
    if "resolution" in images.values:
        yield key, f"data.resolution is {fields['data.resolution']}, from {own}, which overrides the config's"
    if images.keeps_aspect:
        is_edge = images.values.get("resolution_type", reading.part("resolution_type")) == "pixel"
        edge = "; the resolution stands for the area here, and for the shorter edge there" if is_edge else ""
        sides = "data.buckets keeps aspects, up to 2 to 1, in sides that are multiples of 64"
        yield key, f"{own} is not cut to squares: {sides}{edge}"
    if images.captions not in _CAPTIONS:
        here = "here they are read from metadata.jsonl or a .txt beside each image"
        yield key, f"{own}: captions are by {images.captions} there; {here}"
    if images.others:
        yield key, f"not carried: a spec has one data set; the others of {images.file} are {', '.join(images.others)}"


def _release(reading: Reading) -> Iterator[Remark]:
    """Which release is trained, and what is known of it."""
    family, named = reading.family, reading.part("pretrained_model_name_or_path")
    if family is None or family.pipeline is None:
        return
    if family.name not in FLAVOURS:
        if "model_flavour" in reading.values:
            yield "model_flavour", f"not carried: SimpleTuner does not train {family.name}"
    elif "model_flavour" not in reading.values and not named:
        yield "", f"no model_flavour: '{reading.flavour}' ({reading.pretrained}) stands in{_default(family.name)}"
    elif named and _flavours_weights(reading) not in (None, named.lower()):
        yield "model_flavour", "pretrained_model_name_or_path names other weights, and wins, as in SimpleTuner"
    if reading.pretrained != family.pipeline.released:
        blocks = BLOCKS.get(str(reading.pretrained))
        known = f"it has {blocks} blocks, and " if blocks else ""
        is_counted = family.kind == "transformer"  # a UNet has one block to tap
        checked = "; a run checks block_index against the weights before it trains" if is_counted else ""
        yield (
            "",
            (
                f"model.pretrained is {reading.pretrained}: {known}what `plan` says of blocks, parameters, FLOPs and memory"
                f" is counted for {family.pipeline.released}{checked}"
            ),
        )
    if (family.name, reading.flavour) in ASSISTED and reading.part("model_type") == "lora" and not named:
        message = f"SimpleTuner trains '{reading.flavour}' beside an assistant LoRA, which keeps it distilled"
        yield "model_flavour" if "model_flavour" in reading.values else "", f"{message}; the lab has none"


def _flavours_weights(reading: Reading) -> str | None:
    """The weights that ``model_flavour`` names, in lower case; None if it is not given."""
    if reading.family is None or "model_flavour" not in reading.values:
        return None
    return FLAVOURS[reading.family.name][str(reading.flavour)].lower()


def _default(family: str) -> str:
    """What to say where SimpleTuner's own default flavour is not trained here."""
    other = OTHER_DEFAULTS.get(family)
    if other is None:
        return ", as in SimpleTuner"
    return f"; SimpleTuner's own default is '{other}', which the lab does not train: {REFUSED[family][other]}"


def _evaluation(reading: Reading, fields: Fields) -> Iterator[Remark]:
    """What evaluation costs beside training."""
    usual, training = EvaluateConfig(), training_passes(fields)
    calls = 2 if fields.get("evaluate.guidance.scale", 1.0) > 1 else 1
    samples, steps = fields["evaluate.samples"], fields["evaluate.sampler.steps"]
    asked = reading.part("validation_num_inference_steps")
    cut = f" (validation_num_inference_steps {asked} would cost more)" if asked and asked > steps else ""
    noise = ". A Frechet distance of so few samples is mostly noise: raise evaluate.samples"
    passes, usual_passes = samples * steps * calls, usual.samples * usual.sampler.steps * calls
    yield (
        "",
        (
            f"evaluate: {samples:,} samples of {steps} sampling steps{cut}, at the end alone: {passes:,} forward passes;"
            f" training takes about {training:,}. The lab's default, {usual.samples:,} samples of {usual.sampler.steps} steps,"
            f" would take {usual_passes:,}{noise if samples < _FEW_SAMPLES else ''}"
        ),
    )


def _stand_ins(reading: Reading, fields: Fields) -> Iterator[Remark]:
    if reading.uncheckpointed and reading.part("gradient_checkpointing"):
        message = f"not carried: diffusers cannot checkpoint {fields['model.family']}: {reading.uncheckpointed}"
        yield "gradient_checkpointing", message
    if reading.pretrained is None:
        yield "", "fill in model.pretrained: the config names no weights"
    if not reading.part("max_train_steps"):
        yield "", f"fill in train.steps: there is no max_train_steps, so {STAND_IN_STEPS:,} stand in"
    if reading.averages and "use_ema" not in reading.values:
        yield "ema_decay", "carried, though SimpleTuner keeps no average unless use_ema is true"
    if not reading.averages:
        yield "", "use_ema is off, so train.ema is 0.0: what is measured is the weights of the last step"
    alpha, rank = reading.part("lora_alpha"), reading.part("lora_rank")
    if alpha not in (None, rank):
        scale = f"the adapter's scale is 1, and {alpha / rank:g} there"
        yield "lora_alpha", f"not carried: here alpha is the rank, so that {scale}"
    cap, clip = GRAD_CLIP_CAPS.get(reading.family.name if reading.family else ""), reading.part("max_grad_norm")
    if cap and clip and clip > cap:
        yield "max_grad_norm", f"SimpleTuner lowers it to {cap} for this family, unless i_know_what_i_am_doing is set"
    if reading.given.values.get("grad_clip_method", "value") != "norm":
        yield (
            "",
            "max_grad_norm clips the gradient's norm here, and each of its values there unless grad_clip_method is norm",
        )
