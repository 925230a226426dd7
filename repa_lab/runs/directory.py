"""One run's directory.

spec.json         the resolved scientific config and the seed
provenance.json   code, versions, machine
protocols.json    how each metric was measured, by its full name
state.json        where the run stands
metrics.jsonl     one row per logged step and per evaluation
events.jsonl      the run's history: started, resumed, failed, ...
checkpoints/      step-00000600/ with a manifest (see `checkpoints`)
forks/            checkpoints from which other runs begin (see `checkpoints`)
samples/          step-00000600.png
wandb.json        what W&B's server has of the run (see `tracking.wandb`)
plugins/          copies of the plugin files that the run was trained with
profile.json      a measurement of every block of the denoiser at several times, and pictures of it
pinned            if present, nothing of the run is ever deleted

Every JSON file carries a format number; see `files`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from repa_lab.errors import StateError
from repa_lab.files import replace_atomically
from repa_lab.runs import checkpoints, files
from repa_lab.runs.files import DamagedFileError, FormatError, JsonlReader, Row

# Metrics of a profile: agreement with the encoder, and differences between the tokens of an image.
ALIGNMENT_METRICS = ("cka", "cknna", "mutual_knn")
SPATIAL_METRICS = ("lds", "cds", "rmsc")
# What is changed in place as a run is trained; other files are replaced whole.
_CHANGED = ("checkpoints", "forks", "samples", "plugins", "tensorboard", "wandb", files.METRICS, "events.jsonl")


# The libraries on which a number may depend.
_PACKAGES = ("repa-lab", "torch", "diffusers", "timm", "accelerate", "torch-fidelity", "numpy", "scikit-learn")
GPUS = Path("/proc/driver/nvidia/gpus")
T = TypeVar("T")


class RunBusyError(StateError):
    """Another process is training this run."""


class State(StrEnum):
    """What the process that trained a run recorded last; a killed process leaves ``running`` behind."""

    NEW = "new"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    STOPPED = "stopped"
    PRUNED = "pruned"
    DONE = "done"

    @property
    def status(self) -> RunStatus:
        """The status of a run with this state that no process trains."""
        return RunStatus.RESUMABLE if self in (State.RUNNING, State.INTERRUPTED) else RunStatus(self.value)


class RunStatus(StrEnum):
    """Where a run stands, in the words of `plan`, `status` and the report; see :meth:`RunDirectory.status`."""

    NEW = "new"  # nothing has been trained
    RUNNING = "running"  # a process trains the run
    RESUMABLE = "resumable"  # training was interrupted, and continues from the last checkpoint
    FAILED = "failed"  # an error ended training, which continues from the last checkpoint
    STOPPED = "stopped"  # a stop rule ended the run
    PRUNED = "pruned"  # a search ended the run
    DONE = "done"  # the run was trained to its last step

    @property
    def is_final(self) -> bool:
        """Whether no sweep trains the run any further."""
        return self in (RunStatus.DONE, RunStatus.PRUNED)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended: final, or ended by a stop rule."""
        return self.is_final or self is RunStatus.STOPPED


@dataclass(frozen=True)
class RunState:
    """What a run's process recorded last."""

    state: State
    step: int = 0  # the last one that the process reported
    error: str | None = None  # the reason of a failure in one line
    is_diverged: bool = False  # whether the run failed because its loss or its samples were no longer finite


