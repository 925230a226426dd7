"""From SimpleTuner to a spec: SimpleTuner's `crepa_*`, `urepa_*` and `irepa_*` keys, and what a spec needs besides.

Every value SimpleTuner would use is written down, its defaults included. What a spec has no place for is named, and so
is every place where the two compute something else from the same number.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from repa_lab.bridge.given import printable, read_config
from repa_lab.bridge.grids import encoder_grid, shrinking_side, student_grid
from repa_lab.bridge.keys import (
    CREPA_MODEL,
    IREPA,
    KEYS,
    REST,
    SAMPLING_STEPS,
    STAND_IN_STEPS,
    TINY_AUTOENCODERS,
    is_language_model,
)
from repa_lab.bridge.read import READABLE, REGULARIZERS, Reading, read
from repa_lab.bridge.remarks import remarks, training_passes
from repa_lab.spec.errors import Problem, SpecError
from repa_lab.spec.evaluate import EvaluateConfig
from repa_lab.spec.experiment import load_spec
from repa_lab.spec.yaml import parse_scalar

_WIDTH = 120
_BASELINE = "# include: [{label: baseline, set: {regularizer.type: none}}]  # without its # it is compared with none"
_ORDER = ("name", "question", "model", "regularizer", "data", "train", "evaluate", "seeds", "run")
# The fewest samples that a spec can ask for, and the fewest sampling steps that an evaluation is cut down to.
_LEAST_SAMPLES, _LEAST_STEPS = 16, 8
# What a fragment lacks of a spec, so that the grammar can check it.
_AROUND: dict[str, Any] = {
    "name": "fragment",
    "model": {"family": "none"},
    "data": {"source": "imagefolder"},
    "train": {"steps": 1},
}


@dataclass(frozen=True)
class Imported:
    """A spec as the text of a YAML file, and what there is to say of it, a line each."""

    spec: str
    remarks: tuple[str, ...]


def import_config(words: Sequence[str]) -> Imported:
    """Turn a SimpleTuner config into a spec, or into a fragment for ``use:`` where it names no ``model_family``.

    Args:
        words: the name of a file with a JSON object or with flags, or the flags themselves.

    Raises:
        SpecError: with every problem, each at the key that has it.
    """
    reading = read(read_config(words))
    fields = {**_regularizer(reading), **_rest(reading)}
    spec = _nested(fields)
    _check(spec, reading)
    said = list(remarks(reading, fields))
    header = [f"Imported from {reading.source}, a SimpleTuner config, by `repa-lab import`. What there is to know:"]
    header += [f"- {key}: {message}" if key else f"- {message}" for key, message in said]
    lines = [*itertools.chain.from_iterable(map(_comment, header)), *_entries(spec, "")]
    lines += [_BASELINE] if reading.family and reading.prefix else []
    return Imported("\n".join(lines) + "\n", tuple(_line(reading, key, message) for key, message in said))


def _regularizer(reading: Reading) -> dict[str, Any]:
    """The fields of the regularizer by dotted path, in the order in which a person would write them."""
    if reading.prefix is None:
        return {"regularizer.type": "none"}
    fields: dict[str, Any] = {"regularizer.type": REGULARIZERS[reading.prefix], "regularizer.weight": 0.0}
    fields["regularizer.block_index"] = "mid"
    fields |= {key.field: reading.value(key) for key in KEYS[reading.prefix]}
    fields |= {"regularizer.projector.type": "conv" if reading.irepa else "linear"}
    fields |= {key.field: reading.value(key) for key in IREPA if reading.irepa}
    fields |= _encoder(reading, fields)
    return fields | _resample(reading, fields) | _decay(fields) | _cutoff(fields)


def _encoder(reading: Reading, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder where one key alone does not say it: under another key, or of pixels that cannot be had."""
    name = fields["regularizer.encoder.name"]
    if reading.prefix == "crepa":
        name = reading.values.get(CREPA_MODEL.name, name)
    encoder = {"regularizer.encoder.name": "dinov2_vitg14" if is_language_model(name) else name}
    if fields["regularizer.encoder.pixels"] == "tae":
        tiny = TINY_AUTOENCODERS.get(reading.family.name) if reading.family else None
        encoder |= {"regularizer.encoder.tae": tiny} if tiny else {"regularizer.encoder.pixels": "vae"}
    return encoder


