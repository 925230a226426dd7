"""Files that are whole or absent: atomic writes, and JSON lines that survive a torn tail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from repa_lab.files import replace_atomically

Row = dict[str, Any]
# The metric rows in a run's directory.
METRICS = "metrics.jsonl"


class DamagedFileError(ValueError):
    """A file does not hold what was written to it."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    replace_atomically(path, lambda temporary: _write(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused rather than written as what no other parser reads."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; see :func:`write_json`.

    Raises:
        DamagedFileError: it is no JSON.
    """
    return _parse(path.read_bytes(), f"'{path}'")


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        DamagedFileError: it holds none.
    """
    return _object(path.read_bytes(), f"'{path}'")


def read_lines(path: Path) -> list[Row]:
    """The complete rows of a JSON-lines file; a last line that a kill tore is left out, a missing file has no rows.

    Raises:
        DamagedFileError: another line is no JSON object.
    """
    if not path.exists():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]
    return [_object(line, f"'{path}' line {number}") for number, line in enumerate(complete, start=1) if line]


def append_line(path: Path, row: Row) -> None:
    """Append one row and hand it to the operating system at once, so that killing this process cannot lose it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill tore, lest the next row be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def rewrite_lines(path: Path, rows: Iterable[Row]) -> None:
    """Replace a JSON-lines file atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # of Unicode, too
        raise DamagedFileError(f"{where} is damaged: no JSON ({error})") from None


def _object(content: bytes, where: str) -> dict[str, Any]:
    value = _parse(content, where)
    if not isinstance(value, dict):
        raise DamagedFileError(f"{where} is damaged: no JSON object")
    return value


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock file at the moment."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
