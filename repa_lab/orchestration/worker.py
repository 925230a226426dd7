"""A worker: a process that trains one run after another.

A worker reads from standard input and writes messages to standard output, a JSON object a line. The first line has the
worker's own environment variables and its folder, the others are jobs. When the input ends, because the scheduler is
gone for whatever reason, the run in hand is checkpointed and the process ends. Workers that share a run have torchrun's
environment variables, and each is given the job.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from repa_lab.orchestration.executors import (
    HEARTBEAT,
    MessageKind,
    PrepareJob,
    TrainJob,
    WorkerMessage,
    dump_message,
    parse_job,
)
from repa_lab.orchestration.tracking import open_trackers
from repa_lab.registry import PluginError, one_line
from repa_lab.runs import RunWriter, State
from repa_lab.runs.directory import RunBusyError
from repa_lab.spec import RunOptions

if TYPE_CHECKING:
    import torch

ShouldStop = Callable[[], State | None]
_GRACE_S = 60.0
_GRACE_IDLE_S = 2.0
_BEAT_S = 1.0


class Worker:
    """Serves jobs until its input ends."""

    def __init__(self, jobs: TextIO, messages: TextIO) -> None:
        self._input, self._messages = jobs, messages
        self._jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stop: State | None = None
        self._is_training = False

    def serve(self) -> None:
        """Do every job in turn."""
        threading.Thread(target=self._read, daemon=True).start()
        while (job := self._jobs.get()) is not None:
            self._is_training = job["kind"] == "train"
            self._send(self._carry_out(job))
            self._is_training = False

    def _carry_out(self, value: dict[str, Any]) -> WorkerMessage:
        try:
            job = parse_job(value)
        except PluginError as error:
            if value["kind"] == "prepare":
                return WorkerMessage(MessageKind.BROKEN, error=str(error))
            run_id = value["task"]["run"]["run_id"]
            return WorkerMessage(MessageKind.FINISHED, run_id, State.FAILED, error=str(error))
        if isinstance(job, PrepareJob):
            return fill_caches(job, self._send)
        return train_run(job, lambda: self._stop)

    def _read(self) -> None:
        for line in self._input:
            message = json.loads(line)
            if message["kind"] == "stop":
                self._stop = State(message["state"])
            else:
                self._stop = None  # here, in the order of the input: the job may be taken up later
                self._jobs.put(message)
        self._stop = State.INTERRUPTED
        self._jobs.put(None)
        # Training ends with a checkpoint; caches are filled file by file, and filled files are found again.
        threading.Timer(_GRACE_S if self._is_training else _GRACE_IDLE_S, os._exit, [75]).start()

    def _send(self, message: WorkerMessage) -> None:
        self._messages.write(json.dumps(dump_message(message)) + "\n")
        self._messages.flush()


def fill_caches(job: PrepareJob, send: Callable[[WorkerMessage], None]) -> WorkerMessage:
    """Fill the caches and send the progress; return PREPARED, REFUSED or BROKEN."""
    from repa_lab.orchestration.prepare import RefusedError, prepare

    def announce(activity: str) -> Callable[[int, int], None]:
        return lambda done, total: send(WorkerMessage(MessageKind.PROGRESS, activity=activity, done=done, total=total))

    try:
        prepare(job.configs, job.options, job.root.cache, announce)
        return WorkerMessage(MessageKind.PREPARED)
    except RefusedError as error:
        return WorkerMessage(MessageKind.REFUSED, config=error.config, path=error.path, error=str(error))
    except Exception as error:
        traceback.print_exc()
        return WorkerMessage.failure(job, one_line(error))


def train_run(job: TrainJob, should_stop: ShouldStop) -> WorkerMessage:
    """Train a run to its end, or until it should stop; return FINISHED or BUSY."""
    from repa_lab.training.evaluate import DivergedError

    if job.options.hang_minutes:
        should_stop = Heartbeat(job, should_stop)
    try:
        if job.is_rehearsal:  # interrupted after its first step, so that the run is resumed from a checkpoint
            train_within_memory(job, lambda: should_stop() or State.INTERRUPTED)
        return WorkerMessage(MessageKind.FINISHED, job.name, train_within_memory(job, should_stop))
    except RunBusyError:
        return WorkerMessage(MessageKind.BUSY, job.name)
    except Exception as error:
        traceback.print_exc()
        return WorkerMessage.failure(job, one_line(error), isinstance(error, DivergedError))


def train_within_memory(job: TrainJob, should_stop: ShouldStop) -> State:
    """Train a run; if a step's memory runs out, go on from the last checkpoint with micro-batches half as large.

    The batch and its randomness stay the same, and the results but for rounding. A measurement that does not fit ends
    the run, for a smaller micro-batch would not help; so does memory that runs out on one of several processes.

    Raises:
        OutOfMemoryError: not even one image fits.
        RunBusyError: another process trains the run.
        Exception: whatever else ends the run.
    """
    import torch

    from repa_lab.training.loop import train

    task, options, directory, cache = job.task, job.options, job.root.run(job.name), job.root.cache
    kept = frozenset(task.kept_steps)
    while True:
        try:
            trackers = open_trackers(job)
            return train(task.run, directory, options, cache, trackers, should_stop, task.fork, kept, task.is_enough)
        except torch.OutOfMemoryError as error:
            smaller = _with_half_micro_batch(options, task.run.config.train.batch_size)
            if smaller is None or not _is_of_step(error) or os.environ.get("WORLD_SIZE", "1") != "1":
                raise
            reason = one_line(error)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        with RunWriter(directory) as writer:
            writer.event(
                "out-of-memory", error=reason, micro_batch=options.micro_batch, retried_with=smaller.micro_batch
            )
        options = smaller


def _with_half_micro_batch(options: RunOptions, batch: int) -> RunOptions | None:
    """Return the options with half the micro-batch, which is the whole batch unless it is set; None below one image."""
    if options.micro_batch == "auto":  # the trainer has halved it as often as it could
        return None
    size = min(options.micro_batch or batch, batch)
    return options.model_copy(update={"micro_batch": size // 2}) if size > 1 else None


def _is_of_step(error: torch.OutOfMemoryError) -> bool:
    from repa_lab.training.trainer import Trainer

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is Trainer.step.__code__ for frame in frames)


class Heartbeat:
    """Wraps ``should_stop`` to touch a file in the run directory, which a scheduler on another machine can see."""

    def __init__(self, job: TrainJob, should_stop: ShouldStop) -> None:
        self._path, self._should_stop = job.root.run(job.name).path / HEARTBEAT, should_stop
        self._last = 0.0

    def __call__(self) -> State | None:
        """Return what ``should_stop`` returns."""
        now = time.monotonic()
        if now - self._last > _BEAT_S:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            self._last = now
        return self._should_stop()


def main() -> None:
    """Serve on copies of the standard streams.

    Libraries then print to standard error. Standard input becomes empty, because a data loader's forked process closes
    it, and would wait for ever for the lock that the reading thread holds on it.
    """
    jobs, messages = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    start = json.loads(jobs.readline())
    os.environ.update(start["environment"])
    os.chdir(start["folder"])
    os.dup2(2, 1)
    sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  open for as long as the process is
    os.dup2(sys.stdin.fileno(), 0)
    Worker(jobs, messages).serve()


if __name__ == "__main__":
    main()
