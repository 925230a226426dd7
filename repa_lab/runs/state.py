"""The states of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a run stands; ``done`` and ``pruned`` are final, the rest are taken up again by rerunning the same command."""

    NEW = "new"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    PRUNED = "pruned"
    DONE = "done"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self in (State.DONE, State.PRUNED)


@dataclass(frozen=True)
class RunState:
    """A run's state, the last step it reported, and the reason of a failure in one line."""

    state: State
    step: int = 0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunState:
        """From plain data."""
        return cls(State(value["state"]), value["step"], value["error"])
