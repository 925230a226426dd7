"""From SimpleTuner to a spec: the keys of its regularizers, and the other settings that a spec needs.

Every value that SimpleTuner would use is written, its defaults included. Settings without a field in a spec are named,
and so are differences between what the two trainers compute from the same number.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from repa_lab.bridge.config import Config, read_config
from repa_lab.bridge.remarks import Fields, remarks
from repa_lab.bridge.simpletuner import (
    ADDED,
    ADDED_PREFIXES,
    CREPA_MODEL,
    CUMULATIVE,
    FRAMES,
    IREPA,
    KEYS,
    READABLE,
    REST,
    STAND_IN_STEPS,
    TINY_AUTOENCODERS,
    Prefix,
    is_language_model,
    resample_side,
)
from repa_lab.errors import Place, Problem, SpecError, printable
from repa_lab.spec.document import Draft, to_yaml
from repa_lab.spec.evaluate import EvaluateConfig
from repa_lab.spec.experiment import load_spec

_WIDTH = 110
_BASELINE = (
    "# include: [{label: baseline, set: {regularizer.type: none}}]  # remove the first # to compare with a baseline\n"
)
_ORDER = ("name", "question", "model", "regularizer", "data", "train", "evaluate", "seeds", "run")
_PASSES = 3  # forward passes that a training step costs: a backward pass costs about two
_MIN_SAMPLES = 16  # the fewest that a spec can ask for
# Completes a fragment to a spec, so that it can be validated.
_REQUIRED = {"name": "fragment", "model.family": "none", "data.source": "imagefolder", "train.steps": 1}


@dataclass(frozen=True)
class Imported:
    """A spec as the text of a YAML file, and remarks on the import, a line each."""

    spec: str
    remarks: tuple[str, ...]


def import_config(words: Sequence[str]) -> Imported:
    """Turn a SimpleTuner config into a spec, or into a fragment for ``use:`` if the config names no ``model_family``.

    Args:
        words: the name of a file with a JSON object, or flags.

    Raises:
        SpecError: with every problem, each at its key.
    """
    config = read_config(words)
    members, rest = _regularizers(config), _rest(config)
    fields = {**members[0], **rest}
    _validate(members, rest, config)
    messages = [config.problem(key, message) for key, message in remarks(config, fields)]
    source = config.file or "flags"
    header = [f"Imported from {source}, a SimpleTuner config, by `repa-lab import`. What there is to know:"]
    header += [f"- {remark.path}: {remark.message}" if remark.path else f"- {remark.message}" for remark in messages]
    comments = "".join(f"{line}\n" for paragraph in header for line in _comment(paragraph))
    baseline = _BASELINE if config.family and (config.prefix or config.added) else ""
    return Imported(comments + to_yaml(_document(members, rest), _WIDTH) + baseline, tuple(map(str, messages)))


def _comment(text: str) -> Iterator[str]:
    indent = "#   " if text.startswith("- ") else "# "
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent="# ", subsequent_indent=indent, break_on_hyphens=False)
    yield from wrapper.wrap(printable(text))


def _regularizers(config: Config) -> list[dict[str, Any]]:
    """Return the fields of each regularizer, in the order in which a person would write them."""
    members = [_aligned(config, config.prefix)] if config.prefix else []
    for kind in config.added:
        chosen: dict[str, Any] = {"regularizer.type": kind}
        chosen |= {key.field: config.value(key.name) for key in ADDED[kind]}
        if kind == "self_transcendence":
            chosen |= {"regularizer.projector.type": "mlp", "regularizer.loss": "mse"}
        members.append(chosen)
    return members or [{"regularizer.type": "none"}]


def _aligned(config: Config, prefix: Prefix) -> dict[str, Any]:
    """Return the fields of the regularizer that aligns with an encoder."""
    family = config.family
    fields: dict[str, Any] = {"regularizer.type": config.regularizer, "regularizer.weight": 0.0}
    fields |= {"regularizer.block_index": "mid"}
    fields |= {key.field: config.value(key.name) for key in KEYS[prefix]}
    if config.regularizer == "crepa":
        fields |= {key.field: config.value(key.name) for key in (*FRAMES, CUMULATIVE)}
    fields |= {"regularizer.projector.type": "conv" if config.irepa else "linear"}
    fields |= {key.field: config.value(key.name) for key in IREPA if config.irepa}
    if prefix == "crepa":
        fields |= {CREPA_MODEL.field: config.values.get(CREPA_MODEL.name, fields[CREPA_MODEL.field])}
    encoder = "regularizer.encoder"
    if is_language_model(fields[f"{encoder}.name"]):
        fields[f"{encoder}.name"] = "dinov2_vitg14"
    if fields[f"{encoder}.pixels"] == "tae":
        tiny = TINY_AUTOENCODERS.get(family.name) if family else None
        fields |= {f"{encoder}.tae": tiny} if tiny else {f"{encoder}.pixels": "vae"}
    if fields.get("regularizer.spatial_align", True):
        # Without a family: UNets have the smaller grid at SimpleTuner's defaults, transformers the larger.
        side = "teacher" if prefix == "urepa" else "student"
        if family is not None:
            grids = (fields[f"{encoder}.name"], fields[f"{encoder}.image_size"])
            side = resample_side(family, None, config.resolution, *grids) or "student"
        fields |= {"regularizer.resample.side": side, "regularizer.resample.when": "after"}
    schedule = "regularizer.schedule"
    warmup, end = fields[f"{schedule}.warmup_steps"], fields[f"{schedule}.decay_steps"]
    if fields[f"{schedule}.type"] != "constant" and 0 < end <= warmup:
        # In SimpleTuner a decay that ends during the warm-up takes one step after it.
        fields[f"{schedule}.decay_steps"] = warmup + 1
    if fields[f"{schedule}.similarity_threshold"] is not None:
        # SimpleTuner judges the similarity from the first step on, and at every step.
        fields[f"{schedule}.similarity_min_count"] = 1
        if fields[f"{schedule}.threshold_mode"] == "recoverable":
            fields[f"{schedule}.probe_every"] = 1
    return fields


def _rest(config: Config) -> dict[str, Any]:
    """Return the fields beside the regularizer: those that a spec needs, or those that were given without a family."""
    family, data_set = config.family, config.data_set

    def is_written(*names: str) -> bool:
        return family is not None or any(name in config.values for name in names)

    fields: dict[str, Any] = {}
    if family is not None:
        source = "clips" if family.is_video else "imagefolder"
        fields |= {"model.family": family.name, "data.source": source, "data.path": None}
    if data_set is not None:
        fields |= {"data.frames": frames} if (frames := data_set.values.get("video.num_frames")) else {}
        fields |= {"data.path": data_set.folder} if data_set.folder else {}
        fields |= {"data.buckets.step": 64, "data.buckets.max_aspect": 2.0} if data_set.keeps_aspect else {}
    fields |= {key.field: config.value(key.name) for key in REST if is_written(key.name)}
    if is_written("train_batch_size"):
        micro_batch, accumulation = config.value("train_batch_size"), config.value("gradient_accumulation_steps")
        fields["train.batch_size"] = micro_batch * accumulation
        fields |= {"run.micro_batch": micro_batch} if accumulation > 1 else {}
    if is_written("use_ema"):
        fields["train.ema"] = config.value("ema_decay") if config.value("use_ema") else 0.0
    if is_written("resolution") or (data_set and "resolution" in data_set.values):
        fields["data.resolution"] = config.resolution
    if "seed" in config.values:
        fields["seeds"] = [config.values["seed"]]
    if "validation_guidance" in config.values:
        fields["evaluate.guidance.scale"] = config.value("validation_guidance")
    if is_written("validation_num_inference_steps"):
        fields["evaluate.sampler.steps"] = max(config.value("validation_num_inference_steps"), 2)
    if family is not None:
        types = [*([config.regularizer] if config.regularizer else []), *config.added]
        source, steps = config.file.name if config.file else "the flags", fields["train.steps"] or STAND_IN_STEPS
        if family.network and family.network.uncheckpointed:
            fields["run.gradient_checkpointing"] = False
        # One evaluation, at the end, that takes about as many forward passes as the training.
        affordable = steps * fields["train.batch_size"] * _PASSES // fields["evaluate.sampler.steps"]
        fields |= {
            "name": "_".join([family.name, *(types or ["none"])]),
            "question": f"What do the settings of {source} do to {family.name}?",
            "model.pretrained": config.pretrained,
            "train.steps": steps,
            "evaluate.every": steps,
            "evaluate.samples": min(max(affordable, _MIN_SAMPLES), EvaluateConfig().samples),
        }
    return fields


def _document(members: Sequence[Fields], rest: Fields) -> dict[str, Any]:
    """Return the spec, with a list of regularizers if there are several."""
    document = _nested({**members[0], **rest})
    if len(members) > 1:
        document["regularizer"] = [_nested(member)["regularizer"] for member in members]
    return document


def _nested(fields: Fields) -> dict[str, Any]:
    draft = Draft({section: {} for section in _ORDER})
    for path, value in fields.items():
        if value is not None or not path.startswith("run."):  # of which repa-lab chooses
            draft.set(path, value, Place(None))
    return {section: value for section, value in draft.value.items() if value != {}}


def _validate(members: Sequence[Fields], rest: Fields, config: Config) -> None:
    """Validate the spec, and report problems at the keys that caused them."""
    try:
        load_spec(_document(members, {**({} if config.family else _REQUIRED), **rest}))
    except SpecError as error:
        problems = [config.problem(_key_of(problem, config), problem.message) for problem in error.problems]
        raise SpecError(problems) from None


def _key_of(problem: Problem, config: Config) -> str:
    """Return the key that sets the problem's field; else the key inside it that the message mentions first."""
    prefixes = [*([f"{config.prefix}_"] if config.prefix else []), *(ADDED_PREFIXES[kind] for kind in config.added)]
    section, _, place = problem.path.partition(".")
    number, _, field = place.partition(".")
    others: tuple[str, ...] = ()
    path = problem.path
    if section == "regularizer" and number.isdecimal():  # of several
        others, path = tuple(prefixes[: int(number)] + prefixes[int(number) + 1 :]), f"{section}.{field}"
    given = [READABLE[name] for name in config.values if config.is_on(name) and not name.startswith(others)]
    setting = [key.name for key in given if f"{path}.".startswith(f"{key.field}.")]
    inside = [key for key in given if key.field.startswith(f"{path}.")]
    places = sorted((problem.message.find(key.field.rpartition(".")[2]), key.name) for key in inside)
    return next(iter([*setting, *(name for place, name in places if place >= 0)]), problem.path)
