"""Trains the runs of a sweep on an executor, and watches them through their run directories. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from repa_lab.errors import StateError
from repa_lab.orchestration.executors import (
    HEARTBEAT,
    Executor,
    MessageKind,
    PrepareJob,
    Task,
    TrainJob,
    WorkerMessage,
)
from repa_lab.orchestration.progress import ProgressView
from repa_lab.runs import RunDirectory, RunsRoot, RunWriter, State
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.files import JsonlReader, LinkError, Row
from repa_lab.spec import Arm, RunConfig, RunOptions, SpecError

_POLL_S = 0.5
_EQUAL_FAILURES = 3  # if the first runs all fail for one reason, the others would fail for the same


class SweepBrokenError(StateError):
    """The workers cannot work at all."""


class Work(Protocol):
    """What a scheduler has to do: a fixed list of runs, or a search that asks for new ones.

    Attributes:
        is_divergence_a_result: whether a diverged run counts as a result (in a search) rather than a failure.
    """

    is_divergence_a_result: bool

    def next(self) -> Task | None:
        """Return the next task; None if there is none at present."""
        ...

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """Take in a row that a run wrote; return the ids of the runs to prune because of it."""
        ...

    def finished(self, run_id: str, state: State) -> None:
        """Take in that a run came to rest."""
        ...

    def counts(self) -> tuple[int, int]:
        """Return the number of runs done, and of runs in all as far as is known."""
        ...


@dataclass
class _WatchedRun:
    """A run in hand: its rows so far, and its last sign of life by our clock, for another machine's may be wrong."""

    task: Task
    directory: RunDirectory
    rows: JsonlReader
    tries: int = 1
    is_hung: bool = False
    _mark: int | None = None
    _alive: float | None = None

    def __post_init__(self) -> None:
        self._mark = self._read_mark()

    def silence(self) -> float:
        """Return the seconds since the last sign of life; 0 before the first, for the run may wait in a queue."""
        mark, now = self._read_mark(), time.monotonic()
        if mark != self._mark:
            self._mark, self._alive = mark, now
        return now - self._alive if self._alive is not None else 0.0

    def restarted(self) -> _WatchedRun:
        """Return the run before its first sign of life; its rows go on where they were."""
        return replace(self, is_hung=False, _alive=None)

    def _read_mark(self) -> int | None:
        with suppress(FileNotFoundError):
            return (self.directory.path / HEARTBEAT).stat().st_mtime_ns
        return None


