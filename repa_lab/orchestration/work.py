"""What a scheduler is given to do: a fixed list of runs, or a search that thinks of new ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from repa_lab.runs import State
from repa_lab.runs.files import Row
from repa_lab.runs.forks import Fork
from repa_lab.spec import StopRule
from repa_lab.spec.identity import Run


@dataclass(frozen=True)
class Task:
    """A run to train, under the name that people see.

    Attributes:
        fork: where it begins, if another run's first steps are its own as well.
        kept: steps whose state is kept for runs that begin from it.
        stop: what ends it early, with metrics by their full names.
    """

    run: Run
    name: str
    fork: Fork | None = None
    kept: tuple[int, ...] = ()
    stop: tuple[StopRule, ...] = ()


class Work(Protocol):
    """Hands out tasks and hears what becomes of them.

    Attributes:
        is_divergence_a_result: whether a run that diverges has told what it was begun for.
    """

    is_divergence_a_result: bool

    def next(self) -> Task | None:
        """The next task, or None if there is none at present."""
        ...

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """A run wrote a row; yields the ids of runs that should be pruned for it."""
        ...

    def finished(self, run_id: str, state: State) -> None:
        """A run came to rest."""
        ...

    def counts(self) -> tuple[int, int]:
        """Tasks done, and tasks in all as far as is known."""
        ...


class FixedWork:
    """A list of tasks, in order."""

    is_divergence_a_result = False

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = list(tasks)
        self._total, self._done = len(self._tasks), 0

    def next(self) -> Task | None:
        """See :class:`Work`."""
        return self._tasks.pop(0) if self._tasks else None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """See :class:`Work`; a list prunes nothing."""
        return ()

    def finished(self, run_id: str, state: State) -> None:
        """See :class:`Work`."""
        self._done += 1

    def counts(self) -> tuple[int, int]:
        """See :class:`Work`."""
        return self._done, self._total
