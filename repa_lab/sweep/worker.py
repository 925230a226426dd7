"""A worker: one process that trains one run after another, so that libraries are imported once.

It reads jobs from standard input and answers on standard output, a JSON object a line. When the input ends, because the
scheduler is gone for whatever reason, the run in hand is checkpointed and the process ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from repa_lab.runs import State
from repa_lab.sweep.jobs import PrepareJob, Report, TrainJob
from repa_lab.tracking import Listener

_GRACE_S = 60.0


class Worker:
    """Serves jobs until its input ends."""

    def __init__(self, jobs: TextIO, answers: TextIO) -> None:
        self._input, self._answers = jobs, answers
        self._jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stop: State | None = None

    def serve(self) -> None:
        """Answer every job in turn."""
        threading.Thread(target=self._read, daemon=True).start()
        import repa_lab.sweep.prepare
        import repa_lab.training.loop  # noqa: F401  imported before the first job, while the scheduler does something else

        self._answer(Report("ready"))
        while (job := self._jobs.get()) is not None:
            self._stop = None
            if job["kind"] == "prepare":
                self._prepare(PrepareJob.from_json(job))
            else:
                self._train(TrainJob.from_json(job))

    def _read(self) -> None:
        for line in self._input:
            message = json.loads(line)
            if message["kind"] == "stop":
                self._stop = State(message["state"])
            else:
                self._jobs.put(message)
        self._stop = State.INTERRUPTED
        self._jobs.put(None)
        threading.Timer(_GRACE_S, os._exit, [75]).start()

    def _prepare(self, job: PrepareJob) -> None:
        from repa_lab.sweep.prepare import RefusedError, prepare

        def announce(task: str) -> Any:
            return lambda done, total: self._answer(Report("progress", task=task, done=done, total=total))

        try:
            prepare(job.configs, job.options, job.root.cache, announce)
            self._answer(Report("prepared"))
        except RefusedError as refusal:
            self._answer(Report("refused", arm=refusal.arm, path=refusal.path, error=refusal.message))
        except Exception as error:
            traceback.print_exc()
            self._answer(Report("broken", error=_one_line(error)))

    def _train(self, job: TrainJob) -> None:
        from repa_lab.training.loop import train

        directory = job.root.run(job.run.run_id)
        error: str | None = None
        try:
            listeners = trackers(job)
            if job.is_rehearsal:  # stopped after its first step, so that what follows takes it up from a checkpoint
                train(job.run, directory, job.options, job.root.cache, listeners, lambda: self._stop or State.INTERRUPTED)
            state = self._stop or train(job.run, directory, job.options, job.root.cache, listeners, lambda: self._stop)
        except Exception as failure:
            traceback.print_exc()
            state, error = State.FAILED, _one_line(failure)
        self._answer(Report("finished", run_id=job.run.run_id, state=state, error=error))

    def _answer(self, report: Report) -> None:
        self._answers.write(json.dumps(report.to_json()) + "\n")
        self._answers.flush()


def trackers(job: TrainJob) -> list[Listener]:
    """The listeners a run's options ask for; W&B starts with the first row, and the journal goes on without it if it cannot."""
    from repa_lab.tracking.wandb import WandbListener, resolve_mode

    options = job.options.wandb
    mode = resolve_mode(options.mode)
    if mode == "disabled":
        return []
    return [WandbListener(job.root.run(job.run.run_id), job.name, job.group, job.run.to_json(), options.project, mode)]


def main() -> None:
    """Serve on the standard streams, under numbers of our own.

    What libraries print goes to standard error. Standard input becomes empty, because a data loader's forked process closes
    it, and would wait for ever for the lock that our reading thread holds on it.
    """
    jobs, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  open for as long as the process is
    os.dup2(sys.stdin.fileno(), 0)
    Worker(jobs, answers).serve()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
