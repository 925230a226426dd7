"""Where runs are executed, behind one small interface."""

from __future__ import annotations

from typing import Protocol

from repa_lab.orchestration.jobs import Job, Report
from repa_lab.runs import State


class ExecutorError(ValueError):
    """An executor cannot be had; :attr:`field` is the option at fault, below ``run``."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class Executor(Protocol):
    """Slots that take a job each; what becomes of it is heard from :meth:`poll`."""

    @property
    def slots(self) -> int:
        """How many jobs can be in hand at a time."""
        ...

    def free(self) -> int:
        """Slots that wait for a job."""
        ...

    def submit(self, job: Job) -> None:
        """Give a free slot a job."""
        ...

    def stop(self, run_id: str, state: State) -> None:
        """Ask for a run to be ended after its present step, with a checkpoint, in this state."""
        ...

    def kill(self, run_id: str) -> None:
        """End a run at once, whatever it does; its failure is then heard from :meth:`poll`."""
        ...

    def withdraw(self) -> list[str]:
        """Take back what was submitted and only waits in a queue; says which runs."""
        ...

    def poll(self, timeout: float) -> list[Report]:
        """What has been answered, waiting up to ``timeout`` seconds for it."""
        ...

    def close(self) -> None:
        """Let the slots go; runs in hand are checkpointed first."""
        ...
