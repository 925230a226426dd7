"""The runs of sweeps as data frames. A damaged file is left out and named, so that no number is silently wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from repa_lab.report.summary import KEYS, dotted
from repa_lab.runs import RunDirectory, RunState, SweepManifest
from repa_lab.runs.files import FormatError, Row
from repa_lab.runs.root import ArmRecord

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
UNKNOWN = "unknown"  # the status of a run whose state cannot be read
_KEYS = [*KEYS, "seed", "run_id"]
_RUN_COLUMNS = [*KEYS, "baseline", "seed", "run_id", "state", "step", "images", "seconds", "processes", "error"]
_AXES = ("step", "images", "hours", "flops")
_NUMBERS = frozenset({int, float})  # and not bool, which is an int
_SECONDS_PER_HOUR = 3600


class Progress(NamedTuple):
    """How far a run was at a step; NaN where no row records it.

    Attributes:
        images: images seen.
        seconds: seconds of training, without evaluations, on each process.
        flops: FLOPs of the denoiser, projectors and encoders.
    """

    images: float
    seconds: float
    flops: float


class History(NamedTuple):
    """What the metric rows of a run say.

    Attributes:
        progress: progress by logged step.
        totals: the last recorded value of every measure of progress and cost.
        measurements: value by metric and step; if a value was written twice, the last counts.
    """

    progress: dict[float, Progress]
    totals: dict[str, float]
    measurements: dict[str, dict[float, float]]


def is_progress(name: str) -> bool:
    """Return whether an entry of a metric row is progress or cost, rather than a measurement."""
    return name in ("step", "images", "seconds") or name.startswith("cost/")


@functools.lru_cache(maxsize=1024)
def _split(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the entries of a metric row that are progress, and those that are measurements; rows have few forms."""
    return [name for name in names if is_progress(name)], [name for name in names if not is_progress(name)]


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
    def status(self) -> str:
        """Where the run stands; :data:`UNKNOWN` if that cannot be read."""
        if self.state is None:
            return UNKNOWN
        recorded = self.state.state.status
        if recorded.is_final:
            return recorded.value
        return self._read("state.json", lambda: self.run.status(state=self.state).value, UNKNOWN)

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The resolved config and the seed; empty for a run that never started."""
        return self._read("spec.json", lambda: self.run.spec, {})

    @property
    def planned_steps(self) -> int | None:
        """Number of steps that the run was asked for; None if it is not known."""
        train = self.spec.get("train")
        steps = train.get("steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        """The last step that the run reported or logged."""
        return int(max(self.state.step if self.state else 0, *self.history.progress, 0))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Code, versions and machine of the run."""
        return self._read("provenance.json", lambda: self.run.provenance, {})

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """Everything that a metric's values depend on, by metric; empty for runs without a record."""
        return self._read("protocols.json", lambda: self.run.protocols, {})

    @cached_property
    def grids(self) -> dict[int, Path]:
        """The sample grids by step."""
        return self._read("samples", self.run.sample_grids, {})

    @property
    def processes(self) -> int:
        """Number of processes that share the run."""
        processes = self.provenance.get("processes", 1)
        return processes if isinstance(processes, int) and processes > 0 else 1

    @cached_property
    def history(self) -> History:
        """What the metric rows say: NaN for null, without values that are no numbers and a torn last line."""

        def leave_out(number: int, reason: str) -> None:
            self._note(f"metrics.jsonl:{number}", f"{reason}; the line is left out")

        rows: list[Row] = self._read("metrics.jsonl", self.run.metrics_reader(leave_out).new_rows, [])
        by_step: dict[float, dict[str, float]] = {}
        totals: dict[str, float] = {}
        measurements: dict[str, dict[float, float]] = {}
        for row in rows:
            # Nearly every row, of very many, holds only numbers.
            numbers = row if _NUMBERS.issuperset(map(type, row.values())) else self._numbers(row)
            step, (progress_names, metrics) = row["step"], _split(tuple(numbers))
            progress = {name: numbers[name] for name in progress_names}
            by_step.setdefault(step, {}).update(progress)
            totals.update(progress)
            for metric in metrics:
                values, value = measurements.setdefault(metric, {}), numbers[metric]
                if step in values and values[step] != value and not math.isnan(value):
                    self._note("metrics.jsonl", f"{metric} at step {step} is there twice, differently; the last counts")
                values[step] = value
        return History({step: _progress(known) for step, known in by_step.items()}, totals, measurements)

    def places(self, axis: str) -> dict[float, float]:
        """Return the ``step``, ``images``, device ``hours`` or ``flops`` at every logged step; NaN where not known."""
        progress = self.history.progress
        if axis == "step":
            return dict(zip(progress, progress, strict=True))
        if axis == "hours":
            devices = self.processes / _SECONDS_PER_HOUR
            return {step: place.seconds * devices for step, place in progress.items()}
        return {step: getattr(place, axis) for step, place in progress.items()}

    @cached_property
    def changed_protocols(self) -> list[str]:
        """The fields of protocols that changed between two starts of the run; versions of libraries may change."""

        def changed() -> list[str]:
            events = self.run.events()
            changes = [event["fields"] for event in events if event.get("event") == "protocols changed"]
            return sorted({str(name) for fields in changes for name in fields} - {"versions"})

        return self._read("events.jsonl", changed, [])

    def troubles_of_measurements(self) -> list[tuple[str, str]]:
        """Read the measurements and their protocols, and return everything that could not be used so far."""
        _ = self.history, self.protocols
        changed = ", ".join(self.changed_protocols)
        reason = f"between two starts its protocols changed in {changed}; earlier values differ"
        return list(dict.fromkeys([*self.troubles, *([("events.jsonl", reason)] if changed else [])]))

    def all_troubles(self) -> list[tuple[str, str]]:
        """Read every file, and return (file and line, reason) of everything that could not be used."""
        _ = self.status, self.spec, self.provenance, self.grids
        return self.troubles_of_measurements()

    def _numbers(self, row: Row) -> dict[str, float]:
        numbers: dict[str, float] = {name: math.nan if value is None else value for name, value in row.items()}
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


