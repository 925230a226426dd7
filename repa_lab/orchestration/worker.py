"""A worker: one process that trains one run after another, so that libraries are imported once.

It reads jobs from standard input and answers on standard output, a JSON object a line. When the input ends, because the
scheduler is gone for whatever reason, the run in hand is checkpointed and the process ends. Workers that share a run
are started with torchrun's environment variables, and each is given the job.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from repa_lab.orchestration.jobs import HEARTBEAT, PrepareJob, Report, TrainJob, parse_job
from repa_lab.registry import PluginError, one_line
from repa_lab.runs import RunWriter, State
from repa_lab.spec import RunOptions
from repa_lab.tracking import Listener

if TYPE_CHECKING:
    import torch

    from repa_lab.report.headline import Compared
    from repa_lab.tracking.wandb import WandbRun

ShouldStop = Callable[[], State | None]
_GRACE_S = 60.0
_GRACE_IDLE_S = 2.0
_BEAT_S = 1.0


class Worker:
    """Serves jobs until its input ends."""

    def __init__(self, jobs: TextIO, answers: TextIO) -> None:
        self._input, self._answers = jobs, answers
        self._jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stop: State | None = None
        self._is_training = False

    def serve(self) -> None:
        """Answer every job in turn."""
        threading.Thread(target=self._read, daemon=True).start()
        import repa_lab.orchestration.prepare
        import repa_lab.training.loop  # noqa: F401  imported before the first job, while the scheduler does something else

        gc.freeze()  # half a million objects of the libraries: each full collection, and the end, would go through them all
        self._answer(Report("ready"))
        while (job := self._jobs.get()) is not None:
            self._is_training = job["kind"] == "train"
            self._answer(self._carry_out(job))
            self._is_training = False

    def _carry_out(self, job: dict[str, Any]) -> Report:
        try:
            parsed = parse_job(job)
        except PluginError as error:
            if job["kind"] == "prepare":
                return Report("broken", error=str(error))
            return Report("finished", run_id=job["run_id"], state=State.FAILED, error=str(error))
        if isinstance(parsed, PrepareJob):
            return fill_caches(parsed, self._answer)
        return train_run(parsed, lambda: self._stop)

    def _read(self) -> None:
        for line in self._input:
            message = json.loads(line)
            if message["kind"] == "stop":
                self._stop = State(message["state"])
            else:
                self._stop = None  # here, in the order of what is said: we may be importing, and hear of the job later
                self._jobs.put(message)
        self._stop = State.INTERRUPTED
        self._jobs.put(None)
        # Training ends with a checkpoint; caches are filled file by file, and what is there is found again.
        threading.Timer(_GRACE_S if self._is_training else _GRACE_IDLE_S, os._exit, [75]).start()

    def _answer(self, report: Report) -> None:
        self._answers.write(json.dumps(report.to_json()) + "\n")
        self._answers.flush()


def fill_caches(job: PrepareJob, answer: Callable[[Report], None]) -> Report:
    """Fill the caches, announcing progress on the way; says ``prepared``, ``refused`` or ``broken``."""
    from repa_lab.orchestration.prepare import RefusedError, prepare

    def announce(task: str) -> Callable[[int, int], None]:
        return lambda done, total: answer(Report("progress", task=task, done=done, total=total))

    try:
        prepare(job.configs, job.options, job.root.cache, announce)
        return Report("prepared")
    except RefusedError as refusal:
        return Report("refused", arm=refusal.arm, path=refusal.path, error=refusal.message)
    except Exception as error:
        traceback.print_exc()
        return Report("broken", error=one_line(error))


def train_run(job: TrainJob, should_stop: ShouldStop) -> Report:
    """Train a run to its end, or until it should stop; says ``finished``, of a failure with its reason."""
    asked = Heartbeat(job, should_stop) if job.options.hang_minutes else should_stop
    error: str | None = None
    try:
        if job.is_rehearsal:  # stopped after its first step, so that what follows takes it up from a checkpoint
            train_within_memory(job, lambda: asked() or State.INTERRUPTED)
        state = train_within_memory(job, asked)
    except Exception as failure:
        traceback.print_exc()
        state, error = State.FAILED, one_line(failure)
    return Report("finished", run_id=job.run.run_id, state=state, error=error)


def train_within_memory(job: TrainJob, should_stop: ShouldStop) -> State:
    """Train a run; where a step's memory runs out, go on from the last checkpoint with micro-batches half as large.

    The batch, its randomness and hence the results but for rounding stay the same. A measurement that does not fit,
    which no micro-batch helps, ends the run, and so does memory that runs out on one of several processes.

    Raises:
        OutOfMemoryError: not even one image fits.
        Exception: whatever else ends the run.
    """
    import torch

    options = job.options
    while True:
        try:
            return _train(job, options, should_stop)
        except torch.OutOfMemoryError as error:
            smaller = _halved(options, job.run.config.train.batch_size)
            if smaller is None or not _is_of_a_step(error) or os.environ.get("WORLD_SIZE", "1") != "1":
                raise
            reason = one_line(error)
        gc.collect()
        torch.cuda.empty_cache()  # which does nothing where there is no GPU
        with RunWriter(job.root.run(job.run.run_id)) as writer:
            writer.event(
                "out-of-memory", error=reason, micro_batch=options.micro_batch, retried_with=smaller.micro_batch
            )
        options = smaller


def _train(job: TrainJob, options: RunOptions, should_stop: ShouldStop) -> State:
    from repa_lab.training.loop import train

    directory, listeners, kept = job.root.run(job.run.run_id), trackers(job), frozenset(job.kept)
    return train(job.run, directory, options, job.root.cache, listeners, should_stop, job.fork, kept, job.is_enough)


def _halved(options: RunOptions, batch: int) -> RunOptions | None:
    """With half the micro-batch, which is all of the batch unless it is given; None where there is no half."""
    if options.micro_batch == "auto":  # the trainer has halved it as often as it could
        return None
    size = min(options.micro_batch or batch, batch)
    return options.model_copy(update={"micro_batch": size // 2}) if size > 1 else None


def _is_of_a_step(error: torch.OutOfMemoryError) -> bool:
    from repa_lab.training.trainer import Trainer

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is Trainer.step.__code__ for frame in frames)


class Heartbeat:
    """Passes a question on and leaves a sign of life in the run directory: a scheduler elsewhere looks at nothing but files."""

    def __init__(self, job: TrainJob, should_stop: ShouldStop) -> None:
        self._path, self._should_stop = job.root.run(job.run.run_id).path / HEARTBEAT, should_stop
        self._last = 0.0

    def __call__(self) -> State | None:
        """The answer."""
        now = time.monotonic()
        if now - self._last > _BEAT_S:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            self._last = now
        return self._should_stop()


def trackers(job: TrainJob) -> list[Listener]:
    """The listeners a run's options ask for; they start with the first row, and the journal goes on without one that cannot."""
    from repa_lab.tracking.tensorboard import TensorBoardListener
    from repa_lab.tracking.wandb import WandbListener, resolve_mode

    directory, mode = job.root.run(job.run.run_id), resolve_mode(job.options.wandb.mode)
    listeners: list[Listener] = []
    if mode != "disabled":
        listeners.append(WandbListener(directory, _told(job, mode)))
    if job.options.tensorboard:
        listeners.append(TensorBoardListener(directory, job.run.to_json()))
    return listeners


