"""Measuring two things in turn, so that what else the machine does falls on both."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

Ratio = tuple[float, float, float]


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """CPU seconds of `first` and of `second` in every round, in turn, after one uncounted round of each.

    CPU time, on the one thread that the tests run on: what other programs take of the machine is not counted.
    """
    first(), second()
    seconds = []
    for _ in range(rounds):
        spent = []
        for work in (first, second):
            began = time.process_time()
            work()
            spent.append(time.process_time() - began)
        seconds.append((spent[0], spent[1]))
    return seconds


def ratios(first: Callable[[], object], second: Callable[[], object], rounds: int) -> Ratio:
    """CPU time of `first` over that of `second`, measured by :func:`in_turn`."""
    return spread(one / other for one, other in in_turn(first, second, rounds))


def spread(values: Iterable[float]) -> Ratio:
    """Median, lowest and highest."""
    found = list(values)
    return statistics.median(found), min(found), max(found)


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


# Adopts what outlives its command, such as a fork server with its workers, so that their CPU time is counted too.
_ADOPT = """
import contextlib, ctypes, os, resource, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
subprocess.run(sys.argv[1:], check=True)
with contextlib.suppress(ChildProcessError):
    while True:
        os.wait()
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print()
print(usage.ru_utime + usage.ru_stime)
"""


def spent_by(*command: object) -> tuple[float, str]:
    """CPU seconds of a command and of all processes that it starts, each with one thread; and what it printed. For Linux."""
    done = subprocess.run(
        [sys.executable, "-c", _ADOPT, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    printed, seconds = done.stdout.rstrip().rsplit("\n", 1)
    return float(seconds), printed.rstrip()
