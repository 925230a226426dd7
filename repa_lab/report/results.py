"""The runs of a sweep as DataFrames: one row per run, per measurement, per arm and metric, and per grid of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from repa_lab.report.members import curves_frame, members_of, runs_frame, samples_frame, troubles_frame
from repa_lab.report.progress import AXES, STEPS, Axis
from repa_lab.report.protocols import Protocols
from repa_lab.report.reading import RunReader
from repa_lab.report.statistics import Goal
from repa_lab.report.summary import (
    Index,
    SeedCurves,
    evaluations,
    goal_of,
    index_curves,
    is_protocol,
    metric_kind,
    summarize,
)
from repa_lab.runs import RunDirectory, RunsRoot, SweepDirectory

Manifest = dict[str, Any]


class ResultsError(ValueError):
    """There is nothing to report at a path, or it cannot be read; the text says what was looked for."""


@dataclass(frozen=True)
class Results:
    """What one or more sweeps have measured so far.

    Attributes:
        sweeps: the manifests, as the sweeps recorded them.
        runs: a row per arm and seed: where the run stands (``step`` in optimizer steps, ``images`` seen, training
            ``seconds`` on each of its ``processes``), what it cost under ``cost/``, its level on every axis, and its
            resolved config under dotted names. A config field that is itself an axis holds the field's value.
        curves: a row per measurement: progress (``step``, ``images``, device ``hours`` and ``flops`` of training, NaN
            where not known), ``metric``, ``value`` (NaN where it was not finite).
        summary: a row per arm and evaluation metric at equal progress; see :func:`repa_lab.report.summary.summarize`.
        samples: a row per grid of samples: the ``step`` it was drawn at and the ``path`` of its PNG.
        troubles: a row per thing in a run directory that could not be used: ``where`` and ``what``.
        protocols: what the runs recorded that their numbers depend on.
        provenances: what each run was made with, by run id.
    """

    sweeps: tuple[Manifest, ...]
    runs: pd.DataFrame
    curves: pd.DataFrame
    summary: pd.DataFrame
    samples: pd.DataFrame
    troubles: pd.DataFrame
    protocols: Protocols
    provenances: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The sweep's name; several are joined with commas."""
        return ", ".join(sweep["name"] for sweep in self.sweeps)

    @property
    def question(self) -> str:
        """The sweep's question; those of several stand on a line each."""
        return "\n".join(sweep["question"] for sweep in self.sweeps)

    @property
    def sweep(self) -> Manifest:
        """The manifest of the only sweep.

        Raises:
            ResultsError: there are several.
        """
        if len(self.sweeps) != 1:
            raise ResultsError(f"{len(self.sweeps)} sweeps here ({self.name}): take one with .only(name)")
        return self.sweeps[0]

    @property
    def metric(self) -> str:
        """The full name of the metric that the only sweep compares."""
        return str(self.sweep["compare"]["metric"])

    @property
    def goal(self) -> Goal:
        """Whether small or large values of :attr:`metric` are good."""
        return "max" if self.sweep["compare"]["goal"] == "max" else "min"

    @property
    def baselines(self) -> dict[str, str | None]:
        """The matched baseline of every arm of the only sweep in its order; None where there is none."""
        return {arm["label"]: arm["baseline"] for arm in self.sweep["arms"]}

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """The rows of :attr:`curves` that are of evaluation metrics."""
        return evaluations(self.curves)

    def metrics(self, arm: str) -> list[str]:
        """The evaluation metrics that an arm of the only sweep has measured, those with a protocol first."""
        names = [metric for sweep, label, metric in self._index if (sweep, label) == (self.name, arm)]
        return sorted(names, key=lambda name: (not is_protocol(name), name))

    def seed_curves(self, arm: str | None, metric: str | None, axis: str = "step") -> SeedCurves:
        """Value by progress, by seed, of an arm of the only sweep and an evaluation metric; empty if never measured.

        Args:
            arm: its label.
            metric: full name.
            axis: the measure of progress, a column of :attr:`curves`.
        """
        if axis not in self._indices:
            self._indices[axis] = index_curves(self.evaluations, axis)
        return self._indices[axis].get((self.name, str(arm), str(metric)), {})

    def places(self, arm: str | None, metric: str, axis: str) -> SeedCurves:
        """Progress along an axis by step, by seed, of what :meth:`seed_curves` has; NaN where it is not known."""
        key = f"{axis} by step"
        if key not in self._indices:
            self._indices[key] = index_curves(self.evaluations.assign(value=self.evaluations[axis]))
        return self._indices[key].get((self.name, str(arm), metric), {})

    @cached_property
    def _indices(self) -> dict[str, Index]:
        return {"step": index_curves(self.evaluations)}

    @property
    def _index(self) -> Index:
        return self._indices["step"]

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The measures of progress that every evaluation tells; curves over any other would be means over fewer runs."""
        measured = self.evaluations
        return tuple(axis for axis in AXES if axis is STEPS or (len(measured) and measured[axis.name].notna().all()))

    def run_ids(self, arm: str | None) -> list[str]:
        """The runs of an arm of the only sweep, in the order of the seeds."""
        return [str(run_id) for run_id in self.runs.loc[self.runs["arm"] == arm, "run_id"]]

    def names(self, metric: str) -> dict[str, str]:
        """What a metric is to be called for each arm of the only sweep: values of one such name may stand side by side.

        See :meth:`repa_lab.report.protocols.Protocols.names`.
        """
        if metric not in self._names:
            runs = self.runs.groupby("arm", sort=False)["run_id"].agg(list).to_dict()
            self._names[metric] = self.protocols.names(runs, metric)
        return self._names[metric]

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        return {}

    def conflicts(self, arm: str, metric: str) -> list[str]:
        """In what the protocols of a metric differ between the runs of an arm and of its baseline, if in anything."""
        return self.protocols.conflicts([*self.run_ids(arm), *self.run_ids(self.baselines[arm])], metric)

    def compared_metric(self, arm: str) -> str | None:
        """The metric on which an arm can be compared with its baseline, or shown if it has none.

        It is :attr:`metric` where both measured it, else the one metric of its kind (Frechet distances are one kind)
        that both measured under one protocol.

        Returns:
            None if they share none, or only under a name behind which their protocols differ: then they cannot be
            compared.
        """
        shared = [name for name in self.shared_metrics(arm) if not self.conflicts(arm, name)]
        if self.metric in shared:
            return self.metric
        alike = [name for name in shared if is_protocol(self.metric) and metric_kind(name) == metric_kind(self.metric)]
        return alike[0] if len(alike) == 1 else None

    def shared_metrics(self, arm: str) -> list[str]:
        """The metrics that an arm and its baseline, if it has one, have both measured."""
        baseline = self.baselines[arm]
        return [name for name in self.metrics(arm) if baseline is None or name in self.metrics(baseline)]

    def only(self, name: str) -> Results:
        """The results of one sweep.

        Raises:
            ResultsError: no sweep has that name.
        """
        chosen = tuple(sweep for sweep in self.sweeps if sweep["name"] == name)
        if not chosen:
            raise ResultsError(f"no sweep '{name}' among {self.name}")
        frames = (self.runs, self.curves, self.summary, self.samples, self.troubles)
        runs, curves, summary, samples, troubles = (one[one["sweep"] == name].reset_index(drop=True) for one in frames)
        return Results(chosen, runs, curves, summary, samples, troubles, self.protocols, self.provenances)


def load_results(path: str | Path) -> Results:
    """Read everything that is known of a sweep, of all sweeps of a runs root, or of a single run.

    Args:
        path: a sweep's folder (``runs/<name>``), a runs root, or a run's directory.

    Raises:
        ResultsError: the path is none of these, or a file in it cannot be read.
    """
    path = Path(path)
    try:
        sources = list(_sources(path))
        for manifest, _ in sources:
            _require_whole(manifest)
        return _collect(sources)
    except ResultsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"'{path}' holds a file that cannot be read as results: {error!r}") from error


def _require_whole(manifest: Manifest) -> None:
    """Miss what a manifest lacks here, where it is told as an error, and not in the middle of a report."""
    kinds = {"name": str, "question": str, "compare": dict, "arms": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]
    for arm in manifest["arms"]:
        wrong += [] if isinstance(arm["label"], str) and isinstance(arm["levels"], dict) else ["arms"]
        wrong += [] if isinstance(arm["baseline"], str | None) else ["baseline"]
    if wrong or not isinstance(manifest["compare"]["metric"], str) or manifest["compare"]["goal"] not in ("min", "max"):
        raise TypeError(f"sweep.json has no sound {', '.join(wrong) or 'compare'}")


def root_of(path: str | Path) -> RunsRoot:
    """The runs root that :func:`load_results` reads for a path."""
    path = Path(path)
    if (path / "sweep.json").is_file():
        return SweepDirectory(path.absolute()).root
    return RunsRoot(path.resolve().parent.parent if (path / "spec.json").is_file() else path)


def _sources(path: Path) -> list[tuple[Manifest, RunsRoot]]:
    if (path / "sweep.json").is_file():
        sweep = SweepDirectory(path.absolute())
        return [(sweep.manifest, sweep.root)]
    if (path / "spec.json").is_file():
        return [_single(RunDirectory(path.resolve()))]
    sweeps = RunsRoot(path).sweeps()
    if not sweeps:
        looked = "looked for sweep.json (a sweep), spec.json (a run) and */sweep.json (a runs root) in it"
        raise ResultsError(f"no results at '{path}': {looked if path.is_dir() else 'no such folder'}")
    return [(sweep.manifest, sweep.root) for sweep in sweeps]


def _single(run: RunDirectory) -> tuple[Manifest, RunsRoot]:
    """A run on its own, as a sweep of one arm without a baseline."""
    measured = [metric for metric in RunReader(run).measurements() if is_protocol(metric)]
    seed, name = run.spec["seed"], run.run_id
    arm: Manifest = {"label": name, "levels": {}, "baseline": None, "runs": [{"seed": seed, "run_id": name}]}
    metric = measured[0] if measured else ""
    compare = {"metric": metric, "goal": goal_of(metric), "targets": {}}
    manifest = {"name": name, "question": "", "seeds": [seed], "compare": compare, "arms": [arm], "search": None}
    return manifest, RunsRoot(run.path.parent.parent)


def _collect(sources: Iterable[tuple[Manifest, RunsRoot]]) -> Results:
    sources = list(sources)
    sweeps = [list(members_of(manifest, root)) for manifest, root in sources]
    members = [member for sweep in sweeps for member in sweep]
    runs = pd.concat([runs_frame(sweep) for sweep in sweeps], ignore_index=True)
    curves, protocols = curves_frame(members), Protocols({one.run_id: one.reader.protocols for one in members})
    return Results(
        sweeps=tuple(manifest for manifest, _ in sources),
        runs=runs,
        curves=curves,
        summary=summarize(runs, index_curves(curves), protocols),
        samples=samples_frame(members),
        protocols=protocols,
        provenances={one.run_id: one.reader.provenance for one in members if one.reader.provenance},
        troubles=troubles_frame(members),  # last, for every reading may add to them
    )