def _told(job: TrainJob, mode: str) -> WandbRun:
    from repa_lab.report.headline import headline
    from repa_lab.tracking.wandb import WandbRun

    options, config = job.options.wandb, job.run.config
    tags = dict.fromkeys((config.model.family, config.regularizer.type, *options.tags))
    return WandbRun(
        name=job.name,
        group=job.group,
        config=job.run.to_json(),
        project=options.project,
        mode=mode,
        entity=options.entity,
        tags=tuple(tags),
        keeps_weights=options.artifacts == "final",
        headline=partial(headline, _compared(job)),
    )


def _compared(job: TrainJob) -> Compared:
    """What the sweep compares, as it is recorded; a run by itself is of no sweep, and is told what it measures."""
    from repa_lab.report.headline import Compared
    from repa_lab.training.protocol import metric_name

    sweep = job.root.sweep(job.group)
    if (sweep.path / "sweep.json").is_file():
        return Compared.from_manifest(sweep.manifest)
    return Compared(metric_name(job.run.config))


def main() -> None:
    """Serve on the standard streams, under numbers of our own.

    What libraries print goes to standard error. Standard input becomes empty, because a data loader's forked process
    closes it, and would wait for ever for the lock that our reading thread holds on it.
    """
    jobs, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  open for as long as the process is
    os.dup2(sys.stdin.fileno(), 0)
    Worker(jobs, answers).serve()


if __name__ == "__main__":
    main()
