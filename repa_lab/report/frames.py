"""The runs of a sweep as data frames. A damaged file is left out and named, so that no number is silently wrong."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import pandas as pd

from repa_lab.report.summary import KEYS, dotted
from repa_lab.runs import RunDirectory, RunsRoot, RunState, RunStatus, SweepManifest
from repa_lab.runs.files import FormatError
from repa_lab.runs.root import ArmRecord

Numbers = dict[str, float]
Row = dict[str, Any]
T = TypeVar("T")
UNKNOWN = "unknown"  # the status of a run whose state cannot be read
_RUN_COLUMNS = [*KEYS, "baseline", "seed", "run_id", "state", "step", "images", "seconds", "processes", "error"]
_CURVE_COLUMNS = [*KEYS, "seed", "run_id", "step", "images", "hours", "flops", "metric", "value"]
_SAMPLE_COLUMNS = [*KEYS, "seed", "run_id", "step", "path"]
_TROUBLE_COLUMNS = [*KEYS, "seed", "run_id", "where", "what"]
_NUMBERS = frozenset({int, float})  # and not bool, which is an int
_SECONDS_PER_HOUR = 3600


@functools.cache
def is_progress(name: str) -> bool:
    """Return whether an entry of a metric row is progress or cost, rather than a measurement."""
    return name in ("step", "images", "seconds") or name.startswith("cost/")


@dataclass
class RunReader:
    """A run's files, each read once.

    Attributes:
        run: the run directory, which may not exist.
        troubles: (file and line, reason) of everything that could not be used; grows as files are read.
    """

    run: RunDirectory
    troubles: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def state(self) -> RunState | None:
        """The state that the run recorded last; None if it cannot be read."""
        return self._read("state.json", lambda: self.run.state, None)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The resolved config and the seed; empty for a run that never started."""
        return self._read("spec.json", lambda: self.run.spec, {})

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Code, versions and machine of the run."""
        return self._read("provenance.json", lambda: self.run.provenance, {})

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """Everything that a metric's values depend on, by metric; empty for runs without a record."""
        return self._read("protocols.json", lambda: self.run.protocols, {})

    @property
    def processes(self) -> int:
        """Number of processes that share the run."""
        processes = self.provenance.get("processes", 1)
        return processes if isinstance(processes, int) and processes > 0 else 1

    @cached_property
    def rows(self) -> list[Numbers]:
        """The metric rows, oldest first: NaN for null, without values that are no numbers and a torn last line."""

        def leave_out(number: int, reason: str) -> None:
            self._note(f"metrics.jsonl:{number}", f"{reason}; the line is left out")

        rows: list[Row] = self._read("metrics.jsonl", self.run.metrics_reader(leave_out).new_rows, [])
        # Nearly every row, of very many, holds only numbers.
        return [row if all(type(value) in _NUMBERS for value in row.values()) else self._numbers(row) for row in rows]

    @cached_property
    def progress(self) -> dict[int, Numbers]:
        """Progress by logged step; NaN where a row does not record it.

        ``images`` seen; device ``hours`` of training, without evaluations, summed over processes; ``flops`` of the
        denoiser, projectors and encoders.
        """
        merged: dict[int, Numbers] = {}
        for row in self.rows:
            merged.setdefault(int(row["step"]), {}).update({name: row[name] for name in row if is_progress(name)})
        nan, devices = math.nan, self.processes / _SECONDS_PER_HOUR
        return {
            step: {
                "images": row.get("images", nan),
                "hours": row.get("seconds", nan) * devices,
                "flops": row.get("cost/train_flops", nan) + row.get("cost/encoder_flops", 0.0),
            }
            for step, row in merged.items()
        }

    def measurements(self) -> dict[str, dict[int, float]]:
        """Return value by metric and step; if a value was written twice, the last counts and a difference is noted."""
        measured: dict[str, dict[int, float]] = {}
        for row in self.rows:
            step = int(row["step"])
            for metric in itertools.filterfalse(is_progress, row):
                value, values = row[metric], measured.setdefault(metric, {})
                if values.get(step, value) != value and not math.isnan(value):
                    self._note("metrics.jsonl", f"{metric} at step {step} is there twice, differently; the last counts")
                values[step] = value
        return measured

    def note_changed_protocols(self) -> None:
        """Note the fields of protocols that changed between two starts of the run; library versions may change."""

        def changed() -> list[str]:
            events = self.run.events()
            changes = [event["fields"] for event in events if event.get("event") == "protocols changed"]
            return sorted({str(name) for fields in changes for name in fields} - {"versions"})

        if fields := ", ".join(self._read("events.jsonl", changed, [])):
            self._note("events.jsonl", f"between two starts its protocols changed in {fields}; earlier values differ")

    def _numbers(self, row: Row) -> Numbers:
        numbers: Numbers = {name: math.nan if value is None else value for name, value in row.items()}
        for name in [name for name, value in numbers.items() if type(value) not in _NUMBERS]:
            self._note("metrics.jsonl", f"{name} at step {row['step']} is no number; it is left out")
            del numbers[name]
        return numbers

    def _read(self, name: str, read: Callable[[], T], default: T) -> T:
        try:
            return read()
        except FileNotFoundError:
            return default
        except FormatError as error:
            self._note(name, str(error).partition("' ")[2])
            return default
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._note(name, f"cannot be read ({type(error).__name__})")
            return default

    def _note(self, where: str, what: str) -> None:
        self.troubles.append((where, what))

    def status(self) -> RunStatus | None:
        """Return where the run stands; None if that cannot be read."""
        return self._read("state.json", self.run.status, None) if self.state else None


