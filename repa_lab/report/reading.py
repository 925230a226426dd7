"""A run directory as it is, damage included: what cannot be read is left out and named, so that no number is silently wrong."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from repa_lab.report.progress import is_progress, processes_of, progress_of
from repa_lab.runs import RunDirectory, RunState, RunStatus

Numbers = dict[str, float]
T = TypeVar("T")
UNKNOWN = "unknown"
_CHANGED = "protocols changed"
_NUMBERS = frozenset({int, float})  # and not bool, which is an int


@dataclass(frozen=True)
class Trouble:
    """Something of a run that could not be used: ``where`` is a file and a line, ``what`` a reason."""

    where: str
    what: str


@dataclass
class RunReader:
    """Reads a run's files once each; :attr:`troubles` grows with what was read.

    Attributes:
        run: the directory, there or not.
        troubles: what could not be used so far.
    """

    run: RunDirectory
    troubles: list[Trouble] = field(default_factory=list)

    @cached_property
    def state(self) -> RunState | None:
        """What the run recorded last, None if that cannot be read."""
        return self._read("state.json", lambda: self.run.state, None)

    @cached_property
    def status(self) -> RunStatus | None:
        """Where the run stands, None if that cannot be read."""
        return self._read("state.json", self.run.status, None) if self.state else None

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The resolved config and the seed; empty for a run that never started."""
        return self._mapping("spec.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the run was made with."""
        return self._mapping("provenance.json")

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """By metric, all that its numbers depend on; empty for runs that did not record it."""
        found = self._mapping("protocols.json")
        return {metric: protocol for metric, protocol in found.items() if isinstance(protocol, dict)}

    def changed_protocols(self) -> list[str]:
        """The fields of protocols that changed between two starts of the run, which is noted; library versions may."""
        fields: list[str] = self._read("events.jsonl", self._changed, [])
        if fields:
            self._note(
                "events.jsonl",
                f"between two starts its protocols changed in {', '.join(fields)}; earlier values differ",
            )
        return fields

    @cached_property
    def rows(self) -> list[Numbers]:
        """The metric rows with NaN for null, oldest first, without what is no number and without a torn last line."""
        path = self.run.path / "metrics.jsonl"
        content = self._read(path.name, path.read_bytes, b"") if path.exists() else b""
        complete = content.split(b"\n")[:-1]
        rows = (self._row(number, line) for number, line in enumerate(complete, start=1) if line.strip())
        return [row for row in rows if row is not None]

    @cached_property
    def progress(self) -> dict[int, Numbers]:
        """How far training was at every step that was logged; see :func:`repa_lab.report.progress.progress_of`."""
        merged: dict[int, Numbers] = {}
        for row in self.rows:
            known = merged.setdefault(int(row["step"]), {})
            for name in filter(is_progress, row):
                known[name] = row[name]
        processes = processes_of(self.provenance)
        return {step: progress_of(row, processes) for step, row in merged.items()}

    @property
    def costs(self) -> Numbers:
        """The last of every cumulative ``cost/*`` entry, and of ``seconds``."""
        last = {name: value for row in self.rows for name, value in row.items() if is_progress(name)}
        return {name: value for name, value in last.items() if name not in ("step", "images")}

    def measurements(self) -> dict[str, dict[int, float]]:
        """Value by metric and step; of one that was written twice the last counts, and a contradiction is noted."""
        found: dict[str, dict[int, float]] = {}
        for row in self.rows:
            step = int(row["step"])
            for metric in itertools.filterfalse(is_progress, row):
                value, values = row[metric], found.setdefault(metric, {})
                if values.get(step, value) != value and not math.isnan(value):
                    self._note(
                        "metrics.jsonl", f"{metric} at step {step} stands there twice, differently; the last counts"
                    )
                values[step] = value
        return found

    def _changed(self) -> list[str]:
        changes = [event["fields"] for event in self.run.events() if event.get("event") == _CHANGED]
        return sorted({str(name) for fields in changes for name in fields} - {"versions"})

    def _row(self, number: int, line: bytes) -> Numbers | None:
        where = f"metrics.jsonl:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            self._note(where, "not JSON; the line is left out")
            return None
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            self._note(where, "no step; the line is left out")
            return None
        is_plain = all(type(value) in _NUMBERS for value in row.values())  # as nearly every row is, of very many
        return row if is_plain else dict(self._numbers(where, row))

    def _numbers(self, where: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
        for name, value in row.items():
            if value is None:
                yield name, math.nan
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield name, value
            else:
                self._note(where, f"{name} is no number; it is left out")

    def _mapping(self, name: str) -> dict[str, Any]:
        path = self.run.path / name
        found: Any = self._read(name, lambda: json.loads(path.read_text(encoding="utf-8")), {}) if path.exists() else {}
        if not isinstance(found, dict):
            self._note(name, "not a mapping")
            return {}
        return found

    def _read(self, name: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._note(name, f"cannot be read ({type(error).__name__})")
            return otherwise

    def _note(self, where: str, what: str) -> None:
        self.troubles.append(Trouble(where, what))
