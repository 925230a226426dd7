"""How long the encoders take within the steps, found out without waiting for the device in any of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from repa_lab.align.tokens import Tokens
from repa_lab.encoders.targets import Reader, Targets


class _Mark(Protocol):
    """A moment, as `torch.cuda.Event` has it: the one at which the device is through with all that was asked of it before."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class _Instant:
    """A moment on a CPU, which is through with everything at once."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: _Instant) -> float:
        return (end_event._at - self._at) * 1000


def _event() -> _Mark:
    return torch.cuda.Event(enable_timing=True)


class Stopwatch:
    """Sums the seconds of passages: of this process on a CPU, and on a GPU of the device, which begins and ends later
    what a passage asks of it. Time in which a passage leaves the GPU without work counts, time in which it does other
    work does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._mark: Callable[[], _Mark] = _event if device.type == "cuda" else _Instant
        self._passages: deque[tuple[_Mark, _Mark]] = deque()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens within. It waits for nothing: only what the device is through with is summed on the way."""
        while self._passages and self._passages[0][1].query():
            self._sum_first()
        begun, ended = self._mark(), self._mark()
        begun.record()
        try:
            yield
        finally:
            ended.record()
            self._passages.append((begun, ended))

    def take(self) -> float:
        """The seconds since the last call; waits until the device is through with the last passage."""
        while self._passages:
            self._passages[0][1].synchronize()
            self._sum_first()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _sum_first(self) -> None:
        begun, ended = self._passages.popleft()
        self._seconds += begun.elapsed_time(ended) / 1000


class TimedTargets:
    """Targets by a stopwatch.

    Args:
        targets: what is timed: running the encoder, or bringing its cached features to the device.
        stopwatch: what counts.
        reads_here: whether the reader is called in this process, within the steps. What others read ahead takes them no
            time.
    """

    def __init__(self, targets: Targets, stopwatch: Stopwatch, reads_here: bool) -> None:
        self.dim, self.reader = targets.dim, targets.reader
        self._targets, self._stopwatch = targets, stopwatch
        if reads_here and targets.reader is not None:
            self.reader = self._timed(targets.reader)

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        """See :class:`repa_lab.encoders.targets.Targets`."""
        with self._stopwatch.running():
            return self._targets(index, device, loaded)

    def _timed(self, read: Reader) -> Reader:
        def timed(index: torch.Tensor) -> torch.Tensor:
            with self._stopwatch.running():
                return read(index)

        return timed
