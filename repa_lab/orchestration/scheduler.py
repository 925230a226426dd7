"""Carries out a sweep's work on an executor, and watches it through the run directories."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from repa_lab.orchestration.executors import Executor
from repa_lab.orchestration.jobs import HEARTBEAT, PrepareJob, Report, TrainJob
from repa_lab.orchestration.view import View
from repa_lab.orchestration.work import Task, Work
from repa_lab.runs import RunDirectory, RunsRoot, RunWriter, State
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.state import DIVERGED
from repa_lab.runs.tail import RowTail
from repa_lab.spec import Arm, RunConfig, RunOptions, SpecError

_POLL_S = 0.5
_ALIKE = 3  # so many first failures of one kind, and nothing done: the rest would fail the same way


class SweepBrokenError(RuntimeError):
    """The workers cannot work at all."""


@dataclass
class _Watched:
    """A run in hand: its rows so far, and its last sign of life by our clock, for another machine's may be wrong."""

    task: Task
    directory: RunDirectory
    tail: RowTail
    tries: int = 1
    is_hung: bool = False
    _mark: int | None = None
    _alive: float | None = None

    def __post_init__(self) -> None:
        self._mark = self._read_mark()

    def silence(self) -> float:
        """Seconds since the last sign of life; none pass before the first, for the run may be waiting in a queue."""
        mark, now = self._read_mark(), time.monotonic()
        if mark != self._mark:
            self._mark, self._alive = mark, now
        return now - self._alive if self._alive is not None else 0.0

    def again(self) -> _Watched:
        """The same as one that has yet to give its first sign of life; its rows go on where they were."""
        return replace(self, is_hung=False, _alive=None)

    def _read_mark(self) -> int | None:
        try:
            return (self.directory.path / HEARTBEAT).stat().st_mtime_ns
        except FileNotFoundError:
            return None


@dataclass
class _Failures:
    """The reasons of failures, and when there are too many of them to go on."""

    limit: int | None
    reasons: dict[str, str] = field(default_factory=dict)
    is_any_done: bool = False

    @property
    def too_many(self) -> bool:
        """Whether no further runs shall be started."""
        return self.limit is not None and len(self.reasons) >= self.limit

    def require_hope(self) -> None:
        """Refuse to start another run after the first ones have all failed alike.

        Raises:
            SweepBrokenError: with that reason.
        """
        first = list(self.reasons.values())[:_ALIKE]
        if not self.is_any_done and len(first) == _ALIKE and len(set(first)) == 1:
            raise SweepBrokenError(f"the first {_ALIKE} runs failed alike: {first[0]}")


