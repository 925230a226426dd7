"""What there is to say of an imported config: what was left behind, what stands in, and where the two trainers differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from repa_lab.bridge.keys import (
    CREPA_MODEL,
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

Fields = Mapping[str, Any]
Remark = tuple[str, str]  # the key it is about, or nothing, and what to say


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


def _is_given(name: str) -> Callable[[Reading, Fields], bool]:
    return lambda reading, fields: name in reading.values


def _schedules(reading: Reading, fields: Fields) -> bool:
    return bool(fields["regularizer.schedule.type"] != "constant")


def _judges_similarity(reading: Reading, fields: Fields) -> bool:
    return fields["regularizer.schedule.similarity_threshold"] is not None


def _always(reading: Reading, fields: Fields) -> bool:
    return True


def _is(prefix: str) -> Callable[[Reading, Fields], bool]:
    return lambda reading, fields: reading.prefix == prefix


# Where that trainer computes something else from the same number: the key, its prefix left out, when, and what to say.
DIFFERENCES: tuple[tuple[str, Callable[[Reading, Fields], bool], str], ...] = (
    (
        "enabled",
        lambda reading, fields: reading.family is not None and reading.family.name in NEVER_ATTACHED,
        "that trainer never attaches its regularizer to {family}: what it trained there was a baseline; here it attaches",
    ),
    (
        "enabled",
        _always,
        "that trainer's target is the encoder's CLS token alone, to which it shrinks the student's grid; here the targets are"
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
        "that trainer's encoder looks at decoded latents, squashed to a square, not at the images: pixels: {pixels} does the"
        " same but for the squash (the papers' way is image)",
    ),
    (
        "",
        lambda reading, fields: not reading.irepa,
        "projector: {{type: linear}} is that trainer's LayerNorm + Linear; the papers' is mlp",
    ),
    (
        "",
        lambda reading, fields: "regularizer.resample.side" in fields,
        "resample.side: {side}, for that trainer shrinks the larger grid{unknown}; the papers resample the student",
    ),
    (
        "decay_steps",
        _schedules,
        "the step at which the decay ends, counted from 0 and warm-up included, as that trainer computes it; its documentation"
        " calls it a duration. 0 is the end of training in both",
    ),
    (
        "similarity_threshold",
        _judges_similarity,
        "that trainer has no bias correction and no minimum count, and judges every step, each process for itself:"
        " similarity_min_count: 1 comes nearest, though one spike then ends the regularizer; the lab's own default is 100",
    ),
    (
        "",
        lambda reading, fields: reading.prefix == "crepa" and CREPA_MODEL.name in reading.values,
        "crepa_model stands in that trainer's documentation, but its parser refuses it; it wins over crepa_encoder, and export"
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
    }
    for suffix, applies, message in DIFFERENCES:
        if applies(reading, fields):
            yield f"{reading.prefix}_{suffix}" if suffix else "", message.format(**words)


# Keys at which that trainer takes 0 for something else, or pays for nothing; what to say of a 0.
_ZEROS = {
    "crepa_lambda": "0 is 0: nothing is added, and the encoder is not run (that trainer decodes and encodes all the same)",
    "urepa_lambda": "that trainer takes 0 for 0.5, and only its schedule makes it 0 again, at full cost; here 0 is 0, and the"
    " encoder is not run",
    "urepa_manifold_weight": "that trainer takes 0 for 3.0; here 0 is 0. Write 3.0 to compute what it computed",
    "crepa_encoder_image_size": "that trainer takes 0 for 518, and so does the import",
    "urepa_encoder_image_size": "that trainer takes 0 for 518, and so does the import",
    "crepa_power": "that trainer takes 0 for 1.0, and so does the import",
    "urepa_power": "that trainer takes 0 for 1.0, and so does the import",
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
            yield name, "not carried: a vision-language model yields no grid of patch tokens here; dinov2_vitg14 stands in"
    if reading.prefix and reading.part(f"{reading.prefix}_use_tae") == "tae" and fields["regularizer.encoder.pixels"] == "vae":
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
    if absent:
        values = ", ".join(f"{key.name} {json.dumps(key.default)}" for key in absent if key.name not in unsaid)
        yield "", f"left out of the config, so that trainer's defaults are written down: {values}"


def _to_fill_in(reading: Reading, fields: Fields) -> Iterator[Remark]:
    """What stands in for what the config does not say."""
    if reading.prefix is None and not any(key.name in reading.values for key in REST):
        yield "", "neither crepa_enabled nor urepa_enabled is true: there is no regularizer"
    if reading.family is None:
        yield "", "no model_family, so this is a fragment: name it with use: in a spec, or add model_family and import again"
        return
    yield "", "fill in data.path, the folder of images (--set data.path=FOLDER); that trainer has it in data_backend_config"
    yield from _stand_ins(reading, fields)


def _stand_ins(reading: Reading, fields: Fields) -> Iterator[Remark]:
    if not reading.part("pretrained_model_name_or_path"):
        yield "", f"fill in model.pretrained: the config does not say; {fields['model.pretrained'] or 'nothing'} stands in"
    if not reading.part("max_train_steps"):
        yield "", f"fill in train.steps: there is no max_train_steps, so {STAND_IN_STEPS:,} stand in"
    if reading.averages and "use_ema" not in reading.values:
        yield "ema_decay", "carried, though that trainer keeps no average unless use_ema is true"
    if not reading.averages:
        yield "", "use_ema is off, so train.ema is 0.0: what is measured is the weights of the last step"
    if reading.given.values.get("grad_clip_method", "value") != "norm":
        yield "", "max_grad_norm clips the gradient's norm here, and each of its values there unless grad_clip_method is norm"
