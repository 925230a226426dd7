"""Checkpoints as directories that are whole or absent, and runs that begin from another run's checkpoint.

A checkpoint is filled in a temporary folder. A manifest of sizes and SHA-256 digests is written last; then the folder
is renamed to `step-00000600`. A reader takes the newest checkpoint whose manifest holds and moves a damaged one aside.

Runs whose first steps are the same train them once: the other runs *fork* from a checkpoint of the first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_lab.files import fsync
from repa_lab.runs import files
from repa_lab.runs.files import Row

if TYPE_CHECKING:
    from repa_lab.runs.directory import RunDirectory, RunWriter

MANIFEST = "manifest.json"
_LEFTOVERS = {".tmp-": "left by a kill", "corrupt-": "a damaged checkpoint"}
SIGNATURE = "run.json"  # the run of a checkpoint, and its metric rows so far


@dataclass(frozen=True)
class Fork:
    """The first ``step`` steps of a run are those of the run ``parent``."""

    parent: str
    step: int


def commit(folder: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Write the checkpoint of ``step``, keep the newest ``keep`` checkpoints with it, and return its path.

    The run's id and the number and digest of its metric rows, which are synced to disk before, are written beside the
    files of ``write``, which fills an empty folder.

    Args:
        folder: the ``checkpoints`` or ``forks`` of a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        files.delete(stale)
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    write(temporary)
    for synced in (folder.parent / files.METRICS, folder.parent):
        if synced.exists():
            fsync(synced)
    files.write_record(temporary / SIGNATURE, _signature(folder.parent))
    for path in temporary.iterdir():
        fsync(path)
    digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    files.write_record(temporary / MANIFEST, {"files": digests})
    final = folder / files.step_name(step)
    if final.is_symlink() or final.is_file():
        _set_aside(final)
    files.delete(final)
    temporary.rename(final)
    fsync(folder)
    for old in steps(folder)[:-keep]:
        files.delete(folder / files.step_name(old))
    return final


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, ascending, including damaged checkpoints."""
    return list(files.by_step(folder))


def latest(folder: Path) -> tuple[int, Path] | None:
    """Return step and folder of the newest undamaged checkpoint."""
    saved = files.by_step(folder)
    return next(((step, saved[step]) for step in reversed(saved) if is_whole(saved[step])), None)


def leftover(name: str) -> str | None:
    """Return what a name says of a checkpoint that nothing resumes from; None for other names."""
    return next((what for prefix, what in _LEFTOVERS.items() if name.startswith(prefix)), None)


def clear(folder: Path) -> None:
    """Delete all checkpoints, and the folder unless it has more in it; set checkpoints that are links aside."""
    for name in files.names_in(folder):
        path, is_checkpoint = folder / name, files.step_of(name) is not None
        if is_checkpoint and path.is_symlink():
            _set_aside(path)
        elif is_checkpoint or leftover(name):
            files.delete(path)
    with suppress(OSError):
        folder.rmdir()


def resumable(run: Path) -> tuple[int, Path] | None:
    """Return step and folder of the newest undamaged checkpoint whose metric rows are all there; set newer ones aside.

    They, and damaged ones, are renamed to ``corrupt-...``.

    Raises:
        DamagedFileError: there are undamaged checkpoints, and none fits the metric rows.
    """
    problem, unfit = "", list[Path]()
    for step, path in reversed(files.by_step(run / "checkpoints").items()):
        if not is_whole(path):
            if not path.is_symlink():  # the disk behind a link may be there again tomorrow
                _set_aside(path)
        elif mismatch := _mismatch(path, run):
            problem = problem or mismatch
            unfit.append(path)
        else:
            for newer in unfit:
                _set_aside(newer)
            return step, path
    if problem:
        raise files.DamagedFileError(f"{problem}; restore it, or delete '{run}' to train the run again")
    return None


def _mismatch(checkpoint: Path, run: Path) -> str | None:
    """Return why an undamaged checkpoint does not fit its run's metric rows."""
    try:
        record = files.read_record(checkpoint / SIGNATURE)
    except (FileNotFoundError, files.FormatError):
        return f"'{checkpoint}' is of another version of repa-lab"
    if record["run_id"] != run.name:
        return f"'{checkpoint}' belongs to run {record['run_id']}"
    if record != _signature(run, record["rows"]):
        return f"'{run / files.METRICS}' lacks rows that were written before '{checkpoint.name}'"
    return None


def _signature(run: Path, first: int | None = None) -> dict[str, Any]:
    """Return a run's id, and the number and digest of its metric rows as they are on disk, or of the ``first`` ones."""
    path = run / files.METRICS
    content = path.read_bytes() if path.exists() else b""
    lines = [line for line in content.split(b"\n")[1:-1] if line][:first]  # without the header and a torn last line
    return {"run_id": run.name, "rows": len(lines), "rows_sha256": hashlib.sha256(b"\n".join(lines)).hexdigest()}


def _set_aside(path: Path) -> None:
    path.rename(path.with_name(f"corrupt-{path.name}-{uuid.uuid4().hex[:8]}"))


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint has all files that its manifest lists, unchanged."""
    try:
        digests = files.read_record(path / MANIFEST)["files"]
        return all(_digest(path / name) == recorded for name, recorded in digests.items())
    except (OSError, ValueError, AttributeError, KeyError):
        return False


def forkable_steps(run: RunDirectory) -> list[int]:
    """Return the steps of a run from which other runs can fork, ascending."""
    return sorted({*steps(run.forks), *steps(run.checkpoints)})


def take_fork(parent: RunDirectory, step: int, child: RunWriter, is_childs: Callable[[Row], bool]) -> None:
    """Give a run without a checkpoint the state of another run after ``step``, and the rows and samples up to there.

    Do nothing if the parent has no undamaged checkpoint of this step: the child then trains from the start.

    Args:
        is_childs: whether the child would have written a row of the parent, which may log at other steps.
    """
    folders = (folder / files.step_name(step) for folder in (parent.forks, parent.checkpoints))
    source = next((path for path in folders if path.is_dir() and is_whole(path)), None)
    if source is None:
        return
    rows = [row for row in parent.rows() if row["step"] <= step and is_childs(row)]
    measured = {row["step"] for row in rows if not _is_of_training(row)}
    child.run.samples.mkdir(exist_ok=True)
    for at, grid in parent.sample_grids().items():
        if at in measured:
            shutil.copyfile(grid, child.run.samples / grid.name)
    child.replace_rows(rows)
    child.event("forked", parent=parent.run_id, step=step)

    def copy(folder: Path) -> None:
        for name in files.read_record(source / MANIFEST)["files"]:
            if name != SIGNATURE:
                try:
                    os.link(source / name, folder / name)
                except OSError:  # a file system that cannot link
                    shutil.copyfile(source / name, folder / name)

    commit(child.run.checkpoints, step, copy)


def written_by(row: Row, last: int, measure_every: int, save_every: int, log_every: int) -> bool:
    """Return whether a run of ``last`` steps with these intervals writes a row; see `repa_lab.training.loop.fit`."""
    step = row["step"]
    measures = step % measure_every == 0 or step == last
    return measures or (_is_of_training(row) and (step % save_every == 0 or step % log_every == 0))


def _digest(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _is_of_training(row: Row) -> bool:
    return "loss/total" in row