@dataclass
class Scheduler:
    """Gives tasks to free slots, passes rows on, and keeps count of failures; imports no torch.

    After ``run``, :attr:`stopped` says why runs were left out, if any were, :attr:`found` how many others had trained,
    and :attr:`diverged` why runs diverged whose work was to tell that.
    """

    executor: Executor
    root: RunsRoot
    options: RunOptions
    group: str
    view: View
    is_rehearsal: bool = False
    stopped: str | None = None
    found: int = 0
    diverged: dict[str, str] = field(default_factory=dict)
    _running: dict[str, _Watched] = field(default_factory=dict)
    _elsewhere: dict[str, _Watched] = field(
        default_factory=dict
    )  # another process, such as another sweep's, trains them

    def prepare(self, arms: Mapping[RunConfig, Arm]) -> None:
        """Have a worker fill the caches for these settings, each with an arm that knows its places.

        Raises:
            SpecError: a setting cannot be met, at its place in the spec.
            SweepBrokenError: the worker died of it.
        """
        order = list(arms)
        self.executor.submit(PrepareJob(tuple(order), self.options, self.root))
        while True:
            for report in self.executor.poll(_POLL_S):
                if report.kind == "progress":
                    self.view.progress(report.task or "", report.done, report.total)
                elif report.kind == "prepared":
                    return
                elif report.kind == "refused":
                    raise SpecError([arms[order[report.arm]].problem(report.path, report.error or "")])
                elif report.kind == "broken":
                    raise SweepBrokenError(report.error)
            self._heed_stop()

    def run(self, work: Work) -> dict[str, str]:
        """Do all of the work, or, after ``run.max_failures``, what has been begun.

        Returns:
            The one-line reason of every other run that failed, by its id.

        Raises:
            SweepBrokenError: the workers cannot work, or the first runs all failed for the same reason.
        """
        failures = _Failures(self.options.max_failures)
        while True:
            self._fill(work, failures)
            if not self._running and not self._elsewhere:
                return failures.reasons
            reports = self.executor.poll(_POLL_S)
            for watched in (*self._running.values(), *self._elsewhere.values()):
                self._pass_on(watched, work)
            for report in reports:
                self._settle(report, work, failures)
            self._end_hung()
            self._heed_stop()
            self.view.counts(*work.counts())

    def _heed_stop(self) -> None:
        """`repa-lab stop` is Ctrl-C from another terminal."""
        if self.root.sweep(self.group).is_asked_to_stop:
            raise KeyboardInterrupt

    def _fill(self, work: Work, failures: _Failures) -> None:
        """Start what there is room for, unless too much has failed."""
        if failures.too_many:
            self._start_no_more(work, failures)
            return
        for run_id, watched in list(self._elsewhere.items()):
            if self.executor.free() and not watched.directory.is_held:
                del self._elsewhere[run_id]
                self._begin(watched.again(), work)
        while self.executor.free() and (task := work.next()):
            failures.require_hope()
            directory = self.root.run(task.run.run_id)
            self._begin(_Watched(task, directory, RowTail(directory)), work)

    def _start_no_more(self, work: Work, failures: _Failures) -> None:
        if self.stopped is None:
            for run_id in self.executor.withdraw():
                del self._running[run_id]
                self.view.withdrawn(run_id)
            self._elsewhere.clear()
            self.view.say(f"{len(failures.reasons)} runs failed: no more are started, {len(self._running)} go on")
        done, total = work.counts()
        left = total - done - len(self._running)
        self.stopped = f"{left} runs were not started: run.max_failures is {failures.limit}" if left else ""

    def _begin(self, watched: _Watched, work: Work) -> None:
        task, run_id = watched.task, watched.task.run.run_id
        state = watched.directory.state.state
        if state.status.is_final:  # another arm or sweep trained it; a search wants its rows all the same
            self._pass_on(watched, work)
            self.found += 1
            work.finished(run_id, state)
            return
        self._running[run_id] = watched
        self.view.started(run_id, task.name, task.run.config.train.steps)
        self._submit(task)

    def _submit(self, task: Task) -> None:
        how = (self.options, self.root, self.is_rehearsal, task.fork, task.kept, task.stop)
        self.executor.submit(TrainJob(task.run, task.name, self.group, *how))

    def _pass_on(self, watched: _Watched, work: Work) -> None:
        for row in watched.tail.new_rows():
            self.view.row(watched.task.run.run_id, row)
            for pruned in work.heard(watched.task.run.run_id, row):
                self.executor.stop(pruned, State.PRUNED)

    def _settle(self, report: Report, work: Work, failures: _Failures) -> None:
        if report.kind == "broken":
            raise SweepBrokenError(report.error)
        if report.kind != "finished" or report.run_id not in self._running or report.state is None:
            return
        watched, error = self._running[report.run_id], report.error
        self._pass_on(watched, work)
        if report.state is State.FAILED:
            if report.is_busy:
                self._set_aside(report.run_id)
                return
            if watched.is_hung:
                error = f"no sign of life for {self.options.hang_minutes:g} minutes"
                if watched.tries == 1:
                    self._try_again(watched, error)
                    return
            is_result = work.is_divergence_a_result and (error or "").startswith(DIVERGED)
            (self.diverged if is_result else failures.reasons)[report.run_id] = error or "failed"
            self._record(watched.directory, error)
        failures.is_any_done |= report.state is not State.FAILED
        del self._running[report.run_id]
        self.view.finished(report.run_id, report.state.status, error)
        work.finished(report.run_id, report.state)

    def _end_hung(self) -> None:
        """Kill what has been silent for too long; its report then comes like that of any run that died."""
        if self.options.hang_minutes is None:
            return
        for run_id, watched in self._running.items():
            if not watched.is_hung and watched.silence() > self.options.hang_minutes * 60:
                watched.is_hung = True
                self.executor.kill(run_id)

    def _try_again(self, watched: _Watched, error: str) -> None:
        self._record(watched.directory, error)
        self.view.say(f"{watched.task.name}: {error}; started again")
        self._running[watched.task.run.run_id] = replace(watched.again(), tries=watched.tries + 1)
        self._submit(watched.task)

    def _set_aside(self, run_id: str) -> None:
        """Another process trains a run: it is done when that one is, and ours to go on with should it be let go."""
        watched = self._elsewhere[run_id] = self._running.pop(run_id)
        self.view.withdrawn(run_id)
        self.view.say(f"{watched.task.name}: another process trains it; waited for")

    def _record(self, directory: RunDirectory, error: str | None) -> None:
        """A worker that was killed could not write its run's end; what another process has trained to its end stays so."""
        if directory.state.state is State.FAILED:
            return
        try:
            with RunWriter(directory) as writer:
                if not directory.state.state.status.is_final:
                    writer.state(State.FAILED, directory.state.step, error)
        except RunBusyError:
            pass  # somebody else has taken the run up