def _progress(row: Mapping[str, float]) -> Progress:
    flops = row.get("cost/train_flops", math.nan) + row.get("cost/encoder_flops", 0.0)
    return Progress(row.get("images", math.nan), row.get("seconds", math.nan), flops)


@dataclass(frozen=True)
class Member:
    """A run in its place in a sweep: its arm in the manifest, the keys of its rows, and its files."""

    arm: ArmRecord
    keys: Mapping[str, Any]
    reader: RunReader

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.keys["run_id"])


def members_of(manifest: SweepManifest, find: Callable[[str], RunDirectory]) -> Iterator[Member]:
    """Yield the runs of a sweep, arm by arm; ``find`` returns the directory of a run by its id."""
    for arm in manifest.arms:
        for planned in arm.runs:
            keys = {"sweep": manifest.name, "arm": arm.label, "seed": planned.seed, "run_id": planned.run_id}
            yield Member(arm, keys, RunReader(find(planned.run_id)))


def runs_frame(members: Iterable[Member]) -> pd.DataFrame:
    """Return a row per run; for the columns see :class:`repa_lab.report.results.Results`."""
    import pandas as pd

    sweeps: dict[str, list[Member]] = {}
    for member in members:
        sweeps.setdefault(member.keys["sweep"], []).append(member)
    rows: list[Row] = []
    for sweep in sweeps.values():
        configs = [dotted(member.reader.spec) for member in sweep]
        fields = {name for config in configs for name in config}
        # A plain axis is named after the field it sets: the value is more precise than the level's name, and typed.
        for member, config in zip(sweep, configs, strict=True):
            levels = {axis: name for axis, name in member.arm.levels.items() if axis not in fields}
            rows.append({**levels, **config, **_run_row(member)})
    frame = pd.DataFrame(rows, columns=None if rows else _RUN_COLUMNS)
    return frame[[*_RUN_COLUMNS, *(column for column in frame.columns if column not in _RUN_COLUMNS)]]


def _run_row(member: Member) -> Row:
    reader = member.reader
    progress = reader.history.progress
    return {
        "seconds": None,
        **reader.history.totals,
        **member.keys,
        "baseline": member.arm.baseline,
        "state": reader.status,
        "error": reader.state.error if reader.state else None,
        "step": reader.last_step,
        "images": progress[max(progress)].images if progress else None,
        "processes": reader.processes,
    }


def curves_frame(members: Iterable[Member]) -> pd.DataFrame:
    """Return a row per measurement, taken from a row per logged step: there may be a million."""
    import pandas as pd

    steps: dict[str, list[Any]] = {name: [] for name in (*_KEYS, *_AXES)}
    places, metrics, values = list[int](), list[str](), list[float]()
    for member in members:
        first, progress = len(steps["step"]), member.reader.history.progress
        place_of = {step: first + place for place, step in enumerate(progress)}
        for name, key in member.keys.items():
            steps[name] += [key] * len(progress)
        for axis in _AXES:
            steps[axis] += member.reader.places(axis).values()
        for metric, curve in member.reader.history.measurements.items():
            places += [place_of[step] for step in curve]
            metrics += [metric] * len(curve)
            values += curve.values()
    frame = pd.DataFrame(steps).take(places).reset_index(drop=True)
    return frame.assign(metric=metrics, value=pd.Series(values, dtype=float))


def samples_frame(members: Iterable[Member]) -> pd.DataFrame:
    """Return a row per grid of samples."""
    import pandas as pd

    grids = ((member, grid) for member in members for grid in member.reader.grids.items())
    rows = [{**member.keys, "step": step, "path": path} for member, (step, path) in grids]
    return pd.DataFrame(rows, columns=[*_KEYS, "step", "path"])


def troubles_frame(members: Sequence[Member]) -> pd.DataFrame:
    """Return a row per thing that could not be used."""
    import pandas as pd

    troubles = ((member, trouble) for member in members for trouble in member.reader.all_troubles())
    rows = [{**member.keys, "where": where, "what": what} for member, (where, what) in troubles]
    return pd.DataFrame(rows, columns=[*_KEYS, "where", "what"])
