"""One run's directory.

spec.json         the resolved scientific config and the seed
provenance.json   code, versions, machine
protocols.json    what each measured number depends on, by its name
state.json        where the run stands
metrics.jsonl     one row per logged step and per evaluation
events.jsonl      what happened to the run: started, resumed, failed, ...
checkpoints/      step-00000600/ with a manifest (see `checkpoints`)
forks/            checkpoints that other runs begin from (see `forks`)
samples/          step-00000600.png
profile.json      what every block knew when it was last asked (see `profiles`), and pictures of it
pinned            if it is there, nothing of the run is ever deleted
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from repa_lab.files import replace_atomically
from repa_lab.runs import checkpoints, files
from repa_lab.runs.files import Row
from repa_lab.runs.state import RunState, RunStatus, State

PIN = "pinned"


class RunBusyError(RuntimeError):
    """Another process is training this run."""


class RunDirectory:
    """Read access to a run; everything that is known of a run stands in this directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_id(self) -> str:
        """The run's identity, which is its directory's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def forks(self) -> Path:
        """Folder of the checkpoints that are kept for other runs; see :mod:`repa_lab.runs.forks`."""
        return self.path / "forks"

    @property
    def samples(self) -> Path:
        """Folder of the sample grids."""
        return self.path / "samples"

    @property
    def lock(self) -> Path:
        """The file that whoever trains the run holds."""
        return self.path / ".lock"

    @property
    def is_held(self) -> bool:
        """Whether a process trains the run at the moment."""
        return files.is_locked(self.lock)

    @property
    def is_pinned(self) -> bool:
        """Whether nothing of it may be deleted."""
        return (self.path / PIN).exists()

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved scientific config, as plain data."""
        return files.read_object(self.path / "spec.json")

    @property
    def provenance(self) -> dict[str, Any]:
        """Code, versions and machine of the first start."""
        return files.read_object(self.path / "provenance.json")

    @property
    def state(self) -> RunState:
        """Where the run stands; ``new`` if it never started.

        Raises:
            DamagedFileError: it cannot be read.
        """
        path = self.path / "state.json"
        if not path.exists():
            return RunState(State.NEW)
        try:
            return RunState.from_json(files.read_object(path))
        except (ValueError, KeyError, TypeError):
            message = f"'{path}' is damaged; delete it, and the run is taken up from its last checkpoint"
            raise files.DamagedFileError(message) from None

    def status(self, rules: Sequence[Callable[[Row], bool]] | None = None) -> RunStatus:
        """Where the run stands: by its recorded state, its lock, its checkpoints and its rows.

        Args:
            rules: the stop rules of the sweep that asks, which decide whether the run is stopped; None takes what is
                recorded.

        Raises:
            DamagedFileError: a file cannot be read.
        """
        recorded = self.state.state
        if recorded.status.is_final:
            return recorded.status
        if rules and any(holds(row) for row in self.rows() for holds in rules):
            return RunStatus.STOPPED
        if self.is_held:
            return RunStatus.RUNNING
        is_stopped_elsewhere = rules is not None and recorded is State.STOPPED
        if is_stopped_elsewhere or (recorded is State.NEW and self.checkpoint_step):
            return RunStatus.RESUMABLE
        return recorded.status

    @property
    def plugin_files(self) -> list[str]:
        """Names of the plugin files that the run was trained with, of which the directory holds copies."""
        return sorted(path.name for path in self.path.glob("plugins/*.py"))

    @property
    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint, from which the run goes on; 0 without one."""
        return max(checkpoints.steps(self.checkpoints), default=0)

    @property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """What each measured number depends on, by its name; nothing for a run of an older version.

        Raises:
            DamagedFileError: it cannot be read.
        """
        path = self.path / "protocols.json"
        try:
            found = files.read_object(path) if path.exists() else {}
            return {name: dict(protocol) for name, protocol in found.items()}
        except (ValueError, TypeError, AttributeError):
            message = f"'{path}' is damaged; delete it, and it is written again when the run goes on"
            raise files.DamagedFileError(message) from None

    def rows(self) -> list[Row]:
        """The metric rows, oldest first."""
        return files.read_lines(self.path / "metrics.jsonl")

    def events(self) -> list[Row]:
        """The run's history, oldest first."""
        return files.read_lines(self.path / "events.jsonl")

    def sample_grids(self) -> dict[int, Path]:
        """Sample grids by step."""
        return {int(path.stem.removeprefix("step-")): path for path in sorted(self.samples.glob("step-*.png"))}


