"""A rehearsal: every arm of an experiment with tiny random models and a few images, before any hour on a GPU.

What a rehearsal goes through is what the experiment will: the same families and classes of models, as many blocks, the
same regularizers, schedules, encoders of the same patches, checkpoints, measurements, a resume, and the report. Its
numbers say nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repa_lab.align.settings import REPASettings
from repa_lab.data.settings import FolderSettings, HubSettings, SourceSettings
from repa_lab.encoders.registry import ENCODERS, TINY
from repa_lab.metrics.protocol import quality_names
from repa_lab.models.facts import NARROW, shape_of
from repa_lab.models.families import family_facts
from repa_lab.orchestration.props import Props
from repa_lab.spec import Arm, BudgetConfig, CompareConfig, Experiment, RunConfig, RunOptions
from repa_lab.spec.evaluate import FullConfig
from repa_lab.spec.options import Objective

SUFFIX = "-rehearsal"
MARK = "REHEARSAL with tiny random models, no evidence"
_STEPS, _BATCH, _EVERY, _SAMPLES, _HOLDOUT, _TRIALS = 4, 2, 2, 16, 8, 2
_MAX_NAME = 64
_LIKE = "efficientnet_lite0"  # small, and on every machine that has the lab
# Of a schedule, what is counted in steps.
_COUNTED = ("warmup_steps", "decay_steps", "cutoff_step")


def rehearsal_root(root: Path) -> Path:
    """Where rehearsals of a runs root live: apart from it, so that nothing of theirs is taken for a result."""
    return root.with_name(root.name + SUFFIX)


def rehearse(experiment: Experiment, root: Path) -> Experiment:
    """The experiment as it is rehearsed; what its runs need is written below ``root``.

    Args:
        experiment: checked but for the files that it names.
        root: the runs root of rehearsals.
    """
    rehearser = _Rehearser(Props(root / "cache" / "rehearsal"))
    search = experiment.search and experiment.search.model_copy(
        update={"trials": min(experiment.search.trials, _TRIALS), "objective": _objective(experiment.search.objective)}
    )
    return replace(
        experiment,
        name=experiment.name[: _MAX_NAME - len(SUFFIX)] + SUFFIX,
        question=f"{MARK}: {experiment.question or experiment.name}",
        arms=tuple(rehearser.arm(arm) for arm in experiment.arms),
        seeds=experiment.seeds[:1],
        compare=CompareConfig(baseline=experiment.compare.baseline),
        search=search,
        budget=BudgetConfig(),
        stop=(),
        run=_options(experiment.run),
    )


@dataclass(frozen=True)
class RehearsedArm(Arm):
    """An arm that is rehearsed: its settings have the places, and the comparisons the values, of the one that is meant."""

    meant: RunConfig = field(kw_only=True)
    rehearser: _Rehearser = field(kw_only=True, compare=False, repr=False)

    @property
    def asked(self) -> RunConfig:
        """See :class:`Arm`."""
        return self.meant

    def with_settings(self, settings: Mapping[str, Any]) -> Arm:
        """See :class:`Arm`."""
        return self.rehearser.arm(super().with_settings(settings))


@dataclass(frozen=True)
class _Rehearser:
    """Makes rehearsed arms of those that are meant."""

    props: Props

    def arm(self, arm: Arm) -> Arm:
        config = self._config(arm.config)
        return RehearsedArm(arm.label, arm.levels, config, arm.draft, meant=arm.config, rehearser=self)

    def _config(self, meant: RunConfig) -> RunConfig:
        value = meant.model_dump(mode="json")
        value["model"] |= self._model(meant)
        value["data"] = self._data(meant)
        value["train"] |= {"steps": min(meant.train.steps, _STEPS), "batch_size": min(meant.train.batch_size, _BATCH)}
        value["evaluate"] |= self._evaluate(meant)
        for path, _ in meant.encoder_paths:
            *parents, last = path.split(".")
            section = functools.reduce(_inside, parents, value)
            section[_key(section, last)] = self._encoder(_inside(section, last))
        if isinstance(meant.regularizer, REPASettings):
            value["regularizer"]["projector"]["width"] = min(meant.regularizer.projector.width, 32)
        if meant.regularizer.type != "none":
            value["regularizer"]["schedule"] |= _schedule(meant)
        return RunConfig.model_validate(value)

    def _model(self, meant: RunConfig) -> dict[str, Any]:
        family, size = family_facts(meant.model.family), meant.model.size
        if family.from_scratch:
            return {"size": f"{NARROW}{(size or '').removeprefix(NARROW)}"}
        return {"pretrained": str(self.props.pipeline(family)), "revision": None, "rank": min(meant.model.rank, 2)}

    def _data(self, meant: RunConfig) -> dict[str, Any]:
        data, token, family = meant.data, _token(meant), family_facts(meant.model.family)
        vae = data.vae and str(self.props.autoencoder() if family.from_scratch else self.props.pipeline(family))
        found: dict[str, Any] = {**data.model_dump(mode="json"), "vae": vae}
        if isinstance(data, FolderSettings | HubSettings):
            shared = {name: found[name] for name in SourceSettings.model_fields}
            found = (
                shared | self.props.images(data) | {"resolution": max(32, 2 * token, 64 if _is_latent(meant) else 0)}
            )
            found |= {"holdout": min(data.holdout or _HOLDOUT, _HOLDOUT)}
        if data.buckets is not None:
            found["buckets"] = {"step": token, "max_aspect": data.buckets.max_aspect}
        return found

    def _evaluate(self, meant: RunConfig) -> dict[str, Any]:
        config = meant.evaluate
        return {
            "every": min(config.every, _EVERY),
            "samples": _SAMPLES,
            "batch_size": _SAMPLES,
            "sampler": {**config.sampler.model_dump(mode="json"), "steps": 2},
            "extractor": {"name": _LIKE},
            "metrics": _meant(config.metrics),
            "full": config.full and self._full(config.full),
        }

    def _full(self, full: FullConfig) -> dict[str, Any]:
        """At the end alone, with as many steps as the usual protocol, and twice the samples."""
        sampler = full.sampler and {**full.sampler.model_dump(mode="json"), "steps": 2}
        guidance = full.guidance and full.guidance.model_dump(mode="json")
        metrics = full.metrics and _meant(full.metrics)
        return {
            "samples": 2 * _SAMPLES,
            "sampler": sampler,
            "guidance": guidance,
            "labels": full.labels,
            "metrics": metrics,
        }

    def _encoder(self, encoder: dict[str, Any]) -> dict[str, Any]:
        name = _tiny_encoder(encoder["name"])
        known = ENCODERS.get(name.removeprefix(TINY))
        size = 4 * (known.stride if known else 16)
        tae = encoder["tae"] and str(self.props.tiny_autoencoder())
        return {**encoder, "name": name, "image_size": encoder["image_size"] and size, "weights": None, "tae": tae}


def _key(section: Any, step: str) -> Any:
    return int(step) if isinstance(section, list) else step


def _inside(section: Any, step: str) -> Any:
    return section[_key(section, step)]


def _meant(metrics: Iterable[str]) -> list[str]:
    """The metrics that have a meaning with the extractor of rehearsals."""
    return [metric for metric in metrics if quality_names(metric, _LIKE, _SAMPLES, "")]


def _tiny_encoder(name: str) -> str:
    """A tiny one of the same kind; where the kind has none, or is small already, EfficientNet-Lite0."""
    if name.startswith(TINY) or name == _LIKE:
        return name
    from repa_lab.encoders.tiny import has_tiny

    return f"{TINY}{name}" if has_tiny(name) else _LIKE


def _schedule(meant: RunConfig) -> dict[str, Any]:
    """The schedule over the few steps in the proportions of the many, so that every part of it is gone through."""
    shape = meant.regularizer.schedule.model_dump(mode="json")
    ratio = min(1.0, _STEPS / meant.train.steps)
    scaled = {name: math.ceil(shape[name] * ratio) for name in _COUNTED if shape[name] is not None}
    if 0 < scaled["decay_steps"] <= scaled["warmup_steps"]:
        scaled["decay_steps"] = scaled["warmup_steps"] + 1
    return {**scaled, "similarity_min_count": 1, "probe_every": 1}


def _options(options: RunOptions) -> RunOptions:
    """The same ways of computing, but for those that take a GPU, or minutes before the first step."""
    has_gpu = Path("/dev/nvidia0").exists()
    silent = options.wandb.model_copy(update={"mode": "disabled"})
    updates: dict[str, Any] = {"share": False, "log_every": 1, "checkpoint_every": None, "wandb": silent}
    updates["micro_batch"] = 1 if isinstance(options.micro_batch, int) else options.micro_batch
    if not has_gpu:
        updates |= {"device": "auto", "compile": False, "encoder_compile": False}
        updates["precision"] = "fp32" if options.precision == "fp16" else options.precision
    return options.model_copy(update=updates)


def _objective(asked: Objective | tuple[Objective, ...]) -> Objective | tuple[Objective, ...]:
    """The same, but that a rehearsal measures no FID."""
    if isinstance(asked, tuple):
        return tuple(_one(objective) for objective in asked)
    return _one(asked)


def _one(objective: Objective) -> Objective:
    is_distance = objective.metric.startswith(("fid", "frechet"))
    return objective.model_copy(update={"metric": "frechet"}) if is_distance else objective


def _is_latent(meant: RunConfig) -> bool:
    return meant.data.vae is not None or meant.model.pretrained is not None


def _token(meant: RunConfig) -> int:
    """Pixels of a tapped token along each side."""
    family = family_facts(meant.model.family)
    stride = shape_of(family, meant.model.size).stride
    return stride * (8 if family.from_scratch and meant.data.vae else family.latent_stride)
