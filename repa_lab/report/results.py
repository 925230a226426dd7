"""The results of sweeps as data frames: a row per run, per measurement, per arm and metric, per grid of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from repa_lab.errors import InputError
from repa_lab.report.frames import RunReader, curves_frame, members_of, runs_frame, samples_frame, troubles_frame
from repa_lab.report.statistics import Goal, SeedCurves, pair_curves
from repa_lab.report.summary import (
    Index,
    Protocols,
    evaluations,
    goal_of,
    index_curves,
    is_protocol,
    metric_kind,
    summarize,
)
from repa_lab.runs import RunDirectory, RunsRoot, SweepDirectory, SweepManifest
from repa_lab.runs.root import ArmRecord, ComparisonRecord, RunRecord


class ResultsError(InputError):
    """A path has no results or they cannot be read; the message says what was looked for."""


@dataclass(frozen=True)
class Axis:
    """A measure of progress.

    Attributes:
        name: its column in :attr:`Results.curves`.
        label: its name in figures.
        unit: its short name in tables.
        units: (factor, unit) pairs of smaller units for short runs.
    """

    name: str
    label: str
    unit: str
    units: tuple[tuple[float, str], ...] = ()

    def scale(self, largest: float) -> tuple[float, str]:
        """Return a factor and a label that suit values up to ``largest``."""
        for factor, unit in self.units:
            if largest * factor < 300:
                return factor, self.label.replace("hours", unit)
        return 1.0, self.label


STEPS = Axis("step", "optimizer steps", "steps")
IMAGES = Axis("images", "images seen", "images")
HOURS = Axis("hours", "device hours of training", "device hours", units=((3600.0, "seconds"), (60.0, "minutes")))
FLOPS = Axis("flops", "FLOPs of training", "FLOPs")
AXES = (STEPS, IMAGES, HOURS, FLOPS)


@dataclass(frozen=True)
class Results:
    """Everything that one or more sweeps have measured so far.

    Attributes:
        sweeps: the manifests, as the sweeps recorded them.
        runs: a row per arm and seed: where the run stands (``step`` in optimizer steps, ``images`` seen, training
            ``seconds`` on each of its ``processes``), its costs under ``cost/``, its level on every axis of the sweep,
            and its resolved config under dotted names. A config field that is itself an axis holds the field's value.
        curves: a row per measurement: progress (``step``, ``images``, device ``hours`` and ``flops`` of training, NaN
            where not recorded), ``metric``, ``value`` (NaN where it was not finite).
        summary: a row per arm and evaluation metric at equal progress; see :func:`repa_lab.report.summary.summarize`.
        samples: a row per grid of samples: the ``step`` it was drawn at and the ``path`` of its PNG.
        troubles: a row per thing in a run directory that could not be used: ``where`` and ``what``.
        protocols: the protocols that the runs recorded.
        provenances: code, versions and machine of each run, by run id.
    """

    sweeps: tuple[SweepManifest, ...]
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
        return ", ".join(sweep.name for sweep in self.sweeps)

    @property
    def question(self) -> str:
        """The sweep's question; several have a line each."""
        return "\n".join(sweep.question for sweep in self.sweeps)

    @property
    def sweep(self) -> SweepManifest:
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
        return self.sweep.compare.metric

    @property
    def goal(self) -> Goal:
        """Whether small or large values of :attr:`metric` are good."""
        return self.sweep.compare.goal

    @property
    def baselines(self) -> dict[str, str | None]:
        """The matched baseline of every arm of the only sweep, in its order; None for arms without one."""
        return {arm.label: arm.baseline for arm in self.sweep.arms}

    def only(self, name: str) -> Results:
        """Return the results of one sweep.

        Raises:
            ResultsError: no sweep has that name.
        """
        chosen = tuple(sweep for sweep in self.sweeps if sweep.name == name)
        if not chosen:
            raise ResultsError(f"no sweep '{name}' among {self.name}")
        frames = {key: getattr(self, key) for key in ("runs", "curves", "summary", "samples", "troubles")}
        rows = {key: frame[frame["sweep"] == name].reset_index(drop=True) for key, frame in frames.items()}
        return replace(self, sweeps=chosen, **rows)

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """The rows of :attr:`curves` of evaluation metrics."""
        return evaluations(self.curves)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The measures of progress that every evaluation records; others would give means over fewer runs."""
        measured = self.evaluations
        return tuple(axis for axis in AXES if axis is STEPS or (len(measured) and measured[axis.name].notna().all()))

    def metrics(self, arm: str) -> list[str]:
        """Return the evaluation metrics that an arm of the only sweep has measured, those with a protocol first."""
        names = [metric for sweep, label, metric in self._index("step") if (sweep, label) == (self.name, arm)]
        return sorted(names, key=lambda name: (not is_protocol(name), name))

    def seed_curves(self, arm: str | None, metric: str | None, axis: str = "step") -> SeedCurves:
        """Return value by progress, by seed; empty if never measured.

        Args:
            arm: label of an arm of the only sweep.
            metric: full name of an evaluation metric.
            axis: the measure of progress, a column of :attr:`curves`.
        """
        return self._index(axis).get((self.name, str(arm), str(metric)), {})

    def paired_curves(self, arm: str, metric: str, axis: str = "step") -> tuple[SeedCurves, SeedCurves]:
        """Return the curves of an arm and of its baseline, reduced to the points that can be compared.

        Args:
            arm: label of an arm of the only sweep.
            metric: full name of an evaluation metric.
            axis: the measure of progress, a column of :attr:`curves`.
        """
        sides = (arm, self.baselines[arm])
        places = self._index(f"{axis} by step")
        return pair_curves(
            *(self.seed_curves(label, metric, axis) for label in sides),
            *(places.get((self.name, str(label), metric), {}) for label in sides),
        )

    def _index(self, axis: str) -> Index:
        """Return values by an axis; for ``"<axis> by step"``, return the axis by step."""
        if axis not in self._indices:
            column, by_step, _ = axis.partition(" by step")
            measured = self.evaluations
            curves = measured.assign(value=measured[column]) if by_step else measured
            self._indices[axis] = index_curves(curves, "step" if by_step else column)
        return self._indices[axis]

    @cached_property
    def _indices(self) -> dict[str, Index]:
        return {}

    def run_ids(self, arm: str | None) -> list[str]:
        """Return the run ids of an arm of the only sweep, in the order of the seeds."""
        return [str(run_id) for run_id in self.runs.loc[self.runs["arm"] == arm, "run_id"]]

    def names(self, metric: str) -> dict[str, str]:
        """Return the name of a metric for each arm of the only sweep, one name per protocol; see :class:`Protocols`."""
        if metric not in self._names:
            runs = self.runs.groupby("arm", sort=False)["run_id"].agg(list).to_dict()
            self._names[metric] = self.protocols.names(runs, metric)
        return self._names[metric]

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        return {}

    def conflicts(self, arm: str, metric: str) -> list[str]:
        """Return the fields in which the protocols of a metric differ between the runs of an arm and its baseline."""
        return self.protocols.conflicts([*self.run_ids(arm), *self.run_ids(self.baselines[arm])], metric)

    def shared_metrics(self, arm: str) -> list[str]:
        """Return the metrics that both an arm and its baseline have measured; all of the arm's without a baseline."""
        baseline = self.baselines[arm]
        return [name for name in self.metrics(arm) if baseline is None or name in self.metrics(baseline)]

    def compared_metric(self, arm: str) -> str | None:
        """Return the metric on which an arm is compared with its baseline, or shown if it has none.

        This is :attr:`metric` where both measured it, else the one metric of its kind (Frechet distances are one kind)
        that both measured under one protocol.

        Returns:
            None if they share none, or only under different protocols: then they cannot be compared.
        """
        shared = [name for name in self.shared_metrics(arm) if not self.conflicts(arm, name)]
        if self.metric in shared:
            return self.metric
        alike = [name for name in shared if is_protocol(self.metric) and metric_kind(name) == metric_kind(self.metric)]
        return alike[0] if len(alike) == 1 else None


