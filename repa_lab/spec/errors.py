"""What is wrong with a spec, said once, where it stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value stands: file, line and column, both counted from 1; no file for values given by a program or ``--set``."""

    file: Path | None
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.file else "<given>"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, at which dotted path, what, and what is allowed."""

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.path, self.message) if part)


class SpecError(ValueError):
    """Everything that is wrong with a spec; its text is a line per problem, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(set(problems), key=_order)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def _order(problem: Problem) -> tuple[str, int, int, str, str]:
    return str(problem.place.file), problem.place.line, problem.place.column, problem.path, problem.message


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?`` if something close is allowed, else nothing."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
