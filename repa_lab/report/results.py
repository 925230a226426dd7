"""The runs of a sweep as DataFrames: one row per run, one per measurement, one per arm and metric."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from repa_lab.report.statistics import Goal
from repa_lab.report.summary import KEYS, Index, SeedCurves, index_curves, is_protocol, metric_kind, summarize
from repa_lab.runs import RunDirectory, RunsRoot, SweepDirectory
from repa_lab.runs.files import Row

Manifest = dict[str, Any]
_RUN_COLUMNS = [*KEYS, "baseline", "seed", "run_id", "state", "step", "images", "seconds", "error"]
_CURVE_COLUMNS = [*KEYS, "seed", "run_id", "step", "images", "metric", "value"]
_PROGRESS = ("step", "images", "seconds")


class ResultsError(ValueError):
    """There is nothing to report at a path, or it cannot be read; the text says what was looked for."""


@dataclass(frozen=True)
class Results:
    """What one or more sweeps have measured so far.

    Attributes:
        sweeps: the manifests, as the sweeps recorded them.
        runs: a row per arm and seed: where the run stands (``step`` in optimizer steps, ``images`` seen, training
            ``seconds``), its level on every axis, and its resolved config under dotted names. A config field that is
            itself an axis holds the field's value.
        curves: a row per measurement: ``step``, ``images``, ``metric``, ``value`` (NaN where it was not finite).
        summary: a row per arm and evaluation metric at equal progress; see :func:`repa_lab.report.summary.summarize`.
    """

    sweeps: tuple[Manifest, ...]
    runs: pd.DataFrame
    curves: pd.DataFrame
    summary: pd.DataFrame

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

    def metrics(self, arm: str) -> list[str]:
        """The evaluation metrics that an arm of the only sweep has measured, those with a protocol first."""
        names = [metric for sweep, label, metric in self._index if (sweep, label) == (self.name, arm)]
        return sorted(names, key=lambda name: (not is_protocol(name), name))

    def seed_curves(self, arm: str | None, metric: str | None) -> SeedCurves:
        """Value by step, by seed, of an arm of the only sweep and an evaluation metric; empty if never measured."""
        return self._index.get((self.name, str(arm), str(metric)), {})

    @cached_property
    def _index(self) -> Index:
        return index_curves(self.curves)

    def compared_metric(self, arm: str) -> str | None:
        """The metric on which an arm can be compared with its baseline, or shown if it has none.

        It is :attr:`metric` where both measured it, else the one metric of its kind (Frechet distances are one kind)
        that both measured under one protocol.

        Returns:
            None if they share none: then they cannot be compared.
        """
        baseline = self.baselines[arm]
        own = self.metrics(arm)
        shared = [name for name in own if baseline is None or name in self.metrics(baseline)]
        if self.metric in shared:
            return self.metric
        alike = [name for name in shared if is_protocol(self.metric) and metric_kind(name) == metric_kind(self.metric)]
        return alike[0] if len(alike) == 1 else None

    def only(self, name: str) -> Results:
        """The results of one sweep.

        Raises:
            ResultsError: no sweep has that name.
        """
        chosen = tuple(sweep for sweep in self.sweeps if sweep["name"] == name)
        if not chosen:
            raise ResultsError(f"no sweep '{name}' among {self.name}")
        frames = (self.runs, self.curves, self.summary)
        return Results(chosen, *(frame[frame["sweep"] == name].reset_index(drop=True) for frame in frames))


def load_results(path: str | Path) -> Results:
    """Read everything that is known of a sweep, of all sweeps of a runs root, or of a single run.

    Args:
        path: a sweep's folder (``runs/<name>``), a runs root, or a run's directory.

    Raises:
        ResultsError: the path is none of these, or a file in it cannot be read.
    """
    path = Path(path)
    try:
        return _collect(_sources(path))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ResultsError(f"'{path}' holds a file that cannot be read as results: {error!r}") from error


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
    measured = [name for row in run.rows() for name in row if "@" in name]
    seed, name = run.spec["seed"], run.run_id
    arm: Manifest = {"label": name, "levels": {}, "baseline": None, "runs": [{"seed": seed, "run_id": name}]}
    compare = {"metric": measured[0] if measured else "", "goal": "min", "targets": {}}
    manifest = {"name": name, "question": "", "seeds": [seed], "compare": compare, "arms": [arm], "search": None}
    return manifest, RunsRoot(run.path.parent.parent)


@dataclass(frozen=True)
class _Member:
    """A run in its place in a sweep."""

    arm: Mapping[str, Any]
    keys: Mapping[str, Any]
    run: RunDirectory
    rows: list[Row]

    def record(self) -> Row:
        state = self.run.state
        last = {key: value for row in self.rows for key, value in row.items() if key in _PROGRESS}
        progress = {"step": max(state.step, last.pop("step", 0)), "images": None, "seconds": None, **last}
        standing = {"baseline": self.arm["baseline"], "state": state.state.value, "error": state.error}
        return {**self.keys, **standing, **progress}

    def config(self) -> Row:
        spec = self.run.spec if (self.run.path / "spec.json").is_file() else {}
        return dict(_flat({key: value for key, value in spec.items() if key != "seed"}))

    def measurements(self) -> Iterator[Row]:
        for row in self.rows:
            place = {**self.keys, "step": row["step"], "images": row.get("images")}
            for metric, value in row.items():
                if metric not in _PROGRESS:
                    yield {**place, "metric": metric, "value": math.nan if value is None else float(value)}


def _collect(sources: Iterable[tuple[Manifest, RunsRoot]]) -> Results:
    sources = list(sources)
    members = [list(_members(manifest, root)) for manifest, root in sources]
    runs = pd.concat([_runs_frame(sweep) for sweep in members], ignore_index=True)
    curves = _curves_frame(member for sweep in members for member in sweep)
    return Results(tuple(manifest for manifest, _ in sources), runs, curves, summarize(runs, index_curves(curves)))


def _members(manifest: Manifest, root: RunsRoot) -> Iterator[_Member]:
    for arm in manifest["arms"]:
        for planned in arm["runs"]:
            run = root.run(planned["run_id"])
            keys = {"sweep": manifest["name"], "arm": arm["label"], "seed": planned["seed"], "run_id": run.run_id}
            yield _Member(arm, keys, run, run.rows())


def _runs_frame(members: list[_Member]) -> pd.DataFrame:
    configs = [member.config() for member in members]
    fields = {name for config in configs for name in config}
    # A plain axis is named after the field it sets: the value says more than the level's name, and has a type.
    levels = [{axis: name for axis, name in m.arm["levels"].items() if axis not in fields} for m in members]
    records = [{**level, **config, **m.record()} for m, level, config in zip(members, levels, configs, strict=True)]
    frame = pd.DataFrame(records, columns=None if records else _RUN_COLUMNS)
    return frame[[*_RUN_COLUMNS, *(column for column in frame.columns if column not in _RUN_COLUMNS)]]


def _curves_frame(members: Iterable[_Member]) -> pd.DataFrame:
    rows = [row for member in members for row in member.measurements()]
    frame = pd.DataFrame(rows, columns=_CURVE_COLUMNS)
    return frame.drop_duplicates([*KEYS, "seed", "metric", "step"], keep="last", ignore_index=True)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{path}.{key}" if path else str(key))
