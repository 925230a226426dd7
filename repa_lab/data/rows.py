"""Files of equal tensors, one after the other: mapped into memory, with checksums, and written under a lock."""

from __future__ import annotations

import functools
import itertools
import json
import math
import mmap
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from repa_lab.data import DataError
from repa_lab.files import digest, write_json

_MANIFEST, _CHECKED = "manifest.json", "checked.json"
_CHECKED_ROWS = 256


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in torch, such as ``float16``."""
    return str(dtype).removeprefix("torch.")


class Rows:
    """A file of ``count`` tensors of one shape, one after the other, memory-mapped to be read."""

    def __init__(self, path: Path, count: int, shape: Sequence[int], dtype: str) -> None:
        self._arguments = path, count, shape, dtype
        self.path, self.shape = path, torch.Size(shape)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._row_bytes = math.prod(shape) * self._dtype.itemsize
        self._length: int = count * self._row_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the file itself instead of sending it the content."""
        return Rows, self._arguments

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """The content ``(count, bytes of a tensor)``; a file that is too short is a DataError."""
        self._require_length(self.path.stat().st_size if self.path.is_file() else 0)
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), self._length, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, np.uint8).reshape(-1, self._row_bytes)

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        """Return the tensors ``(n, *shape)`` of the given rows ``(n,)``.

        Raises:
            DataError: the file has been cut short; reading what is gone would end the process by a signal.
        """
        content = self.bytes
        self._require_length(self._map.size())
        values = torch.from_numpy(content[rows])  # NumPy gathers twice as fast as torch
        return values.view(self._dtype).view(len(rows), *self.shape)

    def _require_length(self, length: int) -> None:
        if length < self._length:
            message = f"'{self.path}' was cut short, from {self._length:,} to {length:,} bytes"
            raise DataError("source", f"{message}: start again, and what is missing is computed again")

    def resize(self) -> int:
        """Give the file its length and return it; what is new in the file is zeros, which no checksum fits."""
        if not self.path.is_file() or self.path.stat().st_size != self._length:
            with self.path.open("ab") as file:
                file.truncate(self._length)
        return self._length

    def write(self, rows: Iterable[tuple[int, np.ndarray]]) -> None:
        """Write the bytes of tensors, each at its row."""
        with self.path.open("r+b" if self.path.is_file() else "wb") as file:
            for row, data in rows:
                file.seek(row * self._row_bytes)
                file.write(data.tobytes())


def bytes_of(values: torch.Tensor) -> np.ndarray:
    """Return the bytes of contiguous tensors ``(n, *shape)``, ``(n, bytes)``."""
    return values.reshape(len(values), -1).view(torch.uint8).numpy()


def checksums(data: Sequence[np.ndarray], starts: Sequence[int]) -> np.ndarray:
    """Return the CRC-32 of each row over all arrays of bytes ``(n, bytes)``, from a start for each, in threads."""

    def of_rows(first: int) -> list[int]:
        rows = range(first, min(first + _CHECKED_ROWS, len(starts)))
        return [
            functools.reduce(lambda crc, values: zlib.crc32(values[row].data, crc), data, starts[row]) for row in rows
        ]

    with ThreadPoolExecutor() as pool:
        found = itertools.chain.from_iterable(pool.map(of_rows, range(0, len(starts), _CHECKED_ROWS)))
        return np.fromiter(found, np.uint32, len(starts))


def is_checked(folder: Path, files: Iterable[Path]) -> bool:
    """Return whether the files of a cache are as they were when all of them were last compared."""
    try:
        return bool(json.loads((folder / _CHECKED).read_text()) == _stamps(files))
    except (OSError, ValueError):
        return False


def note_checked(folder: Path, files: Iterable[Path]) -> None:
    """Note that the files of a cache are whole as they are now."""
    if not is_checked(folder, files):
        with writing(folder):
            write_json(folder / _CHECKED, _stamps(files))


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()}


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a cache with its digest."""
    write_json(folder / _MANIFEST, {**content, "sha256": digest(content)})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the content of a manifest, or None if it is not there or not whole."""
    try:
        content: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return content if content.pop("sha256") == digest(content) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock: processes that build one cache wait for each other."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk and the like into one line; what is done is kept."""
    try:
        yield
    except OSError as error:
        message = f"cannot write the cache '{folder}': {error.strerror or error}"
        raise DataError("source", f"{message}; mend this and start again, and what is done is kept") from None
