"""Checkpoints as directories that are whole or absent.

A checkpoint is filled in a temporary folder; a manifest of sizes and SHA-256 is written last; then the folder is
renamed to `step-00000600`. A reader takes the newest one whose manifest holds and moves a damaged one aside.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from repa_lab.files import fsync
from repa_lab.runs import files

MANIFEST = "manifest.json"


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


def latest(folder: Path) -> tuple[int, Path] | None:
    """The newest checkpoint whose manifest holds, and its step; damaged ones are renamed to ``corrupt-...`` on the way."""
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:08d}"
        if is_whole(path):
            return step, path
        path.rename(folder / f"corrupt-{path.name}-{uuid.uuid4().hex[:8]}")
    return None


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
