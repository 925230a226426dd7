"""Delete what a runs root does not need: leftovers of kills, checkpoints of pruned runs, and conveniences.

Nothing is deleted behind a symbolic link. Links, and names that repa-lab does not give, are left and named.
"""

from __future__ import annotations

import filecmp
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from repa_lab.runs import checkpoints, files
from repa_lab.runs.directory import RunDirectory, RunStatus
from repa_lab.runs.files import DamagedFileError
from repa_lab.runs.root import RunsRoot

_RUN_ID = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can be deleted.

    Attributes:
        path: the file or folder.
        why: what it is.
        is_useless: whether nobody needs it; the rest is deleted only if disk space is short.
    """

    path: Path
    why: str
    is_useless: bool

    @cached_property
    def size(self) -> int:
        """Bytes, as they were when first asked for: ask before deleting."""
        return size_of(self.path)


@dataclass(frozen=True)
class Skipped:
    """A file, folder or link that lies where garbage is looked for, and is left alone.

    Attributes:
        path: the file, folder or link.
        why: what keeps it.
        is_failure: whether it should have been deleted.
    """

    path: Path
    why: str
    is_failure: bool = False


def find_garbage(root: RunsRoot) -> tuple[list[Garbage], list[Skipped]]:
    """Return all that can be deleted, useless files first, and what is left alone because it is not ours.

    The newest undamaged checkpoint of a run stays, as does all of a run that is pinned or being trained. While a sweep
    is carried out, the checkpoints that other runs may fork from stay too.
    """
    is_busy = any(sweep.is_held for sweep in root.sweeps())
    garbage, left = list[Garbage](), list[Skipped]()
    for item in (*_copies(root), *(item for run in root.runs() for item in _items_of(run, is_busy))):
        garbage.append(item) if isinstance(item, Garbage) else left.append(item)
    return sorted(garbage, key=lambda item: not item.is_useless), list(dict.fromkeys(left))


def collect(
    root: RunsRoot, disk_bytes: int | None = None, dry_run: bool = False
) -> tuple[list[Garbage], list[Skipped]]:
    """Delete useless files, and, if the root is still larger than a limit, more files until it is not.

    Args:
        disk_bytes: the limit; None deletes only useless files.
        dry_run: whether to delete nothing and only return what would be deleted.

    Returns:
        What was deleted, and what was left alone because it is not ours or cannot be deleted.
    """
    size, deleted = (size_of(root.path) if disk_bytes is not None else 0), list[Garbage]()
    garbage, left = find_garbage(root)
    for item in garbage:
        if not item.is_useless and (disk_bytes is None or size <= disk_bytes):
            continue
        freed = item.size
        try:
            if not dry_run:
                files.delete(item.path)
        except OSError as error:
            left.append(Skipped(item.path, f"{item.why}: {error.strerror or error}", is_failure=True))
            continue
        size -= freed
        deleted.append(item)
    return deleted, left


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; count a file with two names once."""
    sizes: dict[tuple[int, int], int] = {}
    inside = (f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names)
    for file in inside if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # deleted meanwhile
            status = os.lstat(file)
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def _copies(root: RunsRoot) -> Iterator[Garbage | Skipped]:
    """Yield the copies of runs in the folders of sweeps, unless there is only the copy."""
    for sweep in root.sweeps():
        try:
            is_backup = bool(sweep.copies) and sweep.manifest.name != sweep.path.name
        except DamagedFileError as error:
            yield Skipped(sweep.path, str(error))
            continue
        if is_backup:
            yield Skipped(sweep.path, f"a copy of sweep {sweep.manifest.name}, with copies of its runs")
            continue
        for run_id, path in sweep.copies.items():
            original = root.run(run_id).path
            if original == path:
                continue
            if _is_copy(path, original):
                yield Garbage(path, f"a copy of run {run_id}, in the place of a link", True)
            else:
                yield Skipped(path, f"a copy of run {run_id}, from which it differs")


def _is_copy(folder: Path, original: Path) -> bool:
    """Return whether another folder has all files of a folder, byte for byte."""
    for path in folder.rglob("*"):
        same = original / path.relative_to(folder)
        is_same = same.is_dir() if path.is_dir() else same.is_file() and filecmp.cmp(path, same, shallow=False)
        if path.is_symlink() or not is_same:
            return False
    return True


def _items_of(run: RunDirectory, is_busy: bool) -> Iterator[Garbage | Skipped]:
    """Yield the garbage of a run, unless the run is pinned or being trained, and what is left alone."""
    if not _RUN_ID.fullmatch(run.run_id):
        yield Skipped(run.path, "not the name of a run")
        return
    if run.links:
        yield from (Skipped(link, f"a link to {link.readlink()}") for link in run.links)
        return
    if run.pin.exists() or run.is_held:
        return
    try:
        status = run.status()
    except DamagedFileError as error:
        yield Skipped(run.path, str(error))
        return
    for path in run.foreign:
        why = f"a link to {path.readlink()}" if path.is_symlink() else "not the name of a checkpoint"
        yield Skipped(path, why)
    yield from (item for item in _garbage_of(run, status, is_busy) if not item.path.is_symlink())


def _garbage_of(run: RunDirectory, status: RunStatus, is_busy: bool) -> Iterator[Garbage]:
    for folder in (run.checkpoints, run.forks):
        for path in checkpoints.leftovers(folder):
            why = "left by a kill" if path.name.startswith(".tmp-") else "a damaged checkpoint"
            yield Garbage(path, why, True)
    saved = files.by_step(run.checkpoints).values()
    if status is RunStatus.PRUNED:
        for path in saved:
            yield Garbage(path, "checkpoint of a pruned run", True)
    elif status is RunStatus.DONE:
        last = checkpoints.latest(run.checkpoints)
        for path in (path for path in saved if last is not None and path != last[1]):
            yield Garbage(path, "an older checkpoint of a run that is done", False)
    if status.is_final and not is_busy:
        for path in files.by_step(run.forks).values():
            yield Garbage(path, "kept for runs that begin like this one", False)
