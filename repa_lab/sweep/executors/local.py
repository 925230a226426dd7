"""Warm worker processes on this machine, one for each slot. A crash costs one run: its slot comes back with a new process."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from repa_lab.runs import State
from repa_lab.sweep.jobs import PrepareJob, Report, TrainJob

_CLOSE_PATIENCE_S = 90.0


@dataclass
class _Slot:
    process: subprocess.Popen[bytes]
    job: PrepareJob | TrainJob | None = None
    partial: bytes = b""

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout
        return self.process.stdout

    def send(self, message: object) -> None:
        try:
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()
        except BrokenPipeError:
            pass  # the process is gone; poll hears of it

    def lines(self) -> list[bytes] | None:
        """Complete lines that have arrived, None at the end; a buffered file would hide some from select."""
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        *complete, self.partial = (self.partial + chunk).split(b"\n")
        return complete if chunk else None


class LocalExecutor:
    """``slots`` worker processes, each with its share of the cores unless OMP_NUM_THREADS is set; errors go to ``log``."""

    def __init__(self, slots: int, log: Path) -> None:
        self._threads = max(1, (os.cpu_count() or 1) // slots)
        self._log = log.open("a", encoding="utf-8")
        self._selector = selectors.DefaultSelector()
        self._slots = [self._start() for _ in range(slots)]

    def free(self) -> int:
        """See :class:`Executor`."""
        return sum(slot.job is None for slot in self._slots)

    def submit(self, job: PrepareJob | TrainJob) -> None:
        """See :class:`Executor`."""
        slot = next(slot for slot in self._slots if slot.job is None)
        slot.job = job
        slot.send(job.to_json())

    def stop(self, run_id: str, state: State) -> None:
        """See :class:`Executor`."""
        for slot in self._slots:
            if isinstance(slot.job, TrainJob) and slot.job.run.run_id == run_id:
                slot.send({"kind": "stop", "state": state.value})

    def poll(self, timeout: float) -> list[Report]:
        """See :class:`Executor`."""
        reports: list[Report] = []
        for key, _ in self._selector.select(timeout):
            slot: _Slot = key.data
            lines = slot.lines()
            if lines is None:
                reports.append(self._bury(slot))
            for line in lines or []:
                report = Report.from_json(json.loads(line))
                if report.kind in ("finished", "prepared", "refused", "broken"):
                    slot.job = None
                reports.append(report)
        return reports

    def close(self) -> None:
        """See :class:`Executor`."""
        for slot in self._slots:
            slot.stdin.close()
        for slot in self._slots:
            try:
                slot.process.wait(_CLOSE_PATIENCE_S)
            except subprocess.TimeoutExpired:
                slot.process.kill()
                slot.process.wait()
            slot.stdout.close()
        self._selector.close()
        self._log.close()

    def _start(self) -> _Slot:
        process = subprocess.Popen(
            [sys.executable, "-m", "repa_lab.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={"OMP_NUM_THREADS": str(self._threads), **os.environ},
            start_new_session=True,  # Ctrl-C is the scheduler's to handle
        )
        slot = _Slot(process)
        self._selector.register(slot.stdout, selectors.EVENT_READ, slot)
        return slot

    def _bury(self, slot: _Slot) -> Report:
        """A worker died: say which run it took along, and put a new process in its place."""
        code = slot.process.wait()
        self._selector.unregister(slot.stdout)
        job = slot.job
        fresh = self._start()
        self._slots[self._slots.index(slot)] = fresh
        cause = f"signal {-code}" if code < 0 else f"exit status {code}"
        if isinstance(job, TrainJob):
            error = f"the worker died ({cause})"
            return Report("finished", run_id=job.run.run_id, state=State.FAILED, error=error)
        return Report("broken", error=f"a worker died ({cause}); see {self._log.name}")
