"""Warm worker processes on this machine, one for each slot or several that share its runs.

A crash costs one run: its slot comes back with new processes.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO

from repa_lab.orchestration.jobs import FINAL, Job, PrepareJob, Report, TrainJob
from repa_lab.runs import State

_CLOSE_PATIENCE_S = 90.0


@dataclass(eq=False)
class _Process:
    """One worker; of those that share a slot, the first (rank 0) speaks for all."""

    popen: subprocess.Popen[bytes]
    slot: _Slot
    rank: int
    partial: bytes = b""

    @property
    def stdin(self) -> IO[bytes]:
        assert self.popen.stdin
        return self.popen.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.popen.stdout
        return self.popen.stdout

    def send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # the process is gone; poll hears of it
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()

    def lines(self) -> list[bytes] | None:
        """Complete lines that have arrived, None at the end; a buffered file would hide some from select."""
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        *complete, self.partial = (self.partial + chunk).split(b"\n")
        return complete if chunk else None

    def kill(self) -> None:
        """With all that it has started, such as data loaders."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)


@dataclass(eq=False)
class _Slot:
    """Processes that train one run at a time; ``devices`` is their ``CUDA_VISIBLE_DEVICES``, None to leave that as it is."""

    devices: str | None
    job: Job | None = None
    processes: list[_Process] = field(default_factory=list)

    def is_training(self, run_id: str | None) -> bool:
        return isinstance(self.job, TrainJob) and self.job.run.run_id == run_id


class LocalExecutor:
    """Slots of worker processes, each with its share of the cores unless OMP_NUM_THREADS is set.

    Args:
        devices: the ``CUDA_VISIBLE_DEVICES`` of every slot; None leaves it as it is.
        log: where errors go.
        processes: how many share each run.
    """

    def __init__(self, devices: Sequence[str | None], log: Path, processes: int = 1) -> None:
        self._count = processes
        self._threads = max(1, (os.cpu_count() or 1) // (len(devices) * processes))
        self._log = log.open("a", encoding="utf-8")
        self._selector = selectors.DefaultSelector()
        self._slots = [_Slot(name) for name in devices]
        for slot in self._slots:
            self._start(slot)

    @property
    def slots(self) -> int:
        """See :class:`Executor`."""
        return len(self._slots)

    def free(self) -> int:
        """See :class:`Executor`."""
        return sum(slot.job is None for slot in self._slots)

    def submit(self, job: Job) -> None:
        """See :class:`Executor`; preparing is the first process's alone."""
        slot = next(slot for slot in self._slots if slot.job is None)
        slot.job = job
        for process in slot.processes[:1] if isinstance(job, PrepareJob) else slot.processes:
            process.send(job.to_json())

    def stop(self, run_id: str, state: State) -> None:
        """See :class:`Executor`."""
        for slot in self._slots:
            if slot.is_training(run_id):
                slot.processes[0].send({"kind": "stop", "state": state.value})

    def kill(self, run_id: str) -> None:
        """See :class:`Executor`."""
        for slot in self._slots:
            if slot.is_training(run_id):
                slot.processes[0].kill()

    def withdraw(self) -> list[str]:
        """See :class:`Executor`; nothing waits here."""
        return []

    def poll(self, timeout: float) -> list[Report]:
        """See :class:`Executor`."""
        reports: list[Report] = []
        for key, _ in self._selector.select(timeout):
            process: _Process = key.data
            if process not in process.slot.processes:
                continue  # it was replaced after another of its slot had died
            lines = process.lines()
            if lines is None:
                reports.append(self._bury(process))
            for line in lines or []:
                reports += self._hear(process, Report.from_json(json.loads(line)))
        return reports

    def close(self) -> None:
        """See :class:`Executor`."""
        processes = [process for slot in self._slots for process in slot.processes]
        for process in processes:
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in processes:
            try:
                process.popen.wait(_CLOSE_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.popen.wait()
            process.stdout.close()
        self._selector.close()
        self._log.close()

    def _hear(self, process: _Process, report: Report) -> list[Report]:
        """What a process says that is news: the first of a slot says all, the others only why they failed."""
        slot, failed = process.slot, report.state is State.FAILED
        if process.rank > 0 and not (failed and slot.is_training(report.run_id)):
            return []
        if report.kind in FINAL:
            slot.job = None
            if failed and self._count > 1:  # the others may wait for this one for ever
                self._restart(slot)
        return [report]

    def _bury(self, process: _Process) -> Report:
        """A worker died: say which run it took along, and put new processes in its slot."""
        code = process.popen.wait()
        job = process.slot.job
        process.slot.job = None
        self._restart(process.slot)
        cause = f"signal {-code}" if code < 0 else f"exit status {code}"
        if isinstance(job, TrainJob):
            return Report("finished", run_id=job.run.run_id, state=State.FAILED, error=f"the worker died ({cause})")
        return Report("broken", error=f"a worker died ({cause}); see {self._log.name}")

    def _restart(self, slot: _Slot) -> None:
        for process in slot.processes:
            process.kill()
            process.popen.wait()
            self._selector.unregister(process.stdout)
            process.stdout.close()
        self._start(slot)

    def _start(self, slot: _Slot) -> None:
        port = _free_port() if self._count > 1 else 0
        slot.processes = [
            _Process(_start_worker(self._environment(slot, rank, port), self._log), slot, rank)
            for rank in range(self._count)
        ]
        for process in slot.processes:
            self._selector.register(process.stdout, selectors.EVENT_READ, process)

    def _environment(self, slot: _Slot, rank: int, port: int) -> dict[str, str]:
        environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
        if slot.devices is not None:  # numbered as nvidia-smi does, not by speed
            environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environment, "CUDA_VISIBLE_DEVICES": slot.devices}
        if self._count > 1:  # what torchrun sets
            size = str(self._count)
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return environment


def _start_worker(environment: dict[str, str], log: TextIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "repa_lab.orchestration.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C is the scheduler's to handle
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
