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
from typing import Literal

from repa_lab.runs import checkpoints, files
from repa_lab.runs.directory import RunDirectory, RunStatus
from repa_lab.runs.files import DamagedFileError
from repa_lab.runs.root import RunsRoot

Kind = Literal["useless", "dispensable", "kept", "failed"]
_RUN_ID = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Item:
    """A file, folder or link where garbage is looked for.

    Attributes:
        path: the file, folder or link.
        why: what it is, or what keeps it.
        kind: ``useless`` is always deleted, ``dispensable`` if disk space is short, ``kept`` never, for it is not ours;
            ``failed`` should have been deleted.
    """

    path: Path
    why: str
    kind: Kind

    @cached_property
    def size(self) -> int:
        """Bytes, as they were when first asked for: ask before deleting."""
        return size_of(self.path)


def find_garbage(root: RunsRoot, is_short: bool = True) -> list[Item]:
    """Return all that can be deleted, useless files first, and what is left alone because it is not ours.

    The newest undamaged checkpoint of a run stays, as does all of a run that is pinned or being trained. While a sweep
    is carried out, the checkpoints that other runs may fork from stay too.

    Args:
        is_short: whether to look for dispensable files, which reads the newest checkpoint of every finished run.
    """
    is_busy = any(sweep.is_held for sweep in root.sweeps())
    items = [*_copies(root), *(item for run in root.runs() for item in _items_of(run, is_busy, is_short))]
    return sorted(dict.fromkeys(items), key=lambda item: item.kind != "useless")


def collect(root: RunsRoot, disk_bytes: int | None = None, dry_run: bool = False) -> tuple[list[Item], list[Item]]:
    """Delete useless files, and, if the root is still larger than a limit, more files until it is not.

    Args:
        disk_bytes: the limit; None deletes only useless files.
        dry_run: whether to delete nothing and only return what would be deleted.

    Returns:
        What was deleted, and what was left alone because it is not ours or cannot be deleted.
    """
    deleted, left = list[Item](), list[Item]()
    excess = 0 if disk_bytes is None else size_of(root.path) - disk_bytes
    for item in find_garbage(root, is_short=disk_bytes is not None):
        if item.kind == "kept":
            left.append(item)
        elif item.kind == "useless" or excess > 0:
            freed = item.size
            try:
                if not dry_run:
                    files.delete(item.path)
            except OSError as error:
                left.append(Item(item.path, f"{item.why}: {error.strerror or error}", "failed"))
            else:
                excess -= freed
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


def _copies(root: RunsRoot) -> Iterator[Item]:
    """Yield the copies of runs in the folders of sweeps, unless there is only the copy."""
    for sweep in root.sweeps():
        try:
            is_backup = bool(sweep.copies) and sweep.manifest.name != sweep.path.name
        except DamagedFileError as error:
            yield Item(sweep.path, str(error), "kept")
            continue
        if is_backup:
            yield Item(sweep.path, f"a copy of sweep {sweep.manifest.name}, with copies of its runs", "kept")
            continue
        for run_id, path in sweep.copies.items():
            original = root.run(run_id).path
            if original != path and _is_copy(path, original):
                yield Item(path, f"a copy of run {run_id}, in the place of a link", "useless")
            elif original != path:
                yield Item(path, f"a copy of run {run_id}, from which it differs", "kept")


def _is_copy(folder: Path, original: Path) -> bool:
    """Return whether another folder has all files of a folder, byte for byte."""
    for path in folder.rglob("*"):
        same = original / path.relative_to(folder)
        is_same = same.is_dir() if path.is_dir() else same.is_file() and filecmp.cmp(path, same, shallow=False)
        if path.is_symlink() or not is_same:
            return False
    return True


def _items_of(run: RunDirectory, is_busy: bool, is_short: bool) -> Iterator[Item]:
    """Yield the garbage of a run, unless the run is pinned or being trained, and what is left alone."""
    if not _RUN_ID.fullmatch(run.run_id):
        yield Item(run.path, "not the name of a run", "kept")
        return
    if links := run.links:
        yield from (Item(link, f"a link to {link.readlink()}", "kept") for link in links)
        return
    if run.pin.exists() or run.is_held:
        return
    try:
        status = run.status()
    except DamagedFileError as error:
        yield Item(run.path, str(error), "kept")
        return
    newest = checkpoints.latest(run.checkpoints) if is_short and status is RunStatus.DONE else None
    checkpoint: tuple[str, Kind] | None = (
        ("an older checkpoint of a run that is done", "dispensable") if newest else None
    )
    if status is RunStatus.PRUNED:
        checkpoint = "checkpoint of a pruned run", "useless"
    fork: tuple[str, Kind] | None = None
    if is_short and status.is_final and not is_busy:
        fork = "kept for runs that begin like this one", "dispensable"
    for folder, saved in ((run.checkpoints, checkpoint), (run.forks, fork)):
        for name in files.names_in(folder):
            path, leftover = folder / name, checkpoints.leftover(name)
            if path.is_symlink():
                yield Item(path, f"a link to {path.readlink()}", "kept")
            elif leftover:
                yield Item(path, leftover, "useless")
            elif files.step_of(name) is None:
                yield Item(path, "not the name of a checkpoint", "kept")
            elif saved and not (newest and path == newest[1]):
                yield Item(path, *saved)
