"""The errors that users see, and their places in files. The command line prints their text, without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of a document to a value."""
_MAX_SHOWN = 100
_URL = re.compile(r"\w[\w+.-]*://\S+")
_LOGIN = re.compile(r"(?<=://)([^:/@]*):.*@")
_PARAMETER = re.compile(r"((?:\w*pass\w*|pwd|\w*token|\w*secret)(?:=|%3D))(?:(?!%3B)[^&;'\"])+", re.IGNORECASE)


def hide_passwords(text: str) -> str:
    """Return a text with ``***`` in the place of the passwords in its URLs."""
    return _URL.sub(lambda url: _PARAMETER.sub(r"\1***", _LOGIN.sub(r"\1:***@", url[0])), text)


class UserError(Exception):
    """An error that a user can mend; its text has a line for each problem, and no password.

    ``status`` is the exit status of the command line.
    """

    status: ClassVar[int]

    def __str__(self) -> str:
        return hide_passwords(super().__str__())


class InputError(UserError, ValueError):
    """The input was refused, and nothing was created."""

    status = 2


class StateError(UserError, RuntimeError):
    """The input was right, and the work cannot go on."""

    status = 1


@dataclass(frozen=True)
class Place:
    """A place in a file, whose lines and columns count from 1; None is the file of what a program or ``--set`` gave."""

    file: Path | None
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.file else "<given>"


@dataclass(frozen=True)
class Problem:
    """One mistake: where the wrong value was set, its dotted path, and what is wrong and allowed."""

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return printable(": ".join(text for text in (str(self.place), self.path, self.message) if text))


class SpecError(InputError):
    """All mistakes in a spec; the text has a line for each problem, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(
            set(problems), key=lambda it: (str(it.place.file), it.place.line, it.place.column, it.path, it.message)
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))


def printable(text: str) -> str:
    """Replace characters that would end a line or control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def dotted(path: KeyPath) -> str:
    """Return a path as users write it: ``regularizer.encoder.0.name``."""
    return ".".join(map(str, path))


def shortened(value: Any) -> str:
    """Return a value as a message shows it, without passwords in URLs, cut after 100 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else hide_passwords(repr(value))
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
