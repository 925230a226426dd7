"""What of a runs root can go: leftovers of kills, what pruned runs were, and what is only a convenience."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repa_lab.runs import checkpoints
from repa_lab.runs.directory import RunDirectory
from repa_lab.runs.root import RunsRoot
from repa_lab.runs.state import RunStatus


@dataclass(frozen=True)
class Waste:
    """A file or folder that can go.

    Attributes:
        path: where it is.
        size: bytes.
        why: what it is.
        at_once: whether it is of no use to anybody; the rest goes only where disk is short.
    """

    path: Path
    size: int
    why: str
    at_once: bool

    def remove(self) -> None:
        """Delete it."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def find_waste(root: RunsRoot) -> list[Waste]:
    """All that can go, what is of no use first. A run's newest checkpoint that is whole stays, and all of a run that is
    pinned or being trained, and what other runs may yet begin from while a sweep is carried out.
    """
    is_busy = any(sweep.is_held for sweep in root.sweeps())
    found = [one for run in root.runs() if not (run.is_pinned or run.is_held) for one in _of_run(run, is_busy)]
    return sorted(found, key=lambda one: not one.at_once)


def collect(root: RunsRoot, disk_bytes: int | None = None, dry_run: bool = False) -> list[Waste]:
    """Delete what is of no use; if a limit is given and the root is still larger, more of what can go, until it is not.

    Args:
        root: where runs live.
        disk_bytes: the limit; None deletes only what is of no use.
        dry_run: whether to delete nothing and only say what would go.

    Returns:
        What went.
    """
    size, gone = (size_of(root.path) if disk_bytes is not None else 0), list[Waste]()
    for one in find_waste(root):
        if not one.at_once and (disk_bytes is None or size <= disk_bytes):
            continue
        if not dry_run:
            one.remove()
        size -= one.size
        gone.append(one)
    return gone


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; a file that two names lead to counts once."""
    if not path.exists():
        return 0
    stats = [
        one.lstat() for one in (path.rglob("*") if path.is_dir() else [path]) if one.is_file() and not one.is_symlink()
    ]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def _of_run(run: RunDirectory, is_busy: bool) -> Iterator[Waste]:
    for folder in (run.checkpoints, run.forks):
        for path in sorted(folder.glob(".tmp-*")):
            yield Waste(path, size_of(path), "left by a kill", True)
        for path in sorted(folder.glob("corrupt-*")):
            yield Waste(path, size_of(path), "a damaged checkpoint", True)
    steps = checkpoints.steps(run.checkpoints)
    status = run.status()
    if status is RunStatus.PRUNED:
        for step in steps:
            yield _checkpoint(run, step, "of a pruned run", True)
    elif status is RunStatus.DONE:
        last = _last_whole(run, steps)
        for step in (step for step in steps if step != last and last is not None):
            yield _checkpoint(run, step, "an older checkpoint of a run that is done", False)
    if status.is_final and run.forks.exists() and not is_busy:
        yield Waste(run.forks, size_of(run.forks), "kept for runs that begin like this one", False)


def _checkpoint(run: RunDirectory, step: int, why: str, at_once: bool) -> Waste:
    path = run.checkpoints / f"step-{step:08d}"
    return Waste(path, size_of(path), why, at_once)


def _last_whole(run: RunDirectory, steps: list[int]) -> int | None:
    return next((step for step in reversed(steps) if checkpoints.is_whole(run.checkpoints / f"step-{step:08d}")), None)