@dataclass(frozen=True)
class Member:
    """A run in its place in a sweep: its arm in the manifest, the keys of its rows, and its files."""

    arm: ArmRecord
    keys: Mapping[str, Any]
    reader: RunReader

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.reader.run.run_id


def members_of(manifest: SweepManifest, root: RunsRoot) -> Iterator[Member]:
    """Yield the runs of a sweep, arm by arm."""
    for arm in manifest.arms:
        for planned in arm.runs:
            run = root.run(planned.run_id)
            keys = {"sweep": manifest.name, "arm": arm.label, "seed": planned.seed, "run_id": run.run_id}
            yield Member(arm, keys, RunReader(run))


def runs_frame(members: Sequence[Member]) -> pd.DataFrame:
    """Return a row per run of one sweep; for the columns see :class:`repa_lab.report.results.Results`."""
    specs = ({key: value for key, value in member.reader.spec.items() if key != "seed"} for member in members)
    configs = [dict(dotted(spec)) for spec in specs]
    fields = {name for config in configs for name in config}
    # A plain axis is named after the field it sets: the value is more precise than the level's name, and has a type.
    levels = [{axis: name for axis, name in m.arm.levels.items() if axis not in fields} for m in members]
    rows = [{**level, **config, **_run_row(m)} for m, level, config in zip(members, levels, configs, strict=True)]
    frame = pd.DataFrame(rows, columns=None if rows else _RUN_COLUMNS)
    return frame[[*_RUN_COLUMNS, *(column for column in frame.columns if column not in _RUN_COLUMNS)]]


def _run_row(member: Member) -> Row:
    reader = member.reader
    state, progress, status = reader.state, reader.progress, reader.status()
    last_step = max(progress, default=0)
    totals = {name: value for row in reader.rows for name, value in row.items() if is_progress(name)}
    return {
        **member.keys,
        "baseline": member.arm.baseline,
        "state": status.value if status else UNKNOWN,
        "error": state.error if state else None,
        "step": max(state.step if state else 0, last_step),
        "images": progress[last_step]["images"] if progress else None,
        "seconds": None,
        "processes": reader.processes,
        **{name: value for name, value in totals.items() if name not in ("step", "images")},
    }


def curves_frame(members: Sequence[Member]) -> pd.DataFrame:
    """Return a row per measurement, made column by column: there may be a million."""
    frames = []
    for member in members:
        for metric, values in member.reader.measurements().items():
            reached = [member.reader.progress[step] for step in values]
            progress = {name: [place[name] for place in reached] for name in ("images", "hours", "flops")}
            measured = {"metric": metric, "value": list(map(float, values.values()))}
            frames.append(pd.DataFrame({**member.keys, "step": list(values), **progress, **measured}))
    return pd.concat(frames, ignore_index=True)[_CURVE_COLUMNS] if frames else pd.DataFrame(columns=_CURVE_COLUMNS)


def samples_frame(members: Sequence[Member]) -> pd.DataFrame:
    """Return a row per grid of samples."""
    grids = ((member, grid) for member in members for grid in member.reader.run.sample_grids().items())
    rows = [{**member.keys, "step": step, "path": path} for member, (step, path) in grids]
    return pd.DataFrame(rows, columns=_SAMPLE_COLUMNS)


def troubles_frame(members: Sequence[Member]) -> pd.DataFrame:
    """Return a row per thing that could not be used, of everything that was read so far."""
    rows = []
    for member in members:
        member.reader.note_changed_protocols()
        rows += [{**member.keys, "where": where, "what": what} for where, what in dict.fromkeys(member.reader.troubles)]
    return pd.DataFrame(rows, columns=_TROUBLE_COLUMNS)