class RunDirectory:
    """Read access to a run; all that is known of a run is in its directory.

    Attributes:
        path: the directory, which need not exist.
        run_id: the run's identity; None takes the directory's name.
    """

    def __init__(self, path: Path, run_id: str | None = None) -> None:
        self.path = path
        self.run_id = run_id or path.name

    def _file(self, name: str) -> str:
        """Return the path of a file as text: a report reads thousands, and joining paths would take as long as that."""
        return f"{self.path}/{name}"

    @property
    def links(self) -> list[Path]:
        """The symbolic links behind which the run, or a part of it, lies; nothing behind them is ever changed."""
        links = [place for place in (self.path.parent, self.path) if place.is_symlink()]
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path) as entries:
            linked = {entry.name for entry in entries if entry.is_symlink()}
            links += [self.path / name for name in _CHANGED if name in linked]
        return links

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def forks(self) -> Path:
        """Folder of the checkpoints that are kept for other runs."""
        return self.path / "forks"

    @property
    def samples(self) -> Path:
        """Folder of the sample grids."""
        return self.path / "samples"

    @property
    def lock(self) -> Path:
        """The file that the process that trains the run holds."""
        return self.path / ".lock"

    @property
    def pin(self) -> Path:
        """If this file exists, nothing of the run may be deleted."""
        return self.path / "pinned"

    @property
    def profile_file(self) -> Path:
        """The file of :attr:`profile`, which need not exist."""
        return self.path / "profile.json"

    @property
    def is_held(self) -> bool:
        """Whether a process trains the run at the moment."""
        return files.is_locked(self.lock)

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved scientific config and the seed, as plain data."""
        return files.read_record(self._file("spec.json"))

    @property
    def provenance(self) -> dict[str, Any]:
        """Code, versions and machine of the first start."""
        return files.read_record(self._file("provenance.json"))

    @property
    def profile(self) -> dict[str, Any]:
        """The profile of the run, which need not exist; see :func:`repa_lab.training.profile.profile_run`."""
        return files.read_record(self.profile_file)

    @property
    def state(self) -> RunState:
        """The recorded state; ``new`` if the run never started."""

        def parse(fields: dict[str, Any]) -> RunState:
            return RunState(State(fields["state"]), fields["step"], fields["error"], fields["is_diverged"])

        return self._read("state.json", parse, RunState(State.NEW), "the run continues from its last checkpoint")

    @property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """How each metric was measured, by its full name; empty if nothing was recorded."""

        def parse(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
            return {name: dict(protocol) for name, protocol in fields.items()}

        return self._read("protocols.json", parse, {}, "it is written again when the run continues")

    def _read(self, name: str, parse: Callable[[dict[str, Any]], T], missing: T, repair: str) -> T:
        """Return what a file holds, or ``missing``; ``repair`` says what happens once a damaged file is deleted."""
        path = self._file(name)
        try:
            return parse(files.read_record(path))
        except FileNotFoundError:
            return missing
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedFileError(f"'{path}' is damaged; delete it, and {repair}") from None

    def status(self, rules: Sequence[Callable[[Row], bool]] | None = None, state: RunState | None = None) -> RunStatus:
        """Return where the run stands: by its recorded state, its lock, its checkpoints and its rows.

        Args:
            rules: the stop rules of the sweep that asks, which decide whether the run is stopped; None takes the
                recorded state.
            state: :attr:`state`, where it is read already.

        Raises:
            DamagedFileError: a file cannot be read.
        """
        recorded = (state or self.state).state
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
        """The step of the newest checkpoint, from which the run continues; 0 without a checkpoint."""
        return max(checkpoints.steps(self.checkpoints), default=0)

    def metrics_reader(self, on_damage: Callable[[int, str], None] | None = None) -> JsonlReader:
        """Return a reader that yields each metric row once, also while the run is trained; see :class:`JsonlReader`."""
        return JsonlReader(self._file(files.METRICS), "step", on_damage)

    def rows(self) -> list[Row]:
        """Return the metric rows, oldest first; refuse a damaged line."""
        return self.metrics_reader().new_rows()

    def events(self) -> list[Row]:
        """Return the run's history, oldest first; refuse a damaged line."""
        return JsonlReader(self._file("events.jsonl")).new_rows()

    def profile_picture(self, baseline: RunDirectory | None = None) -> Path:
        """Return the path of the profile's picture, or of the picture of its difference from a baseline's."""
        return self.path / (f"profile-minus-{baseline.run_id}.png" if baseline else "profile.png")

    def sample_grids(self) -> dict[int, Path]:
        """Return the sample grids by step."""
        return files.by_step(self.samples, ".png")