def load_results(path: str | Path) -> Results:
    """Read the results of a sweep, of all sweeps of a runs root, or of a single run.

    Args:
        path: a sweep's folder (``runs/<name>``), a runs root, or a run's directory.

    Raises:
        ResultsError: the path is none of these, or a file in it cannot be read.
    """
    path = Path(path)
    try:
        return _collect(_sources(path))
    except ResultsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"'{path}' holds a file that cannot be read as results: {error!r}") from error


def _sources(path: Path) -> list[tuple[SweepManifest, RunsRoot]]:
    if (sweep := SweepDirectory(path.absolute())).is_recorded:
        return [(sweep.manifest, sweep.root)]
    if (path / "spec.json").is_file():
        return [_single_run(RunDirectory(path.resolve()))]
    sweeps = RunsRoot(path).sweeps()
    if not sweeps:
        looked = "looked for sweep.json (a sweep), spec.json (a run) and */sweep.json (a runs root) in it"
        raise ResultsError(f"no results at '{path}': {looked if path.is_dir() else 'no such folder'}")
    return [(sweep.manifest, sweep.root) for sweep in sweeps]


def _single_run(run: RunDirectory) -> tuple[SweepManifest, RunsRoot]:
    """Return a run as a sweep of one arm without a baseline."""
    metric = next((metric for metric in RunReader(run).measurements() if is_protocol(metric)), "")
    seed, name = run.spec["seed"], run.run_id
    arm = ArmRecord(label=name, runs=(RunRecord(seed=seed, run_id=name),))
    compare = ComparisonRecord(metric=metric, goal=goal_of(metric))
    return SweepManifest(name=name, seeds=(seed,), compare=compare, arms=(arm,)), RunsRoot(run.path.parent.parent)


def _collect(sources: list[tuple[SweepManifest, RunsRoot]]) -> Results:
    sweeps = [list(members_of(manifest, root)) for manifest, root in sources]
    members = [member for sweep in sweeps for member in sweep]
    runs = pd.concat([runs_frame(sweep) for sweep in sweeps], ignore_index=True)
    curves = curves_frame(members)
    protocols = Protocols({member.run_id: member.reader.protocols for member in members})
    return Results(
        sweeps=tuple(manifest for manifest, _ in sources),
        runs=runs,
        curves=curves,
        summary=summarize(runs, index_curves(evaluations(curves)), protocols),
        samples=samples_frame(members),
        protocols=protocols,
        provenances={member.run_id: member.reader.provenance for member in members if member.reader.provenance},
        troubles=troubles_frame(members),  # last: every file that is read may add to them
    )


def root_of(path: str | Path) -> RunsRoot:
    """Return the runs root that :func:`load_results` reads for a path."""
    path = Path(path)
    if (sweep := SweepDirectory(path.absolute())).is_recorded:
        return sweep.root
    return RunsRoot(path.resolve().parent.parent if (path / "spec.json").is_file() else path)
