"""Jobs in processes to which the scheduler has no pipe; both leave word for each other in the runs root.

runs/.jobs/<sweep>/<run_id>.stop    the state in which a run shall end after its present step
runs/.jobs/<sweep>/token            by which a machine shows that it sees the scheduler's very root
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from abc import abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repa_lab.files import write_text
from repa_lab.orchestration.executors import launcher_variables
from repa_lab.orchestration.executors.local import LocalExecutor
from repa_lab.orchestration.scheduler import Executor, Job, MessageKind, PackedJob, TrainJob, WorkerMessage
from repa_lab.registry import PluginError
from repa_lab.runs import RunsRoot, State

_ASK_EVERY_S = 1.0
_BUSY_PATIENCE_S = 300.0  # by then a lost machine's lock of a run has expired on every file system that we know
_CLOSE_PATIENCE_S = 90.0


@dataclass(frozen=True)
class SharedFolder:
    """What a detached job and its scheduler have in common.

    Attributes:
        root: the runs root, by its absolute path.
        sweep: the name of the sweep.
        working_directory: the scheduler's.
        token: the text of the token file.
    """

    root: RunsRoot
    sweep: str
    working_directory: Path
    token: str

    @classmethod
    def open(cls, root: RunsRoot, sweep: str) -> SharedFolder:
        """Return the folder of this process; the token stays on disk, for jobs may outlive the process."""
        shared = cls(RunsRoot(root.path.resolve()), sweep, Path.cwd(), uuid.uuid4().hex)
        shared.path.mkdir(parents=True, exist_ok=True)
        if not shared.token_path.exists():
            write_text(shared.token_path, shared.token)
        return replace(shared, token=shared.token_path.read_text(encoding="utf-8"))

    @property
    def path(self) -> Path:
        """The folder of this sweep's jobs."""
        return self.root.path / ".jobs" / self.sweep

    @property
    def token_path(self) -> Path:
        """The token file."""
        return self.path / "token"

    def stop_file(self, name: str) -> Path:
        """Return the file that asks for a job to stop."""
        return self.path / f"{name}.stop"

    def pack(self, job: Job) -> PackedJob:
        """Pack a job, with the root as every machine calls it."""
        return PackedJob.of(replace(job, root=self.root))

    def problem(self) -> str | None:
        """Return why this machine cannot work: it does not see the scheduler's runs root; None if it does."""
        with suppress(OSError):
            if self.token_path.read_text(encoding="utf-8") == self.token:
                return None
        machine, root = socket.gethostname(), self.root.path
        return f"machine {machine} does not see the runs root {root}; it must be on shared storage"


class DetachedExecutor(Executor):
    """An executor whose jobs are asked to stop by a file.

    Args:
        shared: what the jobs and this process have in common.
        slots: the number of jobs that can be in hand at a time.
    """

    def __init__(self, shared: SharedFolder, slots: int) -> None:
        self._shared, self.slots = shared, slots
        self._handles: dict[str, Any] = {}  # what the cluster knows the jobs in hand by

    def stop(self, run_id: str, state: State) -> None:
        """Ask for a run to end after its present step, with a checkpoint, in this state."""
        write_text(self._shared.stop_file(run_id), state.value)

    def poll(self, timeout: float) -> list[WorkerMessage]:
        """Return what the jobs have said, waiting up to ``timeout`` seconds for a first message."""
        if not (messages := self._outcomes()):
            self._wait(timeout)
            messages = self._outcomes()
        return messages

    def close(self) -> None:
        """Have the runs in hand checkpointed."""
        self.withdraw()
        for name in self._handles:
            self.stop(name, State.INTERRUPTED)
        deadline = time.monotonic() + _CLOSE_PATIENCE_S
        while self._handles and time.monotonic() < deadline:
            self.poll(1.0)

    def _outcomes(self) -> list[WorkerMessage]:
        outcomes = [self._outcome(name, handle) for name, handle in self._handles.items()]
        messages = [message for message in outcomes if message]
        for message in messages:
            del self._handles[message.job]
            self._shared.stop_file(message.job).unlink(missing_ok=True)
        return messages

    def _wait(self, timeout: float) -> None:
        time.sleep(timeout)

    @abstractmethod
    def _outcome(self, name: str, handle: Any) -> WorkerMessage | None:
        """Return the last message of a job; None while the job waits or goes on."""


class StopRequest:
    """Whether a detached run should stop: a file says so, which is looked for about once a second.

    Attributes:
        local: the state that this process's own machine asks for, such as Slurm before it takes a node away.
    """

    def __init__(self, path: Path) -> None:
        self.local: State | None = None
        self._path, self._last = path, 0.0
        self._state: State | None = None

    def __call__(self) -> State | None:
        """Return the state in which the run shall end; None to go on."""
        now = time.monotonic()
        if now - self._last > _ASK_EVERY_S:
            self._last = now
            with suppress(FileNotFoundError):
                self._state = State(self._path.read_text(encoding="utf-8"))
        return self.local or self._state


def carry_out(shared: SharedFolder, packed: PackedJob, stop: StopRequest | None = None) -> WorkerMessage:
    """Do a job; return its last message.

    Args:
        shared: the folder of the scheduler that gave the job.
        packed: the job.
        stop: whether to stop; None looks at the file only.
    """
    for name in launcher_variables(os.environ):
        if not name.startswith("SLURM_"):  # submitit queues a preempted job again by these
            del os.environ[name]
    if (problem := shared.problem()) is not None:
        return WorkerMessage(MessageKind.FAILED, packed.name, problem)
    with suppress(OSError):
        os.chdir(shared.working_directory)  # settings may name files relative to it
    try:
        job, stop = packed.unpacked(), stop or StopRequest(shared.stop_file(packed.name))
    except PluginError as error:
        return WorkerMessage(MessageKind.FAILED, packed.name, str(error))
    if isinstance(job, TrainJob) and (state := stop()):  # asked for while the job waited for a place
        return WorkerMessage(MessageKind.FINISHED, job.name, state=state)
    if job.options.gpus_per_run > 1:
        return _in_several_processes(job, stop)
    from repa_lab.orchestration.worker import do

    deadline = time.monotonic() + _BUSY_PATIENCE_S
    while True:  # a process that was lost with its machine may seem to hold the run
        message = do(job, stop)
        if message.kind is not MessageKind.BUSY or time.monotonic() > deadline:
            return message


def _in_several_processes(job: Job, stop: StopRequest) -> WorkerMessage:
    """Do a job as the local executor does it, in a slot of its own on this machine."""
    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:
        executor = LocalExecutor([None], Path(scratch) / "workers.log", job.options.gpus_per_run)
        try:
            executor.submit(job)
            while True:
                for message in executor.poll(_ASK_EVERY_S):
                    if message.kind is not MessageKind.PROGRESS:
                        return message
                if isinstance(job, TrainJob) and (state := stop()):
                    executor.stop(job.name, state)
        finally:
            executor.close()
