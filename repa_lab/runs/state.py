"""The states of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a run stands; ``done`` and ``pruned`` are final, the rest are taken up again by rerunning the same command.

    ``stopped`` is what a sweep's rule has ended: for a sweep without the rule it goes on.
    """

    NEW = "new"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    STOPPED = "stopped"
    PRUNED = "pruned"
    DONE = "done"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self in (State.DONE, State.PRUNED)


# A failure's reason begins with the kind of error; this one is a result of the run's settings, not a defect.
DIVERGED = "DivergedError"


@dataclass(frozen=True)
class RunState:
    """A run's state, the last step it reported, and the reason of a failure in one line."""

    state: State
    step: int = 0
    error: str | None = None

    @property
    def is_diverged(self) -> bool:
        """Whether it failed because its loss or its samples were no longer finite."""
        return self.state is State.FAILED and (self.error or "").startswith(DIVERGED)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunState:
        """From plain data."""
        return cls(State(value["state"]), value["step"], value["error"])
