"""A job in a process that the scheduler has no pipe to: it is asked to stop by a file in the runs root, which all
share.

runs/.jobs/<sweep>/<run_id>.stop    the state in which a run shall end after its present step
runs/.jobs/<sweep>/token            by which a machine shows that it sees the scheduler's very root
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repa_lab.orchestration.jobs import Job, PrepareJob, Report, TrainJob, parse_job
from repa_lab.runs import RunsRoot, State
from repa_lab.runs.files import write_text

_ASK_EVERY_S = 1.0
_BUSY_PATIENCE_S = 300.0  # until a lost machine's hold of a run has expired on every file system that we know


@dataclass(frozen=True)
class Shared:
    """What a detached job and its scheduler have in common: places below a runs root, and the scheduler's working folder."""

    root: RunsRoot
    group: str
    folder: Path
    token: str

    @classmethod
    def open(cls, root: RunsRoot, group: str) -> Shared:
        """Of this process; the token stays, for jobs may outlive it."""
        shared = cls(RunsRoot(root.path.resolve()), group, Path.cwd(), uuid.uuid4().hex)
        shared.path.mkdir(parents=True, exist_ok=True)
        if not shared.token_path.exists():
            write_text(shared.token_path, shared.token)
        return replace(shared, token=shared.token_path.read_text(encoding="utf-8"))

    @property
    def path(self) -> Path:
        """Where this sweep's jobs and its scheduler leave word for each other."""
        return self.root.path / ".jobs" / self.group

    @property
    def token_path(self) -> Path:
        """Where :attr:`token` is found by whoever sees the same root."""
        return self.path / "token"

    def job(self, job: Job) -> dict[str, Any]:
        """A job as plain data, with the root as every machine calls it."""
        return {**job.to_json(), "root": str(self.root.path)}

    def ask(self, run_id: str, state: State) -> None:
        """Ask for a run to be ended in a state."""
        write_text(self.path / f"{run_id}.stop", state.value)

    def asked(self, job: Job) -> Asked:
        """Looks for what :meth:`ask` wrote."""
        return Asked(self.path / f"{job.run.run_id if isinstance(job, TrainJob) else 'prepare'}.stop")

    def retract(self, run_id: str) -> None:
        """Ask no more."""
        (self.path / f"{run_id}.stop").unlink(missing_ok=True)


class Asked:
    """Whether a detached run should stop: a file says so, which is looked for about once a second."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, 0.0
        self._state: State | None = None
        self.own: State | None = None  # what this process's machine asks for

    def __call__(self) -> State | None:
        """The state in which to end, if any."""
        now = time.monotonic()
        if now - self._last > _ASK_EVERY_S:
            self._last = now
            with suppress(FileNotFoundError):
                self._state = State(self._path.read_text(encoding="utf-8"))
        return self.own or self._state


def carry_out(shared: Shared, value: dict[str, Any], asked: Asked | None = None) -> dict[str, Any]:
    """Do a job that was written as plain data.

    Args:
        shared: of the scheduler that gave it.
        value: see `Shared.job`.
        asked: whether to stop; None looks at the file only.

    Returns:
        The final report, as plain data.
    """
    job = parse_job(value)
    if (problem := unshared(shared.token_path, shared.token)) is not None:
        return failure(job, problem).to_json()
    with suppress(OSError):
        os.chdir(shared.folder)  # settings may name files from there
    asked = asked or shared.asked(job)
    if isinstance(job, TrainJob) and (state := asked()):  # while it waited for a place
        return Report("finished", run_id=job.run.run_id, state=state).to_json()
    if job.options.gpus_per_run > 1:
        return _in_several_processes(job, asked).to_json()
    from repa_lab.orchestration.worker import fill_caches, train_run

    if isinstance(job, PrepareJob):
        return fill_caches(job, lambda report: None).to_json()
    return _patiently(lambda: train_run(job, asked)).to_json()


def unshared(path: Path, token: str) -> str | None:
    """Why this machine cannot work: it does not see the scheduler's runs root; None if it does."""
    try:
        if path.read_text(encoding="utf-8") == token:
            return None
    except OSError:
        pass
    return f"machine {socket.gethostname()} does not see the runs root {path.parents[2]}; it must be on shared storage"


def _patiently(train: Callable[[], Report]) -> Report:
    """Try again while a process that was lost with its machine seems to hold the run."""
    deadline = time.monotonic() + _BUSY_PATIENCE_S
    while True:
        report = train()
        if not report.is_busy or time.monotonic() > deadline:
            return report


def _in_several_processes(job: Job, asked: Asked) -> Report:
    """As the local executor does it, in a slot of its own on this machine."""
    from repa_lab.orchestration.executors.local import LocalExecutor
    from repa_lab.orchestration.jobs import FINAL

    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:
        executor = LocalExecutor([None], Path(scratch) / "workers.log", job.options.gpus_per_run)
        try:
            executor.submit(job)
            while True:
                for report in executor.poll(_ASK_EVERY_S):
                    if report.kind in FINAL:
                        return report
                if isinstance(job, TrainJob) and (state := asked()):
                    executor.stop(job.run.run_id, state)
        finally:
            executor.close()


def failure(job: Job, problem: str) -> Report:
    """The final report of a job that a problem kept from reporting."""
    if isinstance(job, TrainJob):
        return Report("finished", run_id=job.run.run_id, state=State.FAILED, error=problem)
    return Report("broken", error=problem)