def _resample(reading: Reading, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Which side shrinks. Without a family: UNets have the smaller grid at its defaults, transformers the larger."""
    if not fields.get("regularizer.spatial_align", True):
        return {}
    side = "teacher" if reading.prefix == "urepa" else "student"
    if reading.family is not None:
        grid = encoder_grid(fields["regularizer.encoder.name"], fields["regularizer.encoder.image_size"])
        side = shrinking_side(student_grid(reading.family, None, reading.resolution), grid)
    return {"regularizer.resample.side": side, "regularizer.resample.when": "after"}


def _decay(fields: Mapping[str, Any]) -> dict[str, Any]:
    """In SimpleTuner a decay that ends during the warm-up takes one step after it."""
    schedule = "regularizer.schedule"
    warmup, end = fields[f"{schedule}.warmup_steps"], fields[f"{schedule}.decay_steps"]
    ends_early = fields[f"{schedule}.type"] != "constant" and 0 < end <= warmup
    return {f"{schedule}.decay_steps": warmup + 1} if ends_early else {}


def _cutoff(fields: Mapping[str, Any]) -> dict[str, Any]:
    """SimpleTuner judges the similarity from the first step on, and at every step."""
    schedule = "regularizer.schedule"
    if fields[f"{schedule}.similarity_threshold"] is None:
        return {}
    recoverable = fields[f"{schedule}.threshold_mode"] == "recoverable"
    return {f"{schedule}.similarity_min_count": 1} | ({f"{schedule}.probe_every": 1} if recoverable else {})


_CHECKPOINTING = "run.gradient_checkpointing"


def _rest(reading: Reading) -> dict[str, Any]:
    """The fields beside the regularizer: all that a spec needs, or those that were given if there is no family."""
    whole = reading.family is not None
    fields: dict[str, Any] = {}
    if reading.family is not None:
        fields |= {"model.family": reading.family.name, "data.source": "imagefolder", "data.path": None}
    fields |= _images(reading)
    fields |= {key.field: reading.value(key) for key in REST if whole or key.name in reading.values}
    fields |= _batch(reading) | _average(reading)
    if whole or "resolution" in reading.values or (reading.data_set and "resolution" in reading.data_set.values):
        fields["data.resolution"] = reading.resolution
    if "seed" in reading.values:
        fields["seeds"] = [reading.values["seed"]]
    fields |= _stand_ins(reading, fields)
    if reading.uncheckpointed and fields.get(_CHECKPOINTING):
        fields[_CHECKPOINTING] = False
    return fields | _evaluation(reading, fields)


def _images(reading: Reading) -> dict[str, Any]:
    """What the data backend's file says of the images, if it is to be had."""
    if reading.data_set is None:
        return {}
    folder = reading.data_set.folder
    buckets = {"data.buckets.step": 64, "data.buckets.max_aspect": 2.0} if reading.data_set.keeps_aspect else {}
    return {**({"data.path": folder} if folder else {}), **buckets}


def _evaluation(reading: Reading, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation, at the end, that takes about as many forward passes as the training at most."""
    steps, scale = reading.part("validation_num_inference_steps"), reading.part("validation_guidance")
    guidance = {} if scale is None else {"evaluate.guidance.scale": max(scale, 1.0)}
    if reading.family is None:
        return guidance | ({} if steps is None else {"evaluate.sampler.steps": max(steps, 2)})
    training = training_passes(fields)
    calls = 2 if guidance and guidance["evaluate.guidance.scale"] > 1 else 1
    affordable = max(training // (_LEAST_SAMPLES * calls), _LEAST_STEPS)
    steps = max(min(steps or SAMPLING_STEPS, affordable), 2)
    samples = min(max(training // (steps * calls), _LEAST_SAMPLES), EvaluateConfig().samples)
    return {
        "evaluate.every": fields["train.steps"],
        "evaluate.samples": samples,
        "evaluate.sampler.steps": steps,
        **guidance,
    }


def _batch(reading: Reading) -> dict[str, Any]:
    if reading.family is None and "train_batch_size" not in reading.values:
        return {}
    at_once, times = reading.part("train_batch_size"), reading.part("gradient_accumulation_steps")
    return {"train.batch_size": at_once * times} | ({"run.micro_batch": at_once} if times > 1 else {})


def _average(reading: Reading) -> dict[str, Any]:
    if reading.averages:
        return {"train.ema": reading.part("ema_decay")}
    return {"train.ema": 0.0} if reading.family is not None else {}


def _stand_ins(reading: Reading, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a whole spec cannot do without and the config leaves to SimpleTuner or to another file."""
    if reading.family is None:
        return {}
    name = reading.family.name
    return {
        "name": f"{name}_{REGULARIZERS.get(str(reading.prefix), 'none')}",
        "question": f"What do the settings of {reading.given.file.name if reading.given.file else 'the flags'} do to {name}?",
        "model.pretrained": reading.pretrained,
        "train.steps": fields["train.steps"] or STAND_IN_STEPS,
    }


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {section: {} for section in _ORDER}
    for dotted, value in fields.items():
        if value is None and dotted.startswith("run."):
            continue  # the lab's own way
        *sections, last = dotted.split(".")
        inside = spec
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return {section: value for section, value in spec.items() if value != {}}


def _check(spec: Mapping[str, Any], reading: Reading) -> None:
    """Hold the spec against the grammar, and say what is wrong at the key that brought it."""
    around = {} if reading.family else _AROUND
    filled = {
        key: {**around[key], **value} if isinstance(around.get(key), dict) else value for key, value in spec.items()
    }
    try:
        load_spec({**around, **filled})
    except SpecError as error:
        raise SpecError(reading.given.problem(_key_of(one, reading), one.message) for one in error.problems) from None


def _key_of(problem: Problem, reading: Reading) -> str:
    """The key behind a path of the spec: the one that sets it, or the one inside that the message speaks of first."""
    given = [READABLE[name] for name in reading.values if reading.is_on(name)]
    setting = [key.name for key in given if f"{problem.path}.".startswith(f"{key.field}.")]
    inside = [key for key in given if key.field.startswith(f"{problem.path}.")]
    places = sorted((problem.message.find(key.field.rpartition(".")[2]), key.name) for key in inside)
    return next(itertools.chain(setting, (name for place, name in places if place >= 0)), problem.path)


def _line(reading: Reading, key: str, message: str) -> str:
    if key in reading.given.places:
        return str(reading.given.problem(key, message))
    return printable(": ".join(part for part in (reading.source, key, message) if part))


def _comment(text: str) -> Iterator[str]:
    indent = "#   " if text.startswith("- ") else "# "
    yield from textwrap.wrap(
        printable(text), _WIDTH, initial_indent="# ", subsequent_indent=indent, break_on_hyphens=False
    )


def _entries(section: Mapping[str, Any], indent: str) -> Iterator[str]:
    """YAML with what fits on a line on one line."""
    for key, value in section.items():
        line = f"{indent}{key}: {_flow(value)}"
        if isinstance(value, dict) and len(line) > _WIDTH:
            yield f"{indent}{key}:"
            yield from _entries(value, f"{indent}  ")
        else:
            yield line


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        return value if _is_plain(value) else yaml.safe_dump(value, default_style='"', width=float("inf")).strip()
    return "null" if value is None else str(value).lower()


def _is_plain(value: str) -> bool:
    """Whether text needs no quotes: it has no character of YAML's own, and is not read as a number or the like."""
    return re.fullmatch(r"[A-Za-z0-9_/.][A-Za-z0-9_/.-]*", value) is not None and parse_scalar(value) == value
