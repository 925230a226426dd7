"""Slurm through submitit: runs are array jobs, and a run that is preempted or out of time is queued again and goes on.

Queued jobs outlive the scheduler: a scheduler that is started again finds its jobs in ``runs/.jobs/<sweep>/jobs.json``
and waits for them.
"""

from __future__ import annotations

import importlib
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Literal

from repa_lab.files import write_json
from repa_lab.orchestration.executors.detached import DetachedExecutor, SharedFolder, StopRequest, carry_out
from repa_lab.orchestration.scheduler import ExecutorError, Job, MessageKind, PackedJob, PrepareJob, WorkerMessage
from repa_lab.runs import RunsRoot, State, files
from repa_lab.spec import RunOptions

_SIGNAL_DELAY_S = 120  # from Slurm's signal to its kill: time for a step and a checkpoint
_CHECKPOINT_PATIENCE_S = 90.0
_MAX_TIMEOUTS = 1000  # a run may be longer than a partition's limit
_ASK_EVERY_S = 10.0  # squeue serves all users of the cluster


class Submission:
    """A job as submitit calls it; on Slurm's signal submitit calls :meth:`checkpoint` for the job to queue instead.

    Training goes on in a thread, so that the signal's handler can wait for the step in hand and its checkpoint.
    """

    def __init__(self, shared: SharedFolder, packed: PackedJob) -> None:
        self._shared, self._packed = shared, packed
        self._stop: StopRequest | None = None
        self._thread: threading.Thread | None = None

    def __call__(self) -> WorkerMessage:
        """Do the job; return its last message."""
        result: list[WorkerMessage] = []
        self._stop = stop = StopRequest(self._shared.stop_file(self._packed.name))
        self._thread = threading.Thread(
            target=lambda: result.append(carry_out(self._shared, self._packed, stop)), daemon=True
        )
        self._thread.start()
        self._thread.join()
        return result[0]

    def checkpoint(self) -> Any:
        """Have the run end with a checkpoint, and return the same job: it goes on from the checkpoint."""
        if self._stop and self._thread:
            self._stop.local = State.INTERRUPTED
            self._thread.join(_CHECKPOINT_PATIENCE_S)
        return _import_submitit().helpers.DelayedSubmission(Submission(self._shared, self._packed))