@dataclass
class Scheduler:
    """Gives tasks to free slots, passes rows on, and keeps count of failures.

    Attributes:
        executor: where runs are trained.
        root: the runs root.
        options: the options of the sweep.
        sweep: the name of the sweep.
        view: where progress is shown.
        is_rehearsal: whether every run is interrupted and resumed once.
        trained: after :meth:`run`, the number of runs that were trained now and did not fail.
        failures: after :meth:`run`, the one-line reason of every run that failed, by its id.
        diverged: after :meth:`run`, the reasons of diverged runs that count as results, by their ids.
        stopped: after :meth:`run`, why runs were not started; None if none were left out.
    """

    executor: Executor
    root: RunsRoot
    options: RunOptions
    sweep: str
    view: ProgressView
    is_rehearsal: bool = False
    trained: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    _running: dict[str, _WatchedRun] = field(default_factory=dict)
    _trained_elsewhere: dict[str, _WatchedRun] = field(
        default_factory=dict
    )  # by another process, such as another sweep

    def prepare(self, arms: Mapping[RunConfig, Arm]) -> None:
        """Have a worker fill the caches for these settings, each with an arm that knows the places in the spec.

        Raises:
            SpecError: a setting cannot be met, at its place in the spec.
            SweepBrokenError: the worker died, or failed for another reason.
        """
        configs = tuple(arms)
        self.executor.submit(PrepareJob(configs, self.options, self.root))
        while True:
            for message in self.executor.poll(_POLL_S):
                if message.kind is MessageKind.PROGRESS:
                    self.view.progress(message.activity, message.done, message.total)
                elif message.kind is MessageKind.PREPARED:
                    return
                elif message.kind is MessageKind.REFUSED:
                    raise SpecError([arms[configs[message.config]].problem(message.path, message.error or "")])
                elif message.kind is MessageKind.BROKEN:
                    raise SweepBrokenError(message.error)
            self._heed_stop_request()

    def run(self, work: Work) -> None:
        """Do all of the work, or, after ``run.max_failures`` failures, what has been begun.

        Raises:
            SweepBrokenError: the workers cannot work, or the first runs all failed for the same reason.
        """
        while True:
            if self._has_too_many_failures:
                self._start_no_more(work)
            else:
                self._fill_slots(work)
            if not self._running and not self._trained_elsewhere:
                return
            messages = self.executor.poll(_POLL_S)
            for run in (*self._running.values(), *self._trained_elsewhere.values()):
                self._pass_rows_on(run, work)
            for message in messages:
                self._take_in(message, work)
            self._kill_hung_runs()
            self._heed_stop_request()
            self.view.counts(*work.counts())

    @property
    def _has_free_slot(self) -> bool:
        return len(self._running) < self.executor.slots

    @property
    def _has_too_many_failures(self) -> bool:
        return self.options.max_failures is not None and len(self.failures) >= self.options.max_failures

    def _heed_stop_request(self) -> None:
        """Treat `repa-lab stop` as Ctrl-C from another terminal."""
        if self.root.sweep(self.sweep).stop.exists():
            raise KeyboardInterrupt

    def _fill_slots(self, work: Work) -> None:
        for run_id, run in list(self._trained_elsewhere.items()):
            if self._has_free_slot and not run.directory.is_held:
                del self._trained_elsewhere[run_id]
                self._begin(run.restarted(), work)
        while self._has_free_slot and (task := work.next()):
            reasons = list(self.failures.values())[:_EQUAL_FAILURES]
            if not self.trained and len(reasons) == _EQUAL_FAILURES and len(set(reasons)) == 1:
                raise SweepBrokenError(f"the first {_EQUAL_FAILURES} runs failed alike: {reasons[0]}")
            directory = self.root.run(task.run.run_id)
            self._begin(_WatchedRun(task, directory, directory.metrics_reader()), work)

    def _start_no_more(self, work: Work) -> None:
        if self.stopped is None:
            for run_id in self.executor.withdraw():
                del self._running[run_id]
                self.view.withdrawn(run_id)
            self._trained_elsewhere.clear()
            self.view.say(f"{len(self.failures)} runs failed: no more are started, {len(self._running)} go on")
        done, total = work.counts()
        left = total - done - len(self._running)
        self.stopped = f"{left} runs were not started: run.max_failures is {self.options.max_failures}" if left else ""

    def _begin(self, run: _WatchedRun, work: Work) -> None:
        task, state = run.task, run.directory.state.state
        if state.status.is_final:  # another arm or sweep trained the run; a search needs its rows all the same
            self._pass_rows_on(run, work)
            work.finished(task.run.run_id, state)
            return
        self._running[task.run.run_id] = run
        self.view.started(task.run.run_id, task.name, task.run.config.train.steps)
        self._submit(task)

    def _submit(self, task: Task) -> None:
        self.executor.submit(TrainJob(task, self.sweep, self.options, self.root, self.is_rehearsal))

    def _pass_rows_on(self, run: _WatchedRun, work: Work) -> None:
        for row in run.rows.new_rows():
            self.view.row(run.task.run.run_id, row)
            for pruned in work.heard(run.task.run.run_id, row):
                self.executor.stop(pruned, State.PRUNED)

    def _take_in(self, message: WorkerMessage, work: Work) -> None:
        if message.kind is MessageKind.BROKEN:
            raise SweepBrokenError(message.error)
        run_id = message.run_id
        if run_id is None or run_id not in self._running:
            return
        run = self._running[run_id]
        self._pass_rows_on(run, work)
        if message.kind is MessageKind.BUSY:  # the run is done when the other process is, and ours should it be let go
            self._trained_elsewhere[run_id] = self._running.pop(run_id)
            self.view.withdrawn(run_id)
            self.view.say(f"{run.task.name}: another process trains it; waited for")
            return
        state, error = message.state or State.FAILED, message.error
        if state is State.FAILED:
            if run.is_hung:
                error = f"no sign of life for {self.options.hang_minutes:g} minutes"
                if run.tries == 1:
                    self._record_failure(run.directory, error)
                    self.view.say(f"{run.task.name}: {error}; started again")
                    self._running[run_id] = replace(run.restarted(), tries=2)
                    self._submit(run.task)
                    return
            is_result = work.is_divergence_a_result and message.is_diverged
            (self.diverged if is_result else self.failures)[run_id] = error or "failed"
            self._record_failure(run.directory, error)
        self.trained += state is not State.FAILED
        del self._running[run_id]
        self.view.finished(run_id, state.status, error)
        work.finished(run_id, state)

    def _kill_hung_runs(self) -> None:
        """Kill runs that have been silent for too long; their failures then arrive like those of dead workers."""
        if self.options.hang_minutes is None:
            return
        for run_id, run in self._running.items():
            if not run.is_hung and run.silence() > self.options.hang_minutes * 60:
                run.is_hung = True
                self.executor.kill(run_id)

    def _record_failure(self, directory: RunDirectory, error: str | None) -> None:
        """Record a failure that a killed worker could not; a run that another process trained to its end stays so."""
        if directory.state.state is State.FAILED:
            return
        # Busy: another process has taken the run up. Behind a link: the directory belongs to someone else.
        with suppress(RunBusyError, LinkError), RunWriter(directory) as writer:
            if not directory.state.state.status.is_final:
                writer.state(State.FAILED, directory.state.step, error)
