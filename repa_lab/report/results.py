"""The results of sweeps as data frames: a row per run, per measurement, per arm and metric, per grid of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_lab.errors import InputError
from repa_lab.report.reader import SweepRun, is_progress
from repa_lab.report.statistics import Curve, Goal, SeedCurves, pair_curves
from repa_lab.report.summary import (
    SUMMARY_COLUMNS,
    Curves,
    Protocols,
    dotted,
    goal_of,
    is_evaluation,
    is_protocol,
    metric_kind,
    summarize,
)
from repa_lab.runs import RunDirectory, RunsRoot, RunStatus, SweepDirectory, SweepManifest
from repa_lab.runs.files import Row, garbage_collection_paused
from repa_lab.runs.root import ArmRecord, ComparisonRecord, RootError, RunRecord, TrialRecord, run_at

if TYPE_CHECKING:
    import pandas as pd

_KEYS = ["sweep", "arm", "seed", "run_id"]
_RUN_COLUMNS = [
    "sweep",
    "arm",
    "baseline",
    "seed",
    "run_id",
    "state",
    "step",
    "images",
    "seconds",
    "processes",
    "error",
]
_TRIAL_ORDER = {"complete": 0, "pruned": 1}


class ResultsError(InputError):
    """A path has no results or they cannot be read; the message says what was looked for."""


@dataclass(frozen=True)
class Axis:
    """A measure of progress."""

    name: str  # of its column in `Results.curves`
    label: str  # in figures
    unit: str  # in tables
    units: tuple[tuple[float, str], ...] = ()  # factors and names of smaller units, for short runs

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
    """Everything that one or more sweeps have measured so far; each table is made when it is first asked for."""

    sweeps: tuple[SweepManifest, ...]  # the manifests, as the sweeps recorded them
    members: tuple[SweepRun, ...]  # the runs in their places in the sweeps

    @cached_property
    @garbage_collection_paused()
    def runs(self) -> pd.DataFrame:
        """A row per arm and seed.

        Columns: where the run stands (``step`` in optimizer steps, ``images`` seen, training ``seconds`` on each of its
        ``processes``), its costs under ``cost/``, its level on every axis of the sweep, and its resolved config under
        dotted names. A config field that is itself an axis holds the field's value.
        """
        import pandas as pd

        configs = [dotted(run.spec) for run in self.members]
        fields: dict[str, set[str]] = {}
        for run, config in zip(self.members, configs, strict=True):
            fields.setdefault(run.sweep, set()).update(run.arm.levels.keys() & config.keys())
        rows = []
        for run, config in zip(self.members, configs, strict=True):
            # A plain axis is named after the field it sets: the value is more precise than the level's name, and typed.
            levels = {axis: level for axis, level in run.arm.levels.items() if axis not in fields[run.sweep]}
            totals = {name: curve[max(curve)] for name, curve in run.curves.items() if is_progress(name)}
            facts = {"baseline": run.arm.baseline, "state": run.status, "error": run.error, "step": run.last_step}
            facts |= {**run.keys, "processes": run.processes}
            rows.append({**levels, **config, "images": None, "seconds": None, **totals, **facts})
        frame = pd.DataFrame(rows, columns=None if rows else _RUN_COLUMNS)
        return frame[[*_RUN_COLUMNS, *(column for column in frame.columns if column not in _RUN_COLUMNS)]]

    @cached_property
    @garbage_collection_paused()
    def curves(self) -> pd.DataFrame:
        """A row per measurement.

        Columns: progress (``step``, ``images``, device ``hours`` and ``flops`` of training, NaN where not recorded),
        ``metric``, ``value`` (NaN where it was not finite).
        """
        import pandas as pd

        # Rows are taken from a row per logged step: there may be a million.
        steps: dict[str, list[Any]] = {name: [] for name in (*_KEYS, *(axis.name for axis in AXES))}
        places, metrics, values = list[int](), list[str](), list[float]()
        for run in self.members:
            first = len(steps["step"])
            place_of = {step: first + place for place, step in enumerate(run.places["step"])}
            for name, key in run.keys.items():
                steps[name] += [key] * len(place_of)
            for name, progress in run.places.items():
                steps[name] += progress.values()
            for metric, curve in run.curves.items():
                if not is_progress(metric):
                    places += [place_of[step] for step in curve]
                    metrics += [metric] * len(curve)
                    values += curve.values()
        frame = pd.DataFrame(steps).take(places).reset_index(drop=True)
        return frame.assign(metric=metrics, value=pd.Series(values, dtype=float))

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row per arm and evaluation metric at equal progress; see :func:`repa_lab.report.summary.summarize`."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=SUMMARY_COLUMNS)

    @cached_property
    @garbage_collection_paused()
    def rows(self) -> list[Row]:
        """The rows of :attr:`summary`."""
        if len(self.sweeps) != 1:
            return [row for sweep in self.sweeps for row in self.only(sweep.name).rows]
        return summarize(self.sweep, self._curves, self.protocols, len(self.compared_arms))

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row per grid of samples: the ``step`` it was drawn at and the ``path`` of its PNG."""
        import pandas as pd

        rows = [{**run.keys, "step": step, "path": path} for run in self.members for step, path in run.grids.items()]
        return pd.DataFrame(rows, columns=[*_KEYS, "step", "path"])

    @cached_property
    @garbage_collection_paused()
    def troubles(self) -> pd.DataFrame:
        """A row per thing in a run directory that could not be used: ``where`` and ``what``."""
        import pandas as pd

        troubles = ((run, trouble) for run in self.members for trouble in run.all_troubles())
        rows = [{**run.keys, "where": where, "what": what} for run, (where, what) in troubles]
        return pd.DataFrame(rows, columns=[*_KEYS, "where", "what"])

    @cached_property
    @garbage_collection_paused()
    def protocols(self) -> Protocols:
        """The protocols that the runs recorded."""
        return Protocols({run.run_id: run.protocols for run in self.members})

    @property
    def name(self) -> str:
        """The sweep's name; several are joined with commas."""
        return ", ".join(sweep.name for sweep in self.sweeps)

    @property
    def question(self) -> str:
        """The sweep's question; several have a line each."""
        return "\n".join(sweep.question for sweep in self.sweeps)

    def only(self, name: str) -> Results:
        """Return the results of one sweep.

        Raises:
            ResultsError: no sweep has that name.
        """
        chosen = tuple(sweep for sweep in self.sweeps if sweep.name == name)
        if not chosen:
            raise ResultsError(f"no sweep '{name}' among {self.name}")
        if chosen == self.sweeps:
            return self
        return Results(chosen, tuple(run for run in self.members if run.sweep == name))

    # ---- of one sweep

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

    @cached_property
    def compared_arms(self) -> dict[str, str]:
        """The baseline of every arm of the only sweep that has one, and not the very same runs; measured or not."""
        runs = {arm: set(self.run_ids(arm)) for arm in self.baselines}
        return {arm: base for arm, base in self.baselines.items() if base is not None and runs[arm] != runs.get(base)}

    @cached_property
    def by_arm(self) -> dict[str, dict[int, SweepRun]]:
        """The runs of every arm of the only sweep by seed."""
        runs: dict[str, dict[int, SweepRun]] = {arm.label: {} for arm in self.sweep.arms}
        for run in self.members:
            runs[run.arm.label][run.seed] = run
        return runs

    def run_ids(self, arm: str | None) -> list[str]:
        """Return the run ids of an arm of the only sweep, in the order of the seeds."""
        return [run.run_id for run in self.by_arm.get(str(arm), {}).values()]

    @cached_property
    def compared_rows(self) -> dict[str, Row]:
        """The row of :attr:`summary` on the compared metric, by arm of the only sweep."""
        return {row["arm"]: row for row in self.rows if row["metric"] == self.compared_metrics[row["arm"]]}

    @cached_property
    def trials(self) -> list[tuple[int, TrialRecord]]:
        """The trials of the only sweep's search, each with its place in the order in which they were begun.

        Completed trials come first, from the best on, then pruned ones, then the rest. A trial with a value waits again
        if a run of its arm was deleted since, because no run holds the value any more.
        """
        search = self.sweep.search
        if search is None:
            return []
        sign = -1.0 if search.goal == "max" else 1.0
        lost = {run.arm.label for run in self.members if run.status == RunStatus.NEW}
        trials = [
            TrialRecord(arm=trial.arm, state="waiting", params=trial.params)
            if trial.value is not None and trial.arm in lost
            else trial
            for trial in search.trials
        ]

        def order(numbered: tuple[int, TrialRecord]) -> tuple[int, float]:
            trial = numbered[1]
            return _TRIAL_ORDER.get(trial.state, 2), math.inf if trial.value is None else sign * trial.value

        return sorted(enumerate(trials), key=order)

    @property
    def objectives(self) -> dict[str, Goal]:
        """Whether small or large values are good, by objective of the only sweep's search; empty without a search."""
        search = self.sweep.search
        return {objective.metric: objective.goal for objective in search.objectives} if search else {}

    @property
    def best_trial(self) -> TrialRecord | None:
        """The completed trial with the best value of the only sweep's search; None if there is none."""
        complete = (trial for _, trial in self.trials if trial.state == "complete")
        return next((trial for trial in complete if trial.value is not None), None)

    def measured(self, axis: Axis = STEPS) -> list[SweepRun]:
        """Return the runs that have evaluations, all of them at a known place along an axis."""
        measured = []
        for run in self.members:
            steps = {step for name, curve in run.curves.items() if is_evaluation(name) for step in curve}
            if steps and not any(math.isnan(run.places[axis.name][step]) for step in steps):
                measured.append(run)
        return measured

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The measures of progress that every evaluation records; others would give means over fewer runs."""
        count = len(self.measured())
        return tuple(axis for axis in AXES if axis is STEPS or (count and len(self.measured(axis)) == count))

    @cached_property
    def _curves(self) -> Curves:
        curves: dict[str, dict[str, dict[int, Curve]]] = {arm: {} for arm in self.baselines}
        for run in self.members:
            for metric, curve in run.curves.items():
                if is_evaluation(metric):
                    curves[run.arm.label].setdefault(metric, {})[run.seed] = curve
        return curves

    def metrics(self, arm: str | None) -> list[str]:
        """Return the evaluation metrics that an arm of the only sweep has measured, those with a protocol first."""
        return sorted(self._curves.get(str(arm), ()), key=lambda name: (not is_protocol(name), name))

    def seed_curves(self, arm: str | None, metric: str | None, axis: str = "step") -> SeedCurves:
        """Return an arm's values of an evaluation metric along an axis, by seed; empty if never measured."""
        return self._along(axis, arm, self._curves.get(str(arm), {}).get(str(metric), {}))

    def paired_curves(self, arm: str, metric: str, axis: str = "step") -> tuple[SeedCurves, SeedCurves]:
        """Return :meth:`seed_curves` of an arm and of its baseline, reduced to the points that can be compared."""
        baseline = self.baselines[arm]
        curves, baseline_curves = pair_curves(self.seed_curves(arm, metric), self.seed_curves(baseline, metric))
        return self._along(axis, arm, curves), self._along(axis, baseline, baseline_curves)

    def _along(self, axis: str, arm: str | None, curves: SeedCurves) -> SeedCurves:
        """Return the curves of an arm over a measure of progress; values at unknown progress are left out."""
        if axis == STEPS.name:
            return curves
        along: dict[int, Curve] = {}
        for seed, curve in curves.items():
            places = self.by_arm[str(arm)][seed].places[axis]
            along[seed] = {places[step]: value for step, value in curve.items() if not math.isnan(places[step])}
        return along

    @cached_property
    def names(self) -> dict[str, dict[str, str]]:
        """The name of each evaluation metric for each arm of the only sweep, one for each protocol."""
        arms = {arm: self.run_ids(arm) for arm in self.baselines}
        metrics = dict.fromkeys(metric for arm in arms for metric in self.metrics(arm))
        return {metric: self.protocols.names(arms, metric) for metric in metrics}

    def conflicts(self, arm: str, metric: str) -> list[str]:
        """Return the fields in which the protocols of a metric differ between the runs of an arm and its baseline."""
        return self.protocols.conflicts([*self.run_ids(arm), *self.run_ids(self.baselines[arm])], metric)

    def alike_metrics(self, arm: str | None) -> list[str]:
        """Return the metrics of the compared kind that an arm has measured, each under its own protocol."""
        is_alike = is_protocol(self.metric)
        return [name for name in self.metrics(arm) if is_alike and metric_kind(name) == metric_kind(self.metric)]

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
            alike = [name for name in self.alike_metrics(arm) if name in shared]
            alike = [self.metric] if self.metric in shared else alike
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
        found = _sweeps_at(path)
        return Results(tuple(sweep for sweep, _ in found), tuple(run for _, runs in found for run in runs))
    except (ResultsError, RootError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"'{path}' holds a file that cannot be read as results: {error!r}") from error