class SlurmExecutor(DetachedExecutor):
    """Runs as jobs in Slurm's queue.

    Args:
        options: ``options.slurm`` says what each run asks for.
        root: the runs root, which every machine must see.
        slots: the number of runs handed to Slurm at a time; Slurm itself limits how many of an array go on at once.
        cluster: where submitit takes the jobs; ``local`` is processes on this machine.

    Raises:
        ExecutorError: there is no submitit, or no Slurm.
    """

    def __init__(
        self, options: RunOptions, root: RunsRoot, sweep: str, slots: int, cluster: Literal["slurm", "local"] = "slurm"
    ) -> None:
        self._submitit = _import_submitit()
        super().__init__(SharedFolder.open(root, sweep), slots)
        self._cluster = cluster
        self._engine = self._open_engine(options, sweep)
        self._waiting: list[Job] = []
        # Jobs of an earlier scheduler that are not asked for again yet, by the id of their run.
        self._left: dict[str, str] = files.read_json(self._record_path) if self._record_path.exists() else {}
        self._listed_at, self._listed = 0.0, set[str]()
        self._missing: dict[str, float] = {}  # since when squeue has not listed a job

    def submit(self, job: Job) -> None:
        """Take a job; the jobs that are submitted before the next poll become one array."""
        self._shared.stop_file(job.name).unlink(missing_ok=True)
        job_id = self._left.pop(job.name, None)
        if job_id and (handle := self._adopt(job.name, job_id)):
            self._handles[job.name] = handle
        else:
            self._waiting.append(job)

    def kill(self, run_id: str) -> None:
        """End a run at once, whatever it does."""
        if run_id in self._handles:
            self._handles[run_id].cancel()

    def withdraw(self) -> list[str]:
        """Take back the jobs that only wait in the queue; return the ids of their runs."""
        withdrawn = [job.name for job in self._waiting]
        self._waiting = []
        pending = self._list("PENDING")
        for name in [name for name, handle in self._handles.items() if handle.job_id in pending]:
            self._handles.pop(name).cancel()
            withdrawn.append(name)
        self._record()
        return withdrawn

    def poll(self, timeout: float) -> list[WorkerMessage]:
        """Submit the jobs that wait, then return what jobs have said."""
        if self._waiting:
            submissions = [Submission(self._shared, self._shared.pack(job)) for job in self._waiting]
            for job in self._waiting:  # a run that is started again is a new job to squeue
                self._missing.pop(job.name, None)
            try:
                with self._engine.batch():
                    handles = [self._engine.submit(submission) for submission in submissions]
            except self._submitit.core.utils.FailedJobError as error:
                raise ExecutorError("slurm", f"sbatch refused: {_last_line(error)}") from None
            self._handles |= {job.name: handle for job, handle in zip(self._waiting, handles, strict=True)}
            self._waiting = []
            self._record()
        if messages := super().poll(timeout):
            self._record()
        return messages

    def _open_engine(self, options: RunOptions, sweep: str) -> Any:
        folder = self._shared.path / "slurm"
        if self._cluster == "local":
            engine = self._submitit.LocalExecutor(folder, max_num_timeout=_MAX_TIMEOUTS)
            engine.update_parameters(timeout_min=options.slurm.time_min, signal_delay_s=signal_delay(options))
            return engine
        try:
            engine = self._submitit.SlurmExecutor(folder, max_num_timeout=_MAX_TIMEOUTS)
        except RuntimeError:
            raise ExecutorError("executor", "no Slurm here: srun and sbatch are not on the PATH") from None
        engine.update_parameters(**sbatch_parameters(options, sweep))
        return engine

    def _outcome(self, name: str, handle: Any) -> WorkerMessage | None:
        if handle.paths.result_pickle.exists():
            try:
                message: WorkerMessage = handle.result()
                return message
            except self._submitit.core.utils.UncompletedJobError as error:  # a failed job's error is one, too
                return WorkerMessage(MessageKind.FAILED, name, f"the job failed: {_last_line(error)}")
        if self._is_there(handle):
            self._missing.pop(name, None)
            return None
        missing_since = self._missing.setdefault(name, time.monotonic())
        if self._cluster == "slurm" and time.monotonic() - missing_since < 2 * _ASK_EVERY_S:
            return None  # its result may be on its way through the file system
        return WorkerMessage(MessageKind.FAILED, name, f"the job ended without a result; see {handle.paths.stderr}")

    def _is_there(self, handle: Any) -> bool:
        if self._cluster == "local":
            return bool(handle.state == "RUNNING")
        if time.monotonic() - self._listed_at > _ASK_EVERY_S:
            self._listed_at, self._listed = time.monotonic(), self._list()
        return handle.job_id in self._listed

    def _list(self, state: str = "") -> set[str]:
        """Return our jobs that Slurm has, or those in a state; all of them where squeue does not answer now."""
        if self._cluster == "local":
            return set()
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i", *([f"--states={state}"] if state else [])]
        try:
            return set(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split())
        except (OSError, subprocess.SubprocessError):
            return set() if state else {handle.job_id for handle in self._handles.values()}

    def _adopt(self, name: str, job_id: str) -> Any:
        """Return a job of an earlier scheduler that is queued or has ended well; None if it must be done again."""
        handle = self._engine.job_class(self._shared.path / "slurm", job_id)
        if handle.paths.result_pickle.exists():
            message = self._outcome(name, handle)
            return handle if message and message.state in (State.DONE, State.STOPPED, State.PRUNED) else None
        return handle if job_id in self._list() else None

    @property
    def _record_path(self) -> Path:
        return self._shared.path / "jobs.json"

    def _record(self) -> None:
        queued = {name: handle.job_id for name, handle in self._handles.items() if name != PrepareJob.name}
        write_json(self._record_path, self._left | queued)


def sbatch_parameters(options: RunOptions, sweep: str) -> dict[str, Any]:
    """Return the parameters that submitit writes into the batch file."""
    slurm = options.slurm
    optional = {
        "partition": slurm.partition,
        "account": slurm.account,
        "gpus_per_node": slurm.gpus_per_node,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else None,
        "setup": list(slurm.setup) or None,
    }
    return {
        "job_name": f"repa-lab-{sweep}",
        "nodes": 1,
        "ntasks_per_node": 1,
        "time": slurm.time_min,
        "cpus_per_task": slurm.cpus_per_task,
        "array_parallelism": slurm.array_parallelism,
        "signal_delay_s": signal_delay(options),
        "additional_parameters": {"requeue": True},  # also when the node is lost
        **{name: value for name, value in optional.items() if value is not None},
    }


def signal_delay(options: RunOptions) -> int:
    """Return the seconds between Slurm's signal and the end of a job's time."""
    return min(_SIGNAL_DELAY_S, options.slurm.time_min * 60 // 4)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def _import_submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise ExecutorError("executor", "slurm needs submitit: pip install 'repa-lab[slurm]'") from None
