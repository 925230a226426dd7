"""The results of sweeps as data frames: a row per run, per measurement, per arm and metric, per grid of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_lab.errors import InputError
from repa_lab.report.frames import (
    Member,
    RunReader,
    curves_frame,
    members_of,
    runs_frame,
    samples_frame,
    troubles_frame,
)
from repa_lab.report.statistics import Curve, Goal, SeedCurves, pair_curves
from repa_lab.report.summary import (
    SUMMARY_COLUMNS,
    Curves,
    Protocols,
    goal_of,
    is_evaluation,
    is_protocol,
    metric_kind,
    summarize,
)
from repa_lab.runs import RunDirectory, RunsRoot, SweepDirectory, SweepManifest
from repa_lab.runs.files import Row, garbage_collection_paused
from repa_lab.runs.root import ArmRecord, ComparisonRecord, RootError, RunRecord, run_at

if TYPE_CHECKING:
    import pandas as pd


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


@dataclass(frozen=True, eq=False)
class Results:
    """Everything that one or more sweeps have measured so far; each table is made when it is first asked for.

    Attributes:
        sweeps: the manifests, as the sweeps recorded them.
        members: the runs in their places in the sweeps.
    """

    sweeps: tuple[SweepManifest, ...]
    members: tuple[Member, ...]

    @cached_property
    @garbage_collection_paused()
    def runs(self) -> pd.DataFrame:
        """A row per arm and seed.

        Columns: where the run stands (``step`` in optimizer steps, ``images`` seen, training ``seconds`` on each of its
        ``processes``), its costs under ``cost/``, its level on every axis of the sweep, and its resolved config under
        dotted names. A config field that is itself an axis holds the field's value.
        """
        return runs_frame(self.members)

    @cached_property
    @garbage_collection_paused()
    def curves(self) -> pd.DataFrame:
        """A row per measurement.

        Columns: progress (``step``, ``images``, device ``hours`` and ``flops`` of training, NaN where not recorded),
        ``metric``, ``value`` (NaN where it was not finite).
        """
        return curves_frame(self.members)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row per arm and evaluation metric at equal progress; see :func:`repa_lab.report.summary.summarize`."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=SUMMARY_COLUMNS)

    @cached_property
    @garbage_collection_paused()
    def rows(self) -> list[Row]:
        """The rows of :attr:`summary`."""
        return summarize(self.sweeps, self._curves, self.protocols)

    @cached_property
    def compared_rows(self) -> dict[str, Row]:
        """The row of :attr:`summary` on the compared metric, by arm of the only sweep."""
        return {row["arm"]: row for row in self.rows if row["metric"] == self.compared_metrics[row["arm"]]}

    @cached_property
    def by_arm(self) -> dict[str, list[Member]]:
        """The runs of every arm of the only sweep, in the order of the seeds."""
        members: dict[str, list[Member]] = {arm.label: [] for arm in self.sweep.arms}
        for member in self.members:
            members[member.arm.label].append(member)
        return members

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row per grid of samples: the ``step`` it was drawn at and the ``path`` of its PNG."""
        return samples_frame(self.members)

    @cached_property
    @garbage_collection_paused()
    def grids(self) -> dict[str, dict[int, dict[int, Path]]]:
        """The sample grids of the only sweep by arm, seed and step."""
        grids: dict[str, dict[int, dict[int, Path]]] = {}
        for member in self.members:
            if member.reader.grids:
                grids.setdefault(member.arm.label, {})[member.keys["seed"]] = member.reader.grids
        return grids

    @cached_property
    @garbage_collection_paused()
    def troubles(self) -> pd.DataFrame:
        """A row per thing in a run directory that could not be used: ``where`` and ``what``."""
        return troubles_frame(self.members)

    @cached_property
    @garbage_collection_paused()
    def protocols(self) -> Protocols:
        """The protocols that the runs recorded."""
        return Protocols({member.run_id: member.reader.protocols for member in self.members})

    @cached_property
    @garbage_collection_paused()
    def provenances(self) -> dict[str, Mapping[str, Any]]:
        """Code, versions and machine of each run, by run id."""
        recorded = {member.run_id: member.reader.provenance for member in self.members}
        return {run_id: provenance for run_id, provenance in recorded.items() if provenance}

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

    @cached_property
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
        return Results(chosen, tuple(member for member in self.members if member.keys["sweep"] == name))

    def measured(self, axis: Axis = STEPS) -> list[Member]:
        """Return the runs that have evaluations, all of them at a known place along an axis."""
        measured = []
        for member in self.members:
            steps = {
                step
                for name, curve in member.reader.history.measurements.items()
                if is_evaluation(name)
                for step in curve
            }
            places = member.reader.places(axis.name)
            if steps and not any(math.isnan(places[step]) for step in steps):
                measured.append(member)
        return measured

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The measures of progress that every evaluation records; others would give means over fewer runs."""
        count = len(self.measured())
        return tuple(axis for axis in AXES if axis is STEPS or (count and len(self.measured(axis)) == count))

    @cached_property
    def _curves(self) -> Curves:
        curves: dict[tuple[str, str], dict[str, dict[int, Curve]]] = {}
        for member in self.members:
            by_metric = curves.setdefault((member.keys["sweep"], member.arm.label), {})
            for metric, values in member.reader.history.measurements.items():
                if is_evaluation(metric):
                    by_metric.setdefault(metric, {})[member.keys["seed"]] = values
        return curves

    @cached_property
    def _readers(self) -> dict[tuple[str, int], RunReader]:
        return {(member.arm.label, member.keys["seed"]): member.reader for member in self.members}

    def metrics(self, arm: str | None) -> list[str]:
        """Return the evaluation metrics that an arm of the only sweep has measured, those with a protocol first."""
        return sorted(self._curves.get((self.name, str(arm)), ()), key=lambda name: (not is_protocol(name), name))

    def seed_curves(self, arm: str | None, metric: str | None, axis: str = "step") -> SeedCurves:
        """Return value by progress, by seed; empty if never measured.

        Args:
            arm: label of an arm of the only sweep.
            metric: full name of an evaluation metric.
            axis: the measure of progress, a column of :attr:`curves`.
        """
        return self._along(axis, arm, self._curves.get((self.name, str(arm)), {}).get(str(metric), {}))

    def paired_curves(self, arm: str, metric: str, axis: str = "step") -> tuple[SeedCurves, SeedCurves]:
        """Return the curves of an arm and of its baseline, reduced to the points that can be compared.

        Args:
            arm: label of an arm of the only sweep.
            metric: full name of an evaluation metric.
            axis: the measure of progress, a column of :attr:`curves`.
        """
        baseline = self.baselines[arm]
        curves, baseline_curves = pair_curves(self.seed_curves(arm, metric), self.seed_curves(baseline, metric))
        return self._along(axis, arm, curves), self._along(axis, baseline, baseline_curves)

    def places(self, arm: str | None, seed: int, axis: str) -> dict[float, float]:
        """Return the progress of a run of the only sweep along an axis, by step; NaN where not known."""
        return self._readers[str(arm), seed].places(axis)

    def _along(self, axis: str, arm: str | None, curves: SeedCurves) -> SeedCurves:
        """Return the curves of an arm over a measure of progress; values at unknown progress are left out."""
        along: dict[int, Curve] = {}
        for seed, curve in curves.items():
            places = self.places(arm, seed, axis)
            along[seed] = {places[step]: value for step, value in curve.items() if not math.isnan(places[step])}
        return along

    def run_ids(self, arm: str | None) -> list[str]:
        """Return the run ids of an arm of the only sweep, in the order of the seeds."""
        return [member.run_id for member in self.by_arm.get(str(arm), ())]

    def names(self, metric: str) -> dict[str, str]:
        """Return the name of a metric for each arm of the only sweep, one name per protocol; see :class:`Protocols`."""
        if metric not in self._names:
            self._names[metric] = self.protocols.names({arm: self.run_ids(arm) for arm in self.baselines}, metric)
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

    @cached_property
    def compared_metrics(self) -> dict[str, str | None]:
        """The metric on which each arm of the only sweep is compared with its baseline, or shown if it has none.

        This is :attr:`metric` where both measured it, else the one metric of its kind (Frechet distances are one kind)
        that both measured under one protocol. None if they share none, or only under different protocols: then they
        cannot be compared.
        """
        compared: dict[str, str | None] = {}
        for arm in self.baselines:
            shared = [name for name in self.shared_metrics(arm) if not self.conflicts(arm, name)]
            alike = [name for name in shared if is_protocol(name) and metric_kind(name) == metric_kind(self.metric)]
            alike = [self.metric] if self.metric in shared else alike if is_protocol(self.metric) else []
            compared[arm] = alike[0] if len(alike) == 1 else None
        return compared


def load_results(path: str | Path) -> Results:
    """Read the results of a sweep, of all sweeps of a runs root, or of a single run.

    Args:
        path: a sweep's folder (``runs/<name>``), a runs root, or a run's directory.

    Raises:
        ResultsError: the path is none of these, or a manifest in it cannot be read.
    """
    path = Path(path)
    try:
        sources = _sources(path)
        members = tuple(member for manifest, find in sources for member in members_of(manifest, find))
        return Results(tuple(manifest for manifest, _ in sources), members)
    except (ResultsError, RootError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"'{path}' holds a file that cannot be read as results: {error!r}") from error


def _sources(path: Path) -> list[tuple[SweepManifest, Callable[[str], RunDirectory]]]:
    """Return the manifests of a path's sweeps, each with what finds a run by its id."""
    if (sweep := SweepDirectory(path.absolute())).is_recorded:
        return [(sweep.manifest, sweep.run)]
    if (path / "spec.json").is_file():
        run = run_at(path)
        return [(_single_run(run), lambda run_id: run)]
    sweeps = RunsRoot(path).sweeps()
    if not sweeps:
        looked = "looked for sweep.json (a sweep), spec.json (a run) and */sweep.json (a runs root) in it"
        raise ResultsError(f"no results at '{path}': {looked if path.is_dir() else 'no such folder'}")
    # By the names of their folders: a copy of a sweep beside it has the manifest of the original.
    return [(sweep.manifest.model_copy(update={"name": sweep.path.name}), sweep.run) for sweep in sweeps]


def _single_run(run: RunDirectory) -> SweepManifest:
    """Return a run as a sweep of one arm without a baseline."""
    metric = next(filter(is_protocol, RunReader(run).history.measurements), "")
    seed, name = run.spec["seed"], run.run_id
    arm = ArmRecord(label=name, runs=(RunRecord(seed=seed, run_id=name),))
    compare = ComparisonRecord(metric=metric, goal=goal_of(metric))
    return SweepManifest(name=name, seeds=(seed,), compare=compare, arms=(arm,))