def _sweeps_at(path: Path) -> list[tuple[SweepManifest, list[SweepRun]]]:
    """Return the manifests of a path's sweeps, each with its runs, arm by arm."""
    if (sweep := SweepDirectory(path.absolute())).is_recorded:
        manifest = sweep.manifest
        return [(manifest, _runs_of(sweep, manifest))]
    if (path / "spec.json").is_file():
        return [_as_sweep(run_at(path))]
    sweeps = RunsRoot(path).sweeps()
    if not sweeps:
        looked = "looked for sweep.json (a sweep), spec.json (a run) and */sweep.json (a runs root) in it"
        raise ResultsError(f"no results at '{path}': {looked if path.is_dir() else 'no such folder'}")
    # By the names of their folders: a copy of a sweep beside it has the manifest of the original.
    manifests = [sweep.manifest.model_copy(update={"name": sweep.path.name}) for sweep in sweeps]
    return [(manifest, _runs_of(sweep, manifest)) for sweep, manifest in zip(sweeps, manifests, strict=True)]


def _runs_of(sweep: SweepDirectory, manifest: SweepManifest) -> list[SweepRun]:
    return [
        SweepRun(manifest.name, arm, planned.seed, sweep.run(planned.run_id))
        for arm in manifest.arms
        for planned in arm.runs
    ]


def _as_sweep(directory: RunDirectory) -> tuple[SweepManifest, list[SweepRun]]:
    """Return a run as a sweep of one arm without a baseline."""
    seed, name = directory.spec["seed"], directory.run_id
    arm = ArmRecord(label=name, runs=(RunRecord(seed=seed, run_id=name),))
    run = SweepRun(name, arm, seed, directory)
    metric = next(filter(is_protocol, run.curves), "")
    compare = ComparisonRecord(metric=metric, goal=goal_of(metric))
    return SweepManifest(name=name, seeds=(seed,), compare=compare, arms=(arm,)), [run]