class RunWriter:
    """The one writer of a run directory, for the length of a with-statement; a lock keeps a second process out.

    Args:
        run: the directory; it is made if need be.
        patience_s: for how long to wait for another process to let go of the run.

    Raises:
        RunBusyError: on entry, when another process holds the run.
    """

    def __init__(self, run: RunDirectory, patience_s: float = 10.0) -> None:
        self.run = run
        run.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(run.lock, timeout=patience_s)
        self._metrics = run.path / "metrics.jsonl"
        self._events = run.path / "events.jsonl"

    def __enter__(self) -> RunWriter:
        try:
            self._lock.acquire()
        except Timeout:
            raise RunBusyError(f"run {self.run.run_id} is being trained by another process") from None
        for log in (self._metrics, self._events):
            files.drop_torn_line(log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def describe(self, spec: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Record what the run is, once; a resumed run keeps its first provenance."""
        if not (self.run.path / "spec.json").exists():
            files.write_json(self.run.path / "provenance.json", dict(provenance))
            files.write_json(self.run.path / "spec.json", dict(spec))

    def plugins(self, plugins: Iterable[Path]) -> None:
        """Keep a copy of the plugin files that the run is trained with; nothing ever loads them from here."""
        for file in plugins:
            # As bytes: a plugin may declare an encoding other than UTF-8.
            replace_atomically(self.run.path / "plugins" / file.name, partial(shutil.copyfile, file))

    def protocols(self, protocols: Mapping[str, Mapping[str, Any]]) -> None:
        """Record what each number depends on as of now; what changed since an earlier start stands in the history."""
        known = self.run.protocols
        shared = known.keys() & protocols.keys()
        changed = {
            field for name in shared for field, value in protocols[name].items() if known[name].get(field) != value
        }
        if changed:
            self.event("protocols changed", fields=sorted(changed))
        files.write_json(self.run.path / "protocols.json", dict(protocols))

    def start_over(self) -> None:
        """Forget rows, samples, checkpoints and profiles, as if the run had never begun; its history says so."""
        for folder in (self.run.checkpoints, self.run.forks, self.run.samples):
            shutil.rmtree(folder, ignore_errors=True)
        for profile in self.run.path.glob("profile*"):
            profile.unlink()
        files.rewrite_lines(self._metrics, [])
        self.event("started over")

    def rewind(self, step: int) -> None:
        """Forget the rows after ``step``: they will be measured again from the checkpoint of that step."""
        rows = self.run.rows()
        kept = [row for row in rows if row["step"] <= step]
        files.rewrite_lines(self._metrics, kept)
        if len(kept) < len(rows):
            self.event("rewound", step=step, rows_dropped=len(rows) - len(kept))

    def replace_rows(self, rows: Sequence[Row]) -> None:
        """Begin with these rows, whatever was written before."""
        files.rewrite_lines(self._metrics, list(rows))

    def row(self, row: Row) -> None:
        """Append a metric row; it must carry its ``step``; what is not finite is written as null."""
        finite = {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()
        }
        files.append_line(self._metrics, {"step": row["step"], **finite})

    def event(self, kind: str, **facts: Any) -> None:
        """Append to the run's history."""
        files.append_line(self._events, {"time": round(time.time(), 3), "event": kind, **facts})

    def state(self, state: State, step: int, error: str | None = None, is_diverged: bool = False) -> None:
        """Change where the run stands and note it in the history."""
        self.event(state.value, step=step, **({"error": error} if error else {}))
        files.write_json(self.run.path / "state.json", RunState(state, step, error, is_diverged).to_json())
