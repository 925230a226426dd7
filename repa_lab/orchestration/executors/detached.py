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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repa_lab.files import write_text
from repa_lab.orchestration.executors import (
    Executor,
    Job,
    MessageKind,
    PrepareJob,
    TrainJob,
    WorkerMessage,
    dump_job,
    dump_message,
    parse_job,
)
from repa_lab.orchestration.launcher import launcher_variables
from repa_lab.runs import RunsRoot, State

_ASK_EVERY_S = 1.0
_BUSY_PATIENCE_S = 300.0  # by then a lost machine's lock of a run has expired on every file system that we know


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

    def dump_job(self, job: Job) -> dict[str, Any]:
        """Return a job as plain data, with the root as every machine calls it."""
        return dump_job(replace(job, root=self.root))

    def request_stop(self, run_id: str, state: State) -> None:
        """Ask for a run to end in a state."""
        write_text(self.path / f"{run_id}.stop", state.value)

    def withdraw_stop(self, run_id: str) -> None:
        """Withdraw the request to stop."""
        (self.path / f"{run_id}.stop").unlink(missing_ok=True)

    def stop_request(self, job: Job) -> StopRequest:
        """Return what looks for :meth:`request_stop`."""
        return StopRequest(self.path / f"{job.name}.stop")


class DetachedExecutor(Executor):
    """An executor whose jobs are asked to stop by a file.

    Args:
        shared: what the jobs and this process have in common.
        slots: the number of jobs that can be in hand at a time.
    """

    def __init__(self, shared: SharedFolder, slots: int) -> None:
        self._shared, self.slots = shared, slots

    def stop(self, run_id: str, state: State) -> None:
        """Ask for a run to end after its present step, with a checkpoint, in this state."""
        self._shared.request_stop(run_id, state)


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


def carry_out(shared: SharedFolder, value: Mapping[str, Any], stop: StopRequest | None = None) -> dict[str, Any]:
    """Do a job that was written as plain data.

    Args:
        shared: the folder of the scheduler that gave the job.
        value: the job; see :meth:`SharedFolder.dump_job`.
        stop: whether to stop; None looks at the file only.

    Returns:
        The job's last message, as plain data.
    """
    for name in launcher_variables(os.environ):
        if not name.startswith("SLURM_"):  # submitit queues a preempted job again by these
            del os.environ[name]
    job = parse_job(value)
    return dump_message(_carry_out(shared, job, stop or shared.stop_request(job)))


def _carry_out(shared: SharedFolder, job: Job, stop: StopRequest) -> WorkerMessage:
    if (problem := sharing_problem(shared.token_path, shared.token)) is not None:
        return WorkerMessage.failure(job, problem)
    with suppress(OSError):
        os.chdir(shared.working_directory)  # settings may name files relative to it
    if isinstance(job, TrainJob) and (state := stop()):  # asked for while the job waited for a place
        return WorkerMessage(MessageKind.FINISHED, job.name, state)
    if job.options.gpus_per_run > 1:
        return _in_several_processes(job, stop)
    from repa_lab.orchestration.worker import fill_caches, train_run

    if isinstance(job, PrepareJob):
        return fill_caches(job, lambda message: None)
    deadline = time.monotonic() + _BUSY_PATIENCE_S
    while True:  # a process that was lost with its machine may seem to hold the run
        message = train_run(job, stop)
        if message.kind is not MessageKind.BUSY or time.monotonic() > deadline:
            return message


def sharing_problem(token_path: Path, token: str) -> str | None:
    """Return why this machine cannot work: it does not see the scheduler's runs root; None if it does."""
    with suppress(OSError):
        if token_path.read_text(encoding="utf-8") == token:
            return None
    root = token_path.parents[2]
    return f"machine {socket.gethostname()} does not see the runs root {root}; it must be on shared storage"


def _in_several_processes(job: Job, stop: StopRequest) -> WorkerMessage:
    """Do a job as the local executor does it, in a slot of its own on this machine."""
    from repa_lab.orchestration.executors.local import LocalExecutor

    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:
        executor = LocalExecutor([None], Path(scratch) / "workers.log", job.options.gpus_per_run)
        try:
            executor.submit(job)
            while True:
                for message in executor.poll(_ASK_EVERY_S):
                    if message.kind.ends_job:
                        return message
                if isinstance(job, TrainJob) and (state := stop()):
                    executor.stop(job.name, state)
        finally:
            executor.close()