class RunWriter:
    """The one writer of a run directory, for the length of a with-statement; a lock keeps other processes out.

    Args:
        run: the directory, which is created if necessary.
        patience_s: how long to wait for another process to release the run, in seconds.

    Raises:
        LinkError: the run, or a part of it, lies behind a symbolic link.
        RunBusyError: on entry, if another process holds the run.
    """

    def __init__(self, run: RunDirectory, patience_s: float = 10.0) -> None:
        files.require_no_links(*run.links)
        self.run = run
        run.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(run.lock, timeout=patience_s)
        self._metrics = run.path / files.METRICS
        self._events = run.path / "events.jsonl"

    def __enter__(self) -> RunWriter:
        try:
            self._lock.acquire()
        except Timeout:
            raise RunBusyError(f"run {self.run.run_id} is being trained by another process") from None
        files.drop_torn_row(self._metrics)
        files.drop_torn_row(self._events)
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def describe(self, spec: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Record what the run is, once; a resumed run keeps its first provenance."""
        if not (self.run.path / "spec.json").exists():
            files.write_record(self.run.path / "provenance.json", provenance)
            files.write_record(self.run.path / "spec.json", spec)

    def plugins(self, plugins: Iterable[Path]) -> None:
        """Copy the plugin files that the run is trained with; nothing ever loads them from here."""
        for file in plugins:
            # As bytes: a plugin may declare an encoding other than UTF-8.
            replace_atomically(self.run.path / "plugins" / file.name, partial(shutil.copyfile, file))

    def protocols(self, protocols: Mapping[str, Mapping[str, Any]]) -> None:
        """Record how each metric is measured from now on; the history lists the fields that changed."""
        known = self.run.protocols
        shared = known.keys() & protocols.keys()
        changed = {
            field for name in shared for field, value in protocols[name].items() if known[name].get(field) != value
        }
        if changed:
            self.event("protocols changed", fields=sorted(changed))
        files.write_record(self.run.path / "protocols.json", protocols)

    def start_over(self) -> list[Path]:
        """Delete rows, samples, checkpoints and profiles, as if the run had never begun, and note it in the history.

        Return what lies among the checkpoints and stays, because it is not ours: links, and other names.
        """
        folders = (self.run.checkpoints, self.run.forks)
        for folder in folders:
            checkpoints.clear(folder)
        pictures = (self.run.profile_picture(), *self.run.path.glob("profile-minus-*.png"))
        for path in (*self.run.sample_grids().values(), self.run.profile_file, *pictures):
            files.delete(path)
        self.replace_rows([])
        self.event("started over")
        return [folder / name for folder in folders for name in files.names_in(folder)]

    def rewind(self, step: int) -> None:
        """Delete the rows and samples after ``step``, which are made again from the checkpoint of that step."""
        rows = self.run.rows()
        kept = [row for row in rows if row["step"] <= step]
        self.replace_rows(kept)
        for later in (path for made, path in self.run.sample_grids().items() if made > step):
            later.unlink()
        if len(kept) < len(rows):
            self.event("rewound", step=step, rows_dropped=len(rows) - len(kept))

    def replace_rows(self, rows: Sequence[Row]) -> None:
        """Replace all metric rows."""
        files.rewrite_rows(self._metrics, rows)

    def row(self, row: Row) -> None:
        """Append a metric row, which must have a ``step``; write values that are not finite as null."""
        finite = {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()
        }
        files.append_row(self._metrics, {"step": row["step"], **finite})

    def event(self, kind: str, **facts: Any) -> None:
        """Append to the run's history."""
        files.append_row(self._events, {"time": round(time.time(), 3), "event": kind, **facts})

    def state(self, state: State, step: int, error: str | None = None, is_diverged: bool = False) -> None:
        """Record where the run stands, and note it in the history."""
        self.event(state.value, step=step, **({"error": error} if error else {}))
        files.write_record(self.run.path / "state.json", asdict(RunState(state, step, error, is_diverged)))


def provenance() -> dict[str, Any]:
    """Return what a number is made with: code, libraries, machine. Never the environment: it may hold secrets."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpu_models(),
    }


def gpu_models(folder: Path = GPUS) -> list[str]:
    """Return the GPUs of this machine as the driver names them; none without a driver."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*/information"))]
    models = (re.search(r"^Model:[ \t]*(.*)", text, re.MULTILINE) for text in texts)
    return [model[1].strip() if model else "the GPU" for model in models]


def git_state() -> dict[str, Any] | None:
    """Return the commit of this checkout and whether it is changed; None if the package is not in a repository."""

    def git(*command: str) -> str:
        here = Path(__file__)
        return subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is someone else's repository
        described = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}
