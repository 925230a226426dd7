"""What a training loop tells: first to the run directory, then to whoever listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from repa_lab.runs import RunWriter, State
from repa_lab.runs.files import Row

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears a run's rows, sample grids and end. It may raise: the journal then goes on without it."""

    def row(self, row: Row) -> None:
        """A metric row was written."""
        ...

    def image(self, step: int, path: Path) -> None:
        """A sample grid was written."""
        ...

    def finish(self, state: State) -> None:
        """The run came to rest."""
        ...


class Journal:
    """Writes rows to the run directory and passes them on; a listener that fails is dropped with an event."""

    def __init__(self, writer: RunWriter, listeners: Sequence[Listener] = ()) -> None:
        self.writer = writer
        self._listeners = list(listeners)

    def row(self, row: Row) -> None:
        """Record a metric row."""
        self.writer.row(row)
        self._tell(lambda listener: listener.row(row))

    def image(self, step: int, path: Path) -> None:
        """Announce a sample grid."""
        self._tell(lambda listener: listener.image(step, path))

    def state(self, state: State, step: int, error: str | None = None, is_diverged: bool = False) -> None:
        """Record where the run stands; anything but running ends the listeners."""
        self.writer.state(state, step, error, is_diverged)
        if state is not State.RUNNING:
            self._tell(lambda listener: listener.finish(state))

    def _tell(self, say: Callable[[Listener], None]) -> None:
        for listener in list(self._listeners):
            try:
                say(listener)
            except Exception as error:
                self._listeners.remove(listener)
                reason = f"{type(error).__name__}: {error}"
                log.warning("%s stopped listening: %s", type(listener).__name__, reason)
                self.writer.event("listener-failed", listener=type(listener).__name__, error=reason)
