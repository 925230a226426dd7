"""What a run records of itself, and where it stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """What the process that trained a run recorded last; a killed process leaves ``running`` behind."""

    NEW = "new"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    STOPPED = "stopped"
    PRUNED = "pruned"
    DONE = "done"

    @property
    def status(self) -> RunStatus:
        """The status of a run that this state was recorded of and that no process trains."""
        return RunStatus.RESUMABLE if self in (State.RUNNING, State.INTERRUPTED) else RunStatus(self.value)


class RunStatus(StrEnum):
    """Where a run stands, in the words of `plan`, `status` and the report; see :meth:`RunDirectory.status`.

    Attributes:
        NEW: nothing has been trained.
        RUNNING: a process trains it.
        RESUMABLE: it was begun, and goes on from its last checkpoint.
        FAILED: an error ended it; it goes on from its last checkpoint.
        STOPPED: a stop rule ended it.
        PRUNED: a search ended it.
        DONE: trained to its last step.
    """

    NEW = "new"
    RUNNING = "running"
    RESUMABLE = "resumable"
    FAILED = "failed"
    STOPPED = "stopped"
    PRUNED = "pruned"
    DONE = "done"

    @property
    def is_final(self) -> bool:
        """Whether no sweep trains the run any further."""
        return self in (RunStatus.DONE, RunStatus.PRUNED)

    @property
    def is_over(self) -> bool:
        """Whether the run has come to an end: final, or ended by a stop rule."""
        return self.is_final or self is RunStatus.STOPPED


@dataclass(frozen=True)
class RunState:
    """What a run's process recorded last.

    Attributes:
        state: the state.
        step: the last step that the process reported.
        error: the reason of a failure in one line.
        is_diverged: whether the run failed because its loss or its samples were no longer finite.
    """

    state: State
    step: int = 0
    error: str | None = None
    is_diverged: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunState:
        """From plain data."""
        return cls(State(value["state"]), value["step"], value["error"], value.get("is_diverged", False))
