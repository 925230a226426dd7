"""Carries out a sweep's work on an executor, and watches it through the run directories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from repa_lab.runs import RunsRoot, RunWriter, State
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.tail import RowTail
from repa_lab.spec import Arm, RunConfig, RunOptions, SpecError
from repa_lab.sweep.executors import Executor
from repa_lab.sweep.jobs import PrepareJob, Report, TrainJob
from repa_lab.sweep.view import View
from repa_lab.sweep.work import Task, Work

_POLL_S = 0.5


class SweepBrokenError(RuntimeError):
    """The workers cannot work at all."""


@dataclass
class Scheduler:
    """Gives tasks to free slots, passes rows on, and keeps count of failures; imports no torch."""

    executor: Executor
    root: RunsRoot
    options: RunOptions
    group: str
    view: View
    is_rehearsal: bool = False
    _running: dict[str, tuple[Task, RowTail]] = field(default_factory=dict)

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

    def run(self, work: Work) -> dict[str, str]:
        """Do all of the work.

        Returns:
            The one-line reason of every run that failed, by its id.
        """
        failures: dict[str, str] = {}
        while True:
            while self.executor.free() and (task := work.next()):
                self._start(task, work)
            if not self._running:
                return failures
            reports = self.executor.poll(_POLL_S)
            for run_id, (_, tail) in self._running.items():
                self._pass_on(run_id, tail, work)
            for report in reports:
                self._settle(report, work, failures)
            self.view.counts(*work.counts())

    def _start(self, task: Task, work: Work) -> None:
        run_id = task.run.run_id
        directory = self.root.run(run_id)
        tail = RowTail(directory)
        if directory.state.state.is_finished:  # another arm or sweep trained it; a search wants its rows all the same
            self._pass_on(run_id, tail, work)
            work.finished(run_id, directory.state.state)
            return
        self._running[run_id] = (task, tail)
        self.view.started(run_id, task.name, task.run.config.train.steps)
        self.executor.submit(TrainJob(task.run, task.name, self.group, self.options, self.root, self.is_rehearsal))

    def _pass_on(self, run_id: str, tail: RowTail, work: Work) -> None:
        for row in tail.new_rows():
            self.view.row(run_id, row)
            for pruned in work.heard(run_id, row):
                self.executor.stop(pruned, State.PRUNED)

    def _settle(self, report: Report, work: Work, failures: dict[str, str]) -> None:
        if report.kind == "broken":
            raise SweepBrokenError(report.error)
        if report.kind != "finished" or report.run_id is None or report.state is None:
            return
        _, tail = self._running.pop(report.run_id)
        self._pass_on(report.run_id, tail, work)
        if report.state is State.FAILED:
            failures[report.run_id] = report.error or "failed"
            self._record_death(report)
        self.view.finished(report.run_id, report.state, report.error)
        work.finished(report.run_id, report.state)

    def _record_death(self, report: Report) -> None:
        """A worker that was killed could not write its run's end."""
        assert report.run_id
        directory = self.root.run(report.run_id)
        if directory.state.state is State.FAILED:
            return
        try:
            with RunWriter(directory) as writer:
                writer.state(State.FAILED, directory.state.step, report.error)
        except RunBusyError:
            pass  # somebody else has taken the run up

