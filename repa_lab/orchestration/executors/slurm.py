"""Slurm through submitit: runs are array jobs, and one that is preempted or out of time is queued again and goes on.

What is queued outlives the scheduler: started again, it finds its jobs in ``runs/.jobs/<sweep>/jobs.json`` and waits
for them.
"""

from __future__ import annotations

import importlib
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

from repa_lab.orchestration.executors import ExecutorError
from repa_lab.orchestration.executors.detached import Asked, Shared, carry_out, failure
from repa_lab.orchestration.jobs import Job, Report, TrainJob, parse_job
from repa_lab.runs import RunsRoot, State, files
from repa_lab.spec import RunOptions

_SIGNAL_DELAY_S = 120  # from Slurm's signal to its kill: time for a step and a checkpoint
_CHECKPOINT_PATIENCE_S = 90.0
_CLOSE_PATIENCE_S = 90.0
_MAX_TIMEOUTS = 1000  # a run may be longer than a partition's limit
_ASK_EVERY_S = 10.0  # squeue is everybody's
_PREPARE = "prepare"


class Submission:
    """A job as submitit calls it, and as it asks, on Slurm's signal, for what shall be queued in its place.

    Training goes on in a thread, so that the signal's handler can wait for the step in hand and its checkpoint.
    """

    def __init__(self, shared: Shared, value: dict[str, Any]) -> None:
        self._shared, self._value = shared, value
        self._asked: Asked | None = None
        self._thread: threading.Thread | None = None

    def __call__(self) -> dict[str, Any]:
        """Do the job; the final report, as plain data."""
        result: dict[str, Any] = {}
        self._asked = asked = self._shared.asked(parse_job(self._value))
        self._thread = threading.Thread(
            target=lambda: result.update(carry_out(self._shared, self._value, asked)), daemon=True
        )
        self._thread.start()
        self._thread.join()
        return result

    def checkpoint(self) -> Any:
        """Have the run end with a checkpoint, and give back the same job: it goes on from there."""
        if self._asked and self._thread:
            self._asked.own = State.INTERRUPTED
            self._thread.join(_CHECKPOINT_PATIENCE_S)
        return _import().helpers.DelayedSubmission(Submission(self._shared, self._value))


@dataclass
class _Queued:
    """A job that Slurm has; ``missing`` is when it was first seen to be there no more."""

    job: Job
    handle: Any
    missing: float | None = None


