"""Checkpoints as directories that are whole or absent.

A checkpoint is filled in a temporary folder; a manifest of sizes and SHA-256 is written last; then the folder is
renamed to `step-00000600`. A reader takes the newest one whose manifest holds and moves a damaged one aside.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from repa_lab.files import fsync
from repa_lab.runs import files

MANIFEST = "manifest.json"
# The run of a checkpoint, and its metric rows so far.
SIGNATURE = "run.json"
_FORMAT = 1


def commit(folder: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Write the checkpoint of ``step`` with ``write(folder)`` and keep the newest ``keep`` checkpoints.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps taken.
        write: fills an empty folder with files.
        keep: how many checkpoints stay, this one included.

    Returns:
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale)
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    write(temporary)
    for path in temporary.iterdir():
        fsync(path)
    files.write_json(temporary / MANIFEST, {path.name: _digest(path) for path in sorted(temporary.iterdir())})
    final = folder / f"step-{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    fsync(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")
    return final


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending, damaged ones included."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def latest(folder: Path, without: Sequence[Path] = ()) -> tuple[int, Path] | None:
    """Return the newest checkpoint whose manifest holds, and its step; damaged ones are renamed to ``corrupt-...``.

    Args:
        folder: the run's checkpoint folder.
        without: checkpoints to pass over.
    """
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:08d}"
        if path in without:
            continue
        if is_whole(path):
            return step, path
        _set_aside(path)
    return None


def _set_aside(path: Path) -> None:
    path.rename(path.with_name(f"corrupt-{path.name}-{uuid.uuid4().hex[:8]}"))


def sign(checkpoint: Path, run: Path) -> None:
    """Sync the metric rows of a run to disk, then write their number and digest and the run's id into a checkpoint.

    Args:
        checkpoint: the folder that is being filled.
        run: the run's directory.
    """
    for path in (run / files.METRICS, run):
        if path.exists():
            fsync(path)
    lines = _metric_lines(run)
    record = {"format": _FORMAT, "run_id": run.name, "rows": len(lines), "rows_sha256": _sha256(lines)}
    files.write_json(checkpoint / SIGNATURE, record)


def resumable(run: Path) -> tuple[int, Path] | None:
    """Return the newest whole checkpoint whose metric rows are all there, and its step; newer ones are set aside.

    Args:
        run: the run's directory.

    Raises:
        DamagedFileError: there are whole checkpoints, and none fits the metric rows.
    """
    folder, problem, unfit = run / "checkpoints", "", list[Path]()
    while newest := latest(folder, unfit):
        if not (found := _mismatch(newest[1], run)):
            for path in unfit:
                _set_aside(path)
            return newest
        problem = problem or found
        unfit.append(newest[1])
    if problem:
        raise files.DamagedFileError(f"{problem}; restore it, or delete '{run}' to train the run again")
    return None


def _mismatch(checkpoint: Path, run: Path) -> str | None:
    """Return why a whole checkpoint does not fit its run's metric rows."""
    signature = checkpoint / SIGNATURE
    record = files.read_object(signature) if signature.exists() else {}
    if record.get("format") != _FORMAT:
        return f"'{checkpoint}' is of another version of the lab"
    if record["run_id"] != run.name:
        return f"'{checkpoint}' belongs to run {record['run_id']}"
    lines = _metric_lines(run)[: record["rows"]]
    if len(lines) < record["rows"] or _sha256(lines) != record["rows_sha256"]:
        return f"'{run / files.METRICS}' lacks rows that were written before '{checkpoint.name}'"
    return None


def _metric_lines(run: Path) -> list[bytes]:
    """Return the complete lines of a run's metric rows."""
    path = run / files.METRICS
    return [line for line in path.read_bytes().split(b"\n")[:-1] if line] if path.exists() else []


def _sha256(lines: list[bytes]) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all that its manifest lists, unchanged."""
    try:
        manifest = files.read_json(path / MANIFEST)
        return all(_digest(path / name) == recorded for name, recorded in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
