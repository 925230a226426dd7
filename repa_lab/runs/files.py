"""JSON and JSON-lines files that survive a kill, and the format number that each of them carries in a run or a sweep.

The first line of a JSON-lines file is a header with the format number; every other line is one JSON object.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import from_json

from repa_lab.errors import InputError
from repa_lab.files import replace_atomically, write_json, write_text

# The layout of run and sweep directories. Raise it when an older version could not read what this one writes.
FORMAT = 1
METRICS = "metrics.jsonl"  # the metric rows in a run directory
Row = dict[str, Any]
_HEADER = json.dumps({"format": FORMAT}) + "\n"


class DamagedFileError(InputError):
    """A file does not hold what was written to it."""


class FormatError(DamagedFileError):
    """A file was written by a version of repa-lab with another format."""

    def __init__(self, path: Path | str, found: Any) -> None:
        what = "no format number" if found is None else f"format {found}"
        does = f"this version of repa-lab reads format {FORMAT}"
        super().__init__(f"'{path}' has {what}: {does}; use the version that wrote it, or another --root")


class LinkError(InputError):
    """What should be changed lies behind a symbolic link."""


def require_no_links(*places: Path) -> None:
    """Refuse to change what lies behind a link, for it may belong to another root; name it, and where it leads."""
    for place in places:
        if place.is_symlink():
            message = "nothing behind a link is changed; work there, or put a copy in the place of the link"
            raise LinkError(f"'{place}' is a link to '{place.readlink()}', and {message}")


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Return what a folder, which need not exist, holds under names such as ``step-00000600`` and a suffix, by step."""
    steps = {step: folder / name for name in names_in(folder) if (step := step_of(name, suffix)) is not None}
    return dict(sorted(steps.items()))


def step_of(name: str, suffix: str = "") -> int | None:
    """Return the step in a name such as ``step-00000600``; None for other names."""
    number = name.removeprefix("step-").removesuffix(suffix)
    return int(number) if number.isdecimal() and name == step_name(int(number)) + suffix else None


def step_name(step: int) -> str:
    """Return the name of what belongs to a step, such as ``step-00000600``."""
    return f"step-{step:08d}"


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none for a folder that is not there or cannot be read.

    Names, because making paths of thousands of them would take as long as reading what they lead to.
    """
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; leave a link, and what it leads to, alone."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        DamagedFileError: the file is not JSON.
    """
    try:
        return from_json(_unread(path)[2])  # several times as fast as json.loads
    except ValueError as error:
        raise DamagedFileError(f"'{path}' is damaged: no JSON ({error})") from None


def _unread(path: Path | str, inode: int = 0, offset: int = 0) -> tuple[int, int, bytes]:
    """Return a file's inode, where its unread part begins, and that part: all of it if the inode is another one.

    In few system calls, because a report reads thousands of files.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status, content = os.fstat(descriptor), b""
        start = offset if status.st_ino == inode else 0
        # One read may return less than there is, and the file may be cut meanwhile.
        while (missing := status.st_size - start - len(content)) > 0:
            if not (part := os.pread(descriptor, missing, start + len(content))):
                break
            content += part
        return status.st_ino, start, content
    finally:
        os.close(descriptor)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's search for reference cycles while thousands of files are read, a third of whose time it takes."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def write_record(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object with the current format number."""
    write_json(path, {"format": FORMAT, **fields})


def read_record(path: Path | str) -> dict[str, Any]:
    """Read what :func:`write_record` wrote, without the format number.

    Raises:
        DamagedFileError: the file is not a JSON object.
        FormatError: the file has another format.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise DamagedFileError(f"'{path}' is damaged: no JSON object")
    if (found := fields.pop("format", None)) != FORMAT:
        raise FormatError(path, found)
    return fields


def append_row(path: Path, row: Row) -> None:
    """Append one row and hand it to the operating system at once, so that killing this process cannot lose it."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line if file.tell() else _HEADER + line)


def rewrite_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace all rows atomically."""
    write_text(path, _HEADER + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def drop_torn_row(path: Path) -> None:
    """Cut off a last line that a kill left incomplete, so that the next row starts on a line of its own.

    A file with a second name, in a copy of hard links (``cp -al``), is replaced: the copy keeps what it has.
    """
    if path.exists():
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if path.stat().st_nlink > 1:
            replace_atomically(path, lambda temporary: temporary.write_bytes(complete))
        elif complete != content:
            os.truncate(path, len(complete))


class JsonlReader:
    """Reads every row of a file once, also while another process appends to the file.

    Args:
        path: the file; a missing file has no rows.
        required: a key under which every row must hold a number of steps.
        on_damage: called with the line number and the reason for every damaged line, which is then left out; if None,
            a damaged line is an error.
    """

    def __init__(
        self, path: Path | str, required: str | None = None, on_damage: Callable[[int, str], None] | None = None
    ) -> None:
        self._path, self._required, self._on_damage = path, required, on_damage
        self._inode = self._offset = self._lines = 0

    def new_rows(self) -> list[Row]:
        """Return the complete rows that were not returned before; read a file that was replaced from its start.

        Raises:
            DamagedFileError: a line is not a JSON object, or lacks the required key.
            FormatError: the header has another format.
        """
        try:
            inode, start, content = _unread(self._path, self._inode, self._offset)
        except FileNotFoundError:
            return []
        if inode != self._inode:
            self._inode, self._lines = inode, 0
        complete = content[: content.rfind(b"\n") + 1]
        self._offset = start + len(complete)
        rows: list[Row] = []
        for line in complete.split(b"\n")[:-1]:
            self._lines += 1
            try:
                row = from_json(line)
            except ValueError:
                if line.strip():
                    self._leave_out("not JSON")
                continue
            if type(row) is not dict:
                self._leave_out("no JSON object")
            elif self._lines == 1:
                if row.get("format") != FORMAT:
                    raise FormatError(self._path, row.get("format"))
            elif self._required and not (type(step := row.get(self._required)) is int and step >= 0):
                self._leave_out(f"no {self._required}")
            else:
                rows.append(row)
        return rows

    def _leave_out(self, reason: str) -> None:
        if self._on_damage is None:
            raise DamagedFileError(f"'{self._path}' line {self._lines} is damaged: {reason}")
        self._on_damage(self._lines, reason)


def is_locked(path: Path) -> bool:
    """Return whether a process holds this lock file at the moment; write nothing, for the root may be read-only."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        if error.errno != errno.ENOSYS:
            return True
    finally:
        os.close(descriptor)
    try:  # a file system without such locks, where FileLock makes do with the file itself
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