class SlurmExecutor:
    """Runs as jobs in Slurm's queue.

    Args:
        options: ``slurm`` says what each run asks for.
        root: the runs root, which every machine must see.
        group: the sweep's name.
        slots: how many runs are handed to Slurm at a time; it limits how many of an array go on itself.
        cluster: where submitit takes the jobs; ``local`` is processes on this machine.

    Raises:
        ExecutorError: there is no submitit, or no Slurm.
    """

    def __init__(
        self, options: RunOptions, root: RunsRoot, group: str, slots: int, cluster: Literal["slurm", "local"] = "slurm"
    ) -> None:
        self._submitit = _import()
        self._shared = Shared.open(root, group)
        self._slots, self._cluster = slots, cluster
        self._engine = self._open(options, group)
        self._waiting: list[Job] = []
        self._queued: dict[str, _Queued] = {}
        self._left = self._read()  # by an earlier scheduler, and not asked for again yet
        self._asked_at, self._listed = 0.0, set[str]()

    @property
    def slots(self) -> int:
        """See :class:`Executor`."""
        return self._slots

    def free(self) -> int:
        """See :class:`Executor`."""
        return self._slots - len(self._waiting) - len(self._queued)

    def submit(self, job: Job) -> None:
        """See :class:`Executor`; what is submitted before the next poll becomes one array."""
        name = _name(job)
        self._shared.retract(name)
        known = self._left.pop(name, None)
        if isinstance(job, TrainJob) and known and (adopted := self._adopt(job, known)):
            self._queued[name] = adopted
        else:
            self._waiting.append(job)

    def stop(self, run_id: str, state: State) -> None:
        """See :class:`Executor`."""
        self._shared.ask(run_id, state)

    def kill(self, run_id: str) -> None:
        """See :class:`Executor`."""
        if run_id in self._queued:
            self._queued[run_id].handle.cancel()

    def withdraw(self) -> list[str]:
        """See :class:`Executor`."""
        waiting = [_name(job) for job in self._waiting]
        self._waiting = []
        pending = self._list("PENDING")
        for name, queued in list(self._queued.items()):
            if queued.handle.job_id in pending:
                queued.handle.cancel()
                del self._queued[name]
                waiting.append(name)
        self._record()
        return waiting

    def poll(self, timeout: float) -> list[Report]:
        """See :class:`Executor`."""
        self._flush()
        reports = self._settled()
        if not reports:
            time.sleep(timeout)
            reports = self._settled()
        return reports

    def close(self) -> None:
        """See :class:`Executor`; what does not end in time stays queued, and is found again."""
        self.withdraw()
        for name in self._queued:
            self._shared.ask(name, State.INTERRUPTED)
        deadline = time.monotonic() + _CLOSE_PATIENCE_S
        while self._queued and time.monotonic() < deadline:
            self.poll(1.0)

    def _open(self, options: RunOptions, group: str) -> Any:
        folder = self._shared.path / "slurm"
        if self._cluster == "local":
            engine = self._submitit.LocalExecutor(folder, max_num_timeout=_MAX_TIMEOUTS)
            engine.update_parameters(timeout_min=options.slurm.time_min, signal_delay_s=signal_delay(options))
            return engine
        try:
            engine = self._submitit.SlurmExecutor(folder, max_num_timeout=_MAX_TIMEOUTS)
        except RuntimeError:
            raise ExecutorError("executor", "no Slurm here: srun and sbatch are not on the PATH") from None
        engine.update_parameters(**sbatch_parameters(options, group))
        return engine

    def _flush(self) -> None:
        if not self._waiting:
            return
        submissions = [Submission(self._shared, self._shared.job(job)) for job in self._waiting]
        try:
            with self._engine.batch():
                handles = [self._engine.submit(submission) for submission in submissions]
        except self._submitit.core.utils.FailedJobError as error:
            raise ExecutorError("slurm", f"sbatch refused: {str(error).strip().splitlines()[-1]}") from None
        self._queued |= {_name(job): _Queued(job, handle) for job, handle in zip(self._waiting, handles, strict=True)}
        self._waiting = []
        self._record()

    def _settled(self) -> list[Report]:
        reports = []
        for name, queued in list(self._queued.items()):
            if (report := self._outcome(queued)) is not None:
                del self._queued[name]
                self._shared.retract(name)
                reports.append(report)
        if reports:
            self._record()
        return reports

    def _outcome(self, queued: _Queued) -> Report | None:
        """What became of a job; None while it waits or goes on."""
        handle = queued.handle
        if handle.paths.result_pickle.exists():
            try:
                return Report.from_json(handle.result())
            except self._submitit.core.utils.UncompletedJobError as error:  # which a failed job's is, too
                return failure(queued.job, f"the job failed: {str(error).strip().splitlines()[-1]}")
        if self._is_there(handle):
            queued.missing = None
            return None
        queued.missing = queued.missing or time.monotonic()
        if self._cluster == "slurm" and time.monotonic() - queued.missing < 2 * _ASK_EVERY_S:
            return None  # its result may be on its way through the file system
        return failure(queued.job, f"the job ended without a result; see {handle.paths.stderr}")

    def _is_there(self, handle: Any) -> bool:
        if self._cluster == "local":
            return bool(handle.state == "RUNNING")
        if time.monotonic() - self._asked_at > _ASK_EVERY_S:
            self._asked_at, self._listed = time.monotonic(), self._list()
        return handle.job_id in self._listed

    def _list(self, state: str = "") -> set[str]:
        """The jobs of ours that Slurm has, in this state if one is given; all of them where it does not answer now."""
        if self._cluster == "local":
            return set()
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i", *([f"--states={state}"] if state else [])]
        try:
            return set(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split())
        except (OSError, subprocess.SubprocessError):
            return set() if state else {queued.handle.job_id for queued in self._queued.values()}

    def _adopt(self, job: TrainJob, job_id: str) -> _Queued | None:
        """A job that an earlier scheduler left in the queue, or that came to its end since; None if it must be done again."""
        handle = self._engine.job_class(self._shared.path / "slurm", job_id)
        queued = _Queued(job, handle)
        if handle.paths.result_pickle.exists():
            report = self._outcome(queued)
            return queued if report and report.state in (State.DONE, State.STOPPED, State.PRUNED) else None
        return queued if job_id in self._list() else None

    def _read(self) -> dict[str, str]:
        path = self._shared.path / "jobs.json"
        left: dict[str, str] = files.read_json(path) if path.exists() else {}
        return left

    def _record(self) -> None:
        ours = {name: queued.handle.job_id for name, queued in self._queued.items() if name != _PREPARE}
        files.write_json(self._shared.path / "jobs.json", self._left | ours)


def sbatch_parameters(options: RunOptions, group: str) -> dict[str, Any]:
    """What submitit writes into the batch file."""
    slurm = options.slurm
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "gpus_per_node": slurm.gpus_per_node,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else None,
        "setup": list(slurm.setup) or None,
    }
    return {
        "job_name": f"repa-lab-{group}",
        "nodes": 1,
        "ntasks_per_node": 1,
        "time": slurm.time_min,
        "cpus_per_task": slurm.cpus_per_task,
        "array_parallelism": slurm.array_parallelism,
        "signal_delay_s": signal_delay(options),
        "additional_parameters": {"requeue": True},  # also when the node is lost
        **{name: value for name, value in asked.items() if value is not None},
    }


def signal_delay(options: RunOptions) -> int:
    """Seconds between Slurm's signal and the end of a job's time."""
    return min(_SIGNAL_DELAY_S, options.slurm.time_min * 60 // 4)


def _import() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise ExecutorError("executor", "slurm needs submitit: pip install 'repa-lab[slurm]'") from None


def _name(job: Job) -> str:
    return job.run.run_id if isinstance(job, TrainJob) else _PREPARE
