"""What the runs of a sweep give to its tables: rows, each under its sweep, arm, seed and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from repa_lab.report.progress import processes_of
from repa_lab.report.protocols import dotted
from repa_lab.report.reading import UNKNOWN, RunReader
from repa_lab.report.summary import KEYS
from repa_lab.runs import RunsRoot

Row = dict[str, Any]
_RUN_COLUMNS = [*KEYS, "baseline", "seed", "run_id", "state", "step", "images", "seconds", "processes", "error"]
_CURVE_COLUMNS = [*KEYS, "seed", "run_id", "step", "images", "hours", "flops", "metric", "value"]
_SAMPLE_COLUMNS = [*KEYS, "seed", "run_id", "step", "path"]
_TROUBLE_COLUMNS = [*KEYS, "seed", "run_id", "where", "what"]


@dataclass(frozen=True)
class Member:
    """A run in its place in a sweep."""

    arm: Mapping[str, Any]
    keys: Mapping[str, Any]
    reader: RunReader

    @property
    def run_id(self) -> str:
        """Of the run."""
        return self.reader.run.run_id

    def record(self) -> Row:
        """Where it stands and what it cost."""
        state, logged = self.reader.state, self.reader.progress
        last = max(logged, default=0)
        status = self.reader.status
        standing = {"state": status.value if status else UNKNOWN, "error": state.error if state else None}
        step = max(state.step if state else 0, last)
        images = logged[last]["images"] if logged else None
        processes = processes_of(self.reader.provenance)
        made = {
            "baseline": self.arm["baseline"],
            "step": step,
            "images": images,
            "seconds": None,
            "processes": processes,
        }
        return {**self.keys, **standing, **made, **self.reader.costs}

    def config(self) -> Row:
        """Its resolved config under dotted names."""
        return dict(dotted({key: value for key, value in self.reader.spec.items() if key != "seed"}))

    def measurements(self) -> Iterator[pd.DataFrame]:
        """A row for each, metric by metric; made column by column, for there may be a million."""
        for metric, values in self.reader.measurements().items():
            reached = [self.reader.progress[step] for step in values]
            progress = {name: [one[name] for one in reached] for name in ("images", "hours", "flops")}
            measured = {"metric": metric, "value": list(map(float, values.values()))}
            yield pd.DataFrame({**self.keys, "step": list(values), **progress, **measured})

    def samples(self) -> Iterator[Row]:
        """A row for each grid."""
        for step, path in self.reader.run.sample_grids().items():
            yield {**self.keys, "step": step, "path": path}

    def troubles(self) -> Iterator[Row]:
        """A row for each thing that could not be used."""
        self.reader.changed_protocols()
        for trouble in dict.fromkeys(self.reader.troubles):
            yield {**self.keys, "where": trouble.where, "what": trouble.what}


def members_of(manifest: Mapping[str, Any], root: RunsRoot) -> Iterator[Member]:
    """The runs of a sweep, arm by arm."""
    for arm in manifest["arms"]:
        for planned in arm["runs"]:
            run = root.run(planned["run_id"])
            keys = {"sweep": manifest["name"], "arm": arm["label"], "seed": planned["seed"], "run_id": run.run_id}
            yield Member(arm, keys, RunReader(run))


def runs_frame(members: Sequence[Member]) -> pd.DataFrame:
    """A row per run of one sweep; see :class:`repa_lab.report.results.Results`, as of the other frames here."""
    configs = [member.config() for member in members]
    fields = {name for config in configs for name in config}
    # A plain axis is named after the field it sets: the value says more than the level's name, and has a type.
    levels = [{axis: name for axis, name in m.arm["levels"].items() if axis not in fields} for m in members]
    records = [{**level, **config, **m.record()} for m, level, config in zip(members, levels, configs, strict=True)]
    frame = pd.DataFrame(records, columns=None if records else _RUN_COLUMNS)
    return frame[[*_RUN_COLUMNS, *(column for column in frame.columns if column not in _RUN_COLUMNS)]]


def curves_frame(members: Sequence[Member]) -> pd.DataFrame:
    """A row per measurement."""
    measured = [found for member in members for found in member.measurements()]
    return pd.concat(measured, ignore_index=True)[_CURVE_COLUMNS] if measured else pd.DataFrame(columns=_CURVE_COLUMNS)


def samples_frame(members: Sequence[Member]) -> pd.DataFrame:
    """A row per grid of samples."""
    return pd.DataFrame([row for member in members for row in member.samples()], columns=_SAMPLE_COLUMNS)


def troubles_frame(members: Sequence[Member]) -> pd.DataFrame:
    """A row per thing that could not be used of what was read of the runs until now."""
    return pd.DataFrame([row for member in members for row in member.troubles()], columns=_TROUBLE_COLUMNS)
