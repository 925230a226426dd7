"""Delete what a runs root does not need: leftovers of kills, checkpoints of pruned runs, and conveniences."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repa_lab.runs import checkpoints
from repa_lab.runs.directory import RunDirectory, RunStatus
from repa_lab.runs.root import RunsRoot


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be deleted.

    Attributes:
        path: the file or folder.
        size: bytes.
        why: what it is.
        is_useless: whether nobody needs it; the rest is deleted only if disk space is short.
    """

    path: Path
    size: int
    why: str
    is_useless: bool


def find_garbage(root: RunsRoot) -> list[Garbage]:
    """Return all that can be deleted, useless files first.

    The newest undamaged checkpoint of a run stays, as does all of a run that is pinned or being trained. While a sweep
    is carried out, the checkpoints that other runs may fork from stay too.
    """
    is_busy = any(sweep.is_held for sweep in root.sweeps())
    runs = (run for run in root.runs() if not (run.pin.exists() or run.is_held))
    garbage = [item for run in runs for item in _garbage_of(run, is_busy)]
    return sorted(garbage, key=lambda item: not item.is_useless)


def collect(root: RunsRoot, disk_bytes: int | None = None, dry_run: bool = False) -> list[Garbage]:
    """Delete useless files, and, if the root is still larger than a limit, more files until it is not.

    Args:
        disk_bytes: the limit; None deletes only useless files.
        dry_run: whether to delete nothing and only return what would be deleted.

    Returns:
        What was deleted.
    """
    size, deleted = (size_of(root.path) if disk_bytes is not None else 0), list[Garbage]()
    for item in find_garbage(root):
        if not item.is_useless and (disk_bytes is None or size <= disk_bytes):
            continue
        if not dry_run and item.path.is_dir():
            shutil.rmtree(item.path)
        elif not dry_run:
            item.path.unlink(missing_ok=True)
        size -= item.size
        deleted.append(item)
    return deleted


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; count a file with two names once."""
    if not path.exists():
        return 0
    paths = path.rglob("*") if path.is_dir() else [path]
    stats = [file.lstat() for file in paths if file.is_file() and not file.is_symlink()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def _garbage_of(run: RunDirectory, is_busy: bool) -> Iterator[Garbage]:
    for folder in (run.checkpoints, run.forks):
        for pattern, why in ((".tmp-*", "left by a kill"), ("corrupt-*", "a damaged checkpoint")):
            for path in sorted(folder.glob(pattern)):
                yield Garbage(path, size_of(path), why, True)
    saved = [checkpoints.path_of(run.checkpoints, step) for step in checkpoints.steps(run.checkpoints)]
    status = run.status()
    if status is RunStatus.PRUNED:
        for path in saved:
            yield Garbage(path, size_of(path), "checkpoint of a pruned run", True)
    elif status is RunStatus.DONE:
        last = next((path for path in reversed(saved) if checkpoints.is_whole(path)), None)
        for path in (path for path in saved if last is not None and path != last):
            yield Garbage(path, size_of(path), "an older checkpoint of a run that is done", False)
    if status.is_final and run.forks.exists() and not is_busy:
        yield Garbage(run.forks, size_of(run.forks), "kept for runs that begin like this one", False)
