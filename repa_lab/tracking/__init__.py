"""Trackers of a run's rows. The run directory is the truth: a tracker may fail and nothing is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from repa_lab.runs import RunWriter, State
from repa_lab.runs.files import Row

__all__ = ["Listener", "Listeners"]

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Receives a run's rows, sample grids and end. If it raises, the run continues without it."""

    def row(self, row: Row) -> None:
        """Receive a metric row that was written."""
        ...

    def image(self, step: int, path: Path) -> None:
        """Receive a sample grid that was written."""
        ...

    def finish(self, state: State) -> None:
        """Receive the state in which training ended."""
        ...


class Listeners:
    """Passes what the run directory has to all listeners; one that fails is dropped, with an event in the directory."""

    def __init__(self, writer: RunWriter, listeners: Sequence[Listener] = ()) -> None:
        self._writer = writer
        self._listeners = list(listeners)

    def row(self, row: Row) -> None:
        """Pass a metric row on."""
        self._notify(lambda listener: listener.row(row))

    def image(self, step: int, path: Path) -> None:
        """Pass a sample grid on."""
        self._notify(lambda listener: listener.image(step, path))

    def finish(self, state: State) -> None:
        """Tell in which state training ended."""
        self._notify(lambda listener: listener.finish(state))

    def _notify(self, call: Callable[[Listener], None]) -> None:
        for listener in list(self._listeners):
            try:
                call(listener)
            except Exception as error:
                self._listeners.remove(listener)
                reason = f"{type(error).__name__}: {error}"
                log.warning("%s stopped listening: %s", type(listener).__name__, reason)
                self._writer.event("listener-failed", listener=type(listener).__name__, error=reason)
