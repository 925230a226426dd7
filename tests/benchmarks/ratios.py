"""Measuring two things in turn, so that what else the machine does falls on both."""

from __future__ import annotations

import statistics
import subprocess
import sys
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


def spent(setup: str, work: str, *arguments: object) -> tuple[float, float]:
    """CPU seconds of some code in a process of its own, and by how many MiB its peak of memory grew; `setup` is not counted.

    The code finds the arguments as texts in `sys.argv[1:]`.
    """
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    code = f"import resource, sys, time\n{setup}\nmemory, began = {peak}, time.process_time()\n{work}\n"
    code += f"print(time.process_time() - began, {peak} - memory)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, memory = done.stdout.splitlines()[-1].split()
    return float(seconds), float(memory)
