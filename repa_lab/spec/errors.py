"""What is wrong with a spec, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repa_lab.errors import InputError, hide_passwords

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of a document to a value."""
_MAX_SHOWN = 100


@dataclass(frozen=True)
class Place:
    """A place in a spec file.

    Attributes:
        file: the file; None for a value given by a program or by ``--set``.
        line: counted from 1.
        column: counted from 1.
    """

    file: Path | None
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.file else "<given>"


@dataclass(frozen=True)
class Problem:
    """One mistake in a spec.

    Attributes:
        place: where the wrong value was set.
        path: the dotted path of the value.
        message: what is wrong and what is allowed.
    """

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return printable(": ".join(text for text in (str(self.place), self.path, self.message) if text))


class SpecError(InputError):
    """All mistakes in a spec; the text has a line per problem, in the order of the file."""

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
