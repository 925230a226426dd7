"""Warm worker processes on this machine: one in each slot, or several that share the slot's run.

A crash costs one run: its slot gets new processes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from repa_lab.orchestration.executors import launcher_variables
from repa_lab.orchestration.executors.forkserver import WorkerProcess, close_server, open_server
from repa_lab.orchestration.scheduler import (
    Executor,
    ExecutorError,
    Job,
    MessageKind,
    PackedJob,
    PrepareJob,
    WorkerMessage,
)
from repa_lab.runs import State
from repa_lab.spec import RunOptions

_CLOSE_PATIENCE_S = 90.0
_NVIDIA_SMI_PATIENCE_S = 30.0
_GPU = re.compile(r"^GPU (\d+): ")
_MIG_DEVICE = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)")


@dataclass(eq=False)
class _Slot:
    """Processes that train one run at a time; the first of them, rank 0, speaks for all.

    Attributes:
        devices: the processes' ``CUDA_VISIBLE_DEVICES``; None leaves the variable alone.
        job: the job in hand.
        processes: one for each rank; none after a crash.
    """

    devices: str | None
    job: Job | None = None
    processes: list[WorkerProcess] = field(default_factory=list)


class LocalExecutor(Executor):
    """Slots of worker processes, each with its share of the cores unless OMP_NUM_THREADS is set.

    Args:
        devices: the ``CUDA_VISIBLE_DEVICES`` of every slot; None leaves the variable as it is.
        log: the file to which the processes write their errors.
        processes: the number of processes that share each run.
    """

    def __init__(self, devices: Sequence[str | None], log: Path, processes: int = 1) -> None:
        self._count = processes
        threads = max(1, (os.cpu_count() or 1) // (len(devices) * processes))
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        for name in launcher_variables(self._environment):
            del self._environment[name]
        self._log = log.open("a", encoding="utf-8")
        self._slots, self.slots = [_Slot(name) for name in devices], len(devices)
        for slot in self._slots:
            self._start(slot)

    def submit(self, job: Job) -> None:
        """Give a free slot a job; the slot's first process alone fills caches."""
        slot = next(slot for slot in self._slots if slot.job is None)
        slot.job, packed = job, PackedJob.of(job)
        if not slot.processes:
            self._start(slot)
        for process in slot.processes[: 1 if isinstance(job, PrepareJob) else None]:
            process.send(packed)

    def stop(self, run_id: str, state: State) -> None:
        """Ask for a run to end after its present step, with a checkpoint, in this state."""
        for process in self._processes_of(run_id)[:1]:
            process.send(state)

    def kill(self, run_id: str) -> None:
        """End a run at once, whatever it does."""
        for process in self._processes_of(run_id)[:1]:
            process.kill()

    def poll(self, timeout: float) -> list[WorkerMessage]:
        """Return what the workers have said, waiting up to ``timeout`` seconds for a first message."""
        speakers = {process.messages: (process, slot) for slot in self._slots for process in slot.processes}
        messages: list[WorkerMessage | None] = []
        for connection in wait(list(speakers), timeout):
            assert isinstance(connection, Connection)
            process, slot = speakers[connection]
            if process not in slot.processes:
                continue  # the process was killed after another of its slot had died
            try:
                messages.append(self._take_in(connection.recv(), process, slot))
            except (EOFError, OSError):  # the latter if the process died while it wrote a message
                messages.append(self._bury(process, slot))
        return list(filter(None, messages))

    def close(self) -> None:
        """End all processes; runs in hand are checkpointed first. Processes without a job end by themselves."""
        if not self._server.is_ready:
            close_server()
        for slot in self._slots:
            for process in slot.processes:
                process.dismiss()
        for slot in self._slots:
            for process in slot.processes:
                if slot.job and process.wait(_CLOSE_PATIENCE_S) is None:
                    process.kill()
                    process.wait()
                process.close()
        self._log.close()

    def _processes_of(self, run_id: str) -> list[WorkerProcess]:
        return next((slot.processes for slot in self._slots if slot.job and slot.job.name == run_id), [])

    def _take_in(self, message: WorkerMessage, process: WorkerProcess, slot: _Slot) -> WorkerMessage | None:
        """Return the message if it is news: rank 0 says everything, other ranks only why they failed."""
        is_failure = message.kind in (MessageKind.FAILED, MessageKind.BUSY)
        is_current = slot.job is not None and slot.job.name == message.job
        if process is not slot.processes[0] and not (is_failure and is_current):
            return None
        if message.kind is not MessageKind.PROGRESS:
            slot.job = None
            if is_failure and self._count > 1:  # the other ranks may wait for this one for ever
                self._kill(slot)
        return message

    def _bury(self, process: WorkerProcess, slot: _Slot) -> WorkerMessage | None:
        """Kill the other processes of a slot in which one has died, and return the failure of its job."""
        cause = process.wait() or f"the process that it was forked from is gone: {process.server.close()}"
        error = f"the worker died ({cause})" if process.pid else f"no worker can be started ({cause})"
        job, slot.job = slot.job, None
        self._kill(slot)
        return WorkerMessage(MessageKind.FAILED, job.name, error) if job else None

    def _kill(self, slot: _Slot) -> None:
        """End the processes of a slot; the next job starts new ones."""
        for process in slot.processes:
            process.kill()
            process.wait()
            process.close()
        slot.processes = []

    def _start(self, slot: _Slot) -> None:
        """Have the processes of a slot forked."""
        self._server = open_server(self._environment, self._log)
        own = {}
        if slot.devices is not None:  # PCI_BUS_ID numbers GPUs as nvidia-smi does, not by speed
            own = {"CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
            own |= {"CUDA_VISIBLE_DEVICES": slot.devices}
        port, size = _free_port() if self._count > 1 else 0, str(self._count)
        for rank in range(self._count):
            if self._count > 1:  # what torchrun sets
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            slot.processes.append(self._server.fork(own, self._log))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_slots(options: RunOptions, runs: int | None, workers: int | None) -> list[str | None]:
    """Return the ``CUDA_VISIBLE_DEVICES`` of every slot on this machine; None where there is no GPU to share out.

    Raises:
        ExecutorError: a run wants more GPUs than there are.
    """
    gpus = () if options.device == "cpu" else visible_gpus()
    if gpus:
        slots = assign(gpus, options.gpus_per_run, options.slots_per_gpu, workers)
        return [*slots[: max(1, runs) if runs is not None and workers is None else None]]
    cores = (os.cpu_count() or 1) // options.gpus_per_run
    return [None] * (workers or max(1, min(cores, cores if runs is None else runs)))


def visible_gpus(environment: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes; asks no torch.

    Args:
        environment: the GPUs that its ``CUDA_VISIBLE_DEVICES`` names; without it, those that ``nvidia-smi`` lists.
        dev: the folder of device files, looked at where ``nvidia-smi`` is missing.
    """
    limit = environment.get("CUDA_VISIBLE_DEVICES")
    if limit is not None:
        names = [name.strip() for name in limit.split(",")]
        return tuple(name for name in names if name and name != "-1")
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is not None:
        with suppress(OSError, subprocess.SubprocessError):
            listing = [tool, "-L"]
            done = subprocess.run(listing, capture_output=True, text=True, timeout=_NVIDIA_SMI_PATIENCE_S, check=True)
            return _listed_gpus(done.stdout)
    return tuple(sorted((path.name[6:] for path in dev.glob("nvidia[0-9]*")), key=int))


def _listed_gpus(listing: str) -> tuple[str, ...]:
    """Return the GPUs of ``nvidia-smi -L``; of a GPU split by MIG its MIG devices, for the whole cannot be used."""
    gpus: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if match := _GPU.match(line):
            gpus[match[1]] = []
        elif (match := _MIG_DEVICE.match(line)) and gpus:
            gpus[next(reversed(gpus))].append(match[1])
    return tuple(name for gpu, mig_devices in gpus.items() for name in mig_devices or [gpu])


def assign(gpus: tuple[str, ...], per_run: int, per_gpu: int, workers: int | None) -> list[str]:
    """Return the ``CUDA_VISIBLE_DEVICES`` of every slot; slots are spread over the GPUs before any two share one.

    Args:
        gpus: all GPUs; those that do not make up a whole slot stay idle.
        per_run: the number of GPUs of a slot.
        per_gpu: the number of slots that share a GPU.
        workers: the number of slots; None makes as many as the GPUs give.

    Raises:
        ExecutorError: a run wants more GPUs than there are.
    """
    if len(gpus) < per_run:
        raise ExecutorError("gpus_per_run", f"a run shall have {per_run} GPUs, and this machine has {len(gpus)}")
    groups = [",".join(gpus[first : first + per_run]) for first in range(0, len(gpus) - per_run + 1, per_run)]
    count = workers or len(groups) * per_gpu
    return [groups[number % len(groups)] for number in range(count)]
