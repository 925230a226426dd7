"""Where runs are executed, behind one small interface."""

from __future__ import annotations

from typing import Protocol

from repa_lab.runs import State
from repa_lab.sweep.jobs import PrepareJob, Report, TrainJob


class Executor(Protocol):
    """Slots that take a job each; what becomes of it is heard from :meth:`poll`."""

    def free(self) -> int:
        """Slots that wait for a job."""
        ...

    def submit(self, job: PrepareJob | TrainJob) -> None:
        """Give a free slot a job."""
        ...

    def stop(self, run_id: str, state: State) -> None:
        """Ask for a run to be ended after its present step, with a checkpoint, in this state."""
        ...

    def poll(self, timeout: float) -> list[Report]:
        """What has been answered, waiting up to ``timeout`` seconds for it."""
        ...

    def close(self) -> None:
        """Let the slots go; runs in hand are checkpointed first."""
        ...
