"""A run of a sweep and its files, each read once. A damaged file is left out and named: no number is silently wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from repa_lab.report.statistics import Curve
from repa_lab.runs import RunDirectory, RunState
from repa_lab.runs.files import METRICS, FormatError, Row
from repa_lab.runs.root import ArmRecord

T = TypeVar("T")
Trouble = tuple[str, str]  # file and line, and what could not be used there
UNKNOWN = "unknown"  # the status of a run whose state cannot be read
_NUMBERS = (int, float)  # and not bool, which is an int
_SECONDS_PER_HOUR = 3600


@functools.lru_cache(maxsize=1024)
def is_progress(name: str) -> bool:
    """Return whether an entry of a metric row is progress or cost, rather than a measurement."""
    return name in ("step", "images", "seconds") or name.startswith("cost/")


@dataclass(eq=False)
class SweepRun:
    """A run in its place in a sweep."""

    sweep: str  # the sweep's name
    arm: ArmRecord  # the run's arm in the manifest
    seed: int  # the run's seed
    directory: RunDirectory  # the run directory, which may not exist
    troubles: list[Trouble] = field(default_factory=list)  # everything that could not be used; grows as files are read

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.directory.run_id

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that name the run in every data frame of runs."""
        return {"sweep": self.sweep, "arm": self.arm.label, "seed": self.seed, "run_id": self.run_id}

    @cached_property
    def state(self) -> RunState | None:
        """The state that the run recorded last; None if it cannot be read."""
        return self._read("state.json", lambda: self.directory.state, None)

    @cached_property
    def status(self) -> str:
        """Where the run stands; :data:`UNKNOWN` if that cannot be read."""
        if self.state is None:
            return UNKNOWN
        return self._read("state.json", lambda: self.directory.status(state=self.state).value, UNKNOWN)

    @property
    def error(self) -> str | None:
        """The reason of a failure in one line."""
        return self.state.error if self.state else None

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The resolved config and the seed; empty for a run that never started."""
        return self._read("spec.json", lambda: self.directory.spec, {})

    def setting(self, path: str) -> Any:
        """Return the setting at a dotted path; None where there is none."""
        value: Any = self.spec
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def last_step(self) -> int:
        """The last step that the run reported or logged."""
        return int(max(self.state.step if self.state else 0, *self.curves.get("step", ()), 0))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Code, versions and machine of the run."""
        return self._read("provenance.json", lambda: self.directory.provenance, {})

    @property
    def processes(self) -> int:
        """Number of processes that share the run."""
        processes = self.provenance.get("processes", 1)
        return processes if isinstance(processes, int) and processes > 0 else 1

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """Everything that a metric's values depend on, by metric; empty for runs without a record."""
        return self._read("protocols.json", lambda: self.directory.protocols, {})

    @cached_property
    def grids(self) -> dict[int, Path]:
        """The sample grids by step."""
        return self._read("samples", self.directory.sample_grids, {})

    @cached_property
    def curves(self) -> dict[str, dict[float, float]]:
        """Value by step of every entry of the metric rows: measurements, progress and cost.

        NaN stands for null. Values that are no numbers and a torn last line are left out; of two values at one step
        the last counts.
        """

        def leave_out(number: int, reason: str) -> None:
            self.troubles.append((f"{METRICS}:{number}", f"{reason}; the line is left out"))

        rows: list[Row] = self._read(METRICS, self.directory.metrics_reader(leave_out).new_rows, [])
        curves: dict[str, dict[float, float]] = {}
        for row in rows:
            step = row["step"]
            for name, value in row.items():
                number = math.nan if value is None else value
                if type(number) not in _NUMBERS:
                    self.troubles.append((METRICS, f"{name} at step {step} is no number; it is left out"))
                    continue
                curve = curves.setdefault(name, {})
                if step in curve and curve[step] != number and not is_progress(name) and not math.isnan(number):
                    reason = f"{name} at step {step} is there twice, differently; the last counts"
                    self.troubles.append((METRICS, reason))
                curve[step] = number
        return curves

    @cached_property
    def places(self) -> dict[str, Curve]:
        """Progress at every logged step, by axis: ``step``, ``images``, device ``hours``, ``flops``; NaN if unknown."""
        steps, curves = self.curves.get("step", {}), self.curves
        images, seconds, train = (curves.get(name, {}) for name in ("images", "seconds", "cost/train_flops"))
        encoder, devices = curves.get("cost/encoder_flops", {}), self.processes / _SECONDS_PER_HOUR
        return {
            "step": steps,
            "images": {step: images.get(step, math.nan) for step in steps},
            "hours": {step: seconds.get(step, math.nan) * devices for step in steps},
            "flops": {step: train.get(step, math.nan) + encoder.get(step, 0.0) for step in steps},
        }

    def troubles_of_measurements(self) -> list[Trouble]:
        """Read the measurements and their protocols, and return everything that could not be used so far."""
        _ = self.curves, self.protocols

        def changed() -> list[str]:
            events = [event for event in self.directory.events() if event.get("event") == "protocols changed"]
            return sorted({str(name) for event in events for name in event["fields"]} - {"versions"})

        if fields := self._read("events.jsonl", changed, list[str]()):  # versions of libraries may change
            reason = f"between two starts its protocols changed in {', '.join(fields)}; earlier values differ"
            self.troubles.append(("events.jsonl", reason))
        return list(dict.fromkeys(self.troubles))

    def all_troubles(self) -> list[Trouble]:
        """Read every file, and return everything that could not be used."""
        _ = self.status, self.spec, self.provenance, self.grids
        return self.troubles_of_measurements()

    def _read(self, name: str, read: Callable[[], T], default: T) -> T:
        try:
            return read()
        except FileNotFoundError:
            return default
        except FormatError as error:
            reason = str(error).partition("' ")[2]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"cannot be read ({type(error).__name__})"
        self.troubles.append((name, reason))
        return default
