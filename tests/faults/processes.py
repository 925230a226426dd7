"""Finding the process that trains a run, and taking it down."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from repa_lab.runs import RunDirectory


def holders(run: RunDirectory) -> list[int]:
    """The other processes that hold the run's lock: whoever trains it."""
    lock, found = str((run.path / ".lock").resolve()), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and any(
                os.path.realpath(fd) == lock for fd in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("PPid:"))


def wait_until(true: Callable[[], object]) -> None:
    """Wait for an event; the suite's time limit is the only one."""
    while not true():
        time.sleep(0.02)


def steps_of(run: RunDirectory) -> list[int]:
    return [row["step"] for row in run.rows() if "loss/total" in row]


def signal_holders(run: RunDirectory, sign: signal.Signals, after: int) -> None:
    """Once the run has reached a step."""
    wait_until(lambda: max(steps_of(run), default=0) >= after)
    for pid in holders(run):
        os.kill(pid, sign)


def meanwhile(action: Callable[[], None]) -> threading.Thread:
    """Do something beside the test, which joins it."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread
