"""From SimpleTuner to a spec: the `crepa_*`, `urepa_*` and `irepa_*` keys, and the other settings that a spec needs.

Every value that SimpleTuner would use is written, its defaults included. Settings without a field in a spec are named,
and so are differences between what the two trainers compute from the same number.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from repa_lab.bridge.config import REGULARIZERS, Config, printable, read_config
from repa_lab.bridge.remarks import remarks, training_passes
from repa_lab.bridge.simpletuner import (
    CREPA_MODEL,
    IREPA,
    KEYS,
    READABLE,
    REST,
    SAMPLING_STEPS,
    STAND_IN_STEPS,
    TINY_AUTOENCODERS,
    encoder_grid,
    is_language_model,
    shrinking_side,
    student_grid,
)
from repa_lab.spec.errors import Problem, SpecError
from repa_lab.spec.evaluate import EvaluateConfig
from repa_lab.spec.experiment import load_spec
from repa_lab.spec.yaml import parse_scalar

_WIDTH = 120
_BASELINE = (
    "# include: [{label: baseline, set: {regularizer.type: none}}]  # remove the first # to compare with a baseline"
)
_ORDER = ("name", "question", "model", "regularizer", "data", "train", "evaluate", "seeds", "run")
# The fewest samples that a spec can ask for, and the fewest sampling steps that an evaluation is cut down to.
_MIN_SAMPLES, _MIN_STEPS = 16, 8
# Completes a fragment to a spec, so that it can be validated.
_REQUIRED: dict[str, Any] = {
    "name": "fragment",
    "model": {"family": "none"},
    "data": {"source": "imagefolder"},
    "train": {"steps": 1},
}
_CHECKPOINTING = "run.gradient_checkpointing"
_SCHEDULE = "regularizer.schedule"


@dataclass(frozen=True)
class Imported:
    """A spec as the text of a YAML file, and remarks on the import, a line each."""

    spec: str
    remarks: tuple[str, ...]


def import_config(words: Sequence[str]) -> Imported:
    """Turn a SimpleTuner config into a spec, or into a fragment for ``use:`` if the config names no ``model_family``.

    Args:
        words: the name of a file with a JSON object or with flags, or the flags themselves.

    Raises:
        SpecError: with every problem, each at its key.
    """
    config = read_config(words)
    fields = {**_regularizer(config), **_rest(config)}
    spec = _nested(fields)
    _validate(spec, config)
    messages = list(remarks(config, fields))
    header = [f"Imported from {config.source}, a SimpleTuner config, by `repa-lab import`. What there is to know:"]
    header += [f"- {key}: {message}" if key else f"- {message}" for key, message in messages]
    lines = [*itertools.chain.from_iterable(map(_comment, header)), *_yaml_lines(spec, "")]
    lines += [_BASELINE] if config.family and config.prefix else []
    return Imported("\n".join(lines) + "\n", tuple(_located(config, key, message) for key, message in messages))


def _located(config: Config, key: str, message: str) -> str:
    if key in config.text.places:
        return str(config.text.problem(key, message))
    return printable(": ".join(text for text in (config.source, key, message) if text))


# ---- the fields of the spec, by dotted path


def _regularizer(config: Config) -> dict[str, Any]:
    """Return the fields of the regularizer, in the order in which a person would write them."""
    if config.prefix is None:
        return {"regularizer.type": "none"}
    fields: dict[str, Any] = {"regularizer.type": REGULARIZERS[config.prefix], "regularizer.weight": 0.0}
    fields["regularizer.block_index"] = "mid"
    fields |= {key.field: config.value(key) for key in KEYS[config.prefix]}
    fields |= {"regularizer.projector.type": "conv" if config.irepa else "linear"}
    fields |= {key.field: config.value(key) for key in IREPA if config.irepa}
    fields |= _encoder(config, fields)
    if fields.get("regularizer.spatial_align", True):
        # Without a family: UNets have the smaller grid at SimpleTuner's defaults, transformers the larger.
        side = "teacher" if config.prefix == "urepa" else "student"
        if config.family is not None:
            grid = encoder_grid(fields["regularizer.encoder.name"], fields["regularizer.encoder.image_size"])
            side = shrinking_side(student_grid(config.family, None, config.resolution), grid)
        fields |= {"regularizer.resample.side": side, "regularizer.resample.when": "after"}
    warmup, end = fields[f"{_SCHEDULE}.warmup_steps"], fields[f"{_SCHEDULE}.decay_steps"]
    if fields[f"{_SCHEDULE}.type"] != "constant" and 0 < end <= warmup:
        # In SimpleTuner a decay that ends during the warm-up takes one step after it.
        fields[f"{_SCHEDULE}.decay_steps"] = warmup + 1
    if fields[f"{_SCHEDULE}.similarity_threshold"] is not None:
        # SimpleTuner judges the similarity from the first step on, and at every step.
        fields[f"{_SCHEDULE}.similarity_min_count"] = 1
        if fields[f"{_SCHEDULE}.threshold_mode"] == "recoverable":
            fields[f"{_SCHEDULE}.probe_every"] = 1
    return fields


def _encoder(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    name = fields["regularizer.encoder.name"]
    if config.prefix == "crepa":
        name = config.values.get(CREPA_MODEL.name, name)
    encoder = {"regularizer.encoder.name": "dinov2_vitg14" if is_language_model(name) else name}
    if fields["regularizer.encoder.pixels"] == "tae":
        tiny = TINY_AUTOENCODERS.get(config.family.name) if config.family else None
        encoder |= {"regularizer.encoder.tae": tiny} if tiny else {"regularizer.encoder.pixels": "vae"}
    return encoder


def _rest(config: Config) -> dict[str, Any]:
    """Return the fields beside the regularizer: those that a spec needs, or those that were given without a family."""
    family, data_set = config.family, config.data_set
    fields: dict[str, Any] = {}
    if family is not None:
        fields |= {"model.family": family.name, "data.source": "imagefolder", "data.path": None}
    if data_set is not None:
        fields |= {"data.path": data_set.folder} if data_set.folder else {}
        fields |= {"data.buckets.step": 64, "data.buckets.max_aspect": 2.0} if data_set.keeps_aspect else {}
    fields |= {key.field: config.value(key) for key in REST if family is not None or key.name in config.values}
    if family is not None or "train_batch_size" in config.values:
        micro_batch, accumulation = (config.value(key) for key in ("train_batch_size", "gradient_accumulation_steps"))
        fields["train.batch_size"] = micro_batch * accumulation
        fields |= {"run.micro_batch": micro_batch} if accumulation > 1 else {}
    if config.averages:
        fields["train.ema"] = config.value("ema_decay")
    elif family is not None:
        fields["train.ema"] = 0.0
    if family is not None or "resolution" in config.values or (data_set and "resolution" in data_set.values):
        fields["data.resolution"] = config.resolution
    if "seed" in config.values:
        fields["seeds"] = [config.values["seed"]]
    if family is not None:
        file = config.text.file.name if config.text.file else "the flags"
        fields |= {
            "name": f"{family.name}_{REGULARIZERS.get(str(config.prefix), 'none')}",
            "question": f"What do the settings of {file} do to {family.name}?",
            "model.pretrained": config.pretrained,
            "train.steps": fields["train.steps"] or STAND_IN_STEPS,
        }
    if config.uncheckpointed and fields.get(_CHECKPOINTING):
        fields[_CHECKPOINTING] = False
    return fields | _evaluation(config, fields)


def _evaluation(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return one evaluation, at the end, that takes at most about as many forward passes as the training."""
    steps, scale = config.value("validation_num_inference_steps"), config.value("validation_guidance")
    guidance = {} if scale is None else {"evaluate.guidance.scale": max(scale, 1.0)}
    if config.family is None:
        return guidance | ({} if steps is None else {"evaluate.sampler.steps": max(steps, 2)})
    training = training_passes(fields)
    calls = 2 if guidance and guidance["evaluate.guidance.scale"] > 1 else 1
    affordable = max(training // (_MIN_SAMPLES * calls), _MIN_STEPS)
    steps = max(min(steps or SAMPLING_STEPS, affordable), 2)
    samples = min(max(training // (steps * calls), _MIN_SAMPLES), EvaluateConfig().samples)
    evaluation = {"every": fields["train.steps"], "samples": samples, "sampler.steps": steps}
    return {f"evaluate.{name}": value for name, value in evaluation.items()} | guidance


# ---- the spec as YAML


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {section: {} for section in _ORDER}
    for dotted, value in fields.items():
        if value is None and dotted.startswith("run."):
            continue  # repa-lab chooses
        *sections, last = dotted.split(".")
        inner = spec
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return {section: value for section, value in spec.items() if value != {}}


def _validate(spec: Mapping[str, Any], config: Config) -> None:
    """Validate the spec, and report problems at the keys that caused them."""
    required = {} if config.family else _REQUIRED
    filled = {
        key: {**required[key], **value} if isinstance(required.get(key), dict) else value for key, value in spec.items()
    }
    try:
        load_spec({**required, **filled})
    except SpecError as error:
        problems = [config.text.problem(_key_of(problem, config), problem.message) for problem in error.problems]
        raise SpecError(problems) from None


def _key_of(problem: Problem, config: Config) -> str:
    """Return the key that sets the problem's field; else the key inside it that the message mentions first."""
    given = [READABLE[name] for name in config.values if config.is_on(name)]
    setting = [key.name for key in given if f"{problem.path}.".startswith(f"{key.field}.")]
    inside = [key for key in given if key.field.startswith(f"{problem.path}.")]
    places = sorted((problem.message.find(key.field.rpartition(".")[2]), key.name) for key in inside)
    return next(itertools.chain(setting, (name for place, name in places if place >= 0)), problem.path)


def _comment(text: str) -> Iterator[str]:
    indent = "#   " if text.startswith("- ") else "# "
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent="# ", subsequent_indent=indent, break_on_hyphens=False)
    yield from wrapper.wrap(printable(text))


def _yaml_lines(section: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Yield YAML; a section is on one line if it fits."""
    for key, value in section.items():
        line = f"{indent}{key}: {_flow(value)}"
        if isinstance(value, dict) and len(line) > _WIDTH:
            yield f"{indent}{key}:"
            yield from _yaml_lines(value, f"{indent}  ")
        else:
            yield line


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        # Text needs no quotes if it has no character of YAML's own and does not read as a number or the like.
        is_plain = re.fullmatch(r"[A-Za-z0-9_/.][A-Za-z0-9_/.-]*", value) and parse_scalar(value) == value
        return value if is_plain else yaml.safe_dump(value, default_style='"', width=float("inf")).strip()
    return "null" if value is None else str(value).lower()
