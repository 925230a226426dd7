"""Measuring two things in turn, so that what else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Ratio = tuple[float, float, float]


def ratios(first: Callable[[], object], second: Callable[[], object], rounds: int) -> Ratio:
    """CPU time of `first` over that of `second`, in turn, after one uncounted round of each: median, lowest, highest.

    CPU time, on the one thread that the tests run on: what other programs take of the machine is not counted.
    """
    first(), second()
    pairs = []
    for _ in range(rounds):
        spent = []
        for work in (first, second):
            began = time.process_time()
            work()
            spent.append(time.process_time() - began)
        pairs.append(spent[0] / spent[1])
    return statistics.median(pairs), min(pairs), max(pairs)


def show(name: str, measured: Ratio, note: str = "") -> None:
    print(f"\n{name}: {measured[0]:.3f} (lowest {measured[1]:.3f}, highest {measured[2]:.3f}) {note}")
