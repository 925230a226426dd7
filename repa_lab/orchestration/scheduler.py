"""Trains the runs of a sweep on an executor, and watches them through their run directories. Imports no torch.

The scheduler gives an executor jobs; the executor's workers, in other processes and on other machines, answer with
messages.
"""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from repa_lab.errors import InputError, StateError
from repa_lab.registry import load_planned, loaded_plugins
from repa_lab.runs import RunDirectory, RunsRoot, RunWriter, State
from repa_lab.runs.checkpoints import Fork
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.files import JsonlReader, LinkError, Row
from repa_lab.spec import Arm, RunConfig, RunOptions, SpecError, StopRule
from repa_lab.spec.identity import Run
from repa_lab.training.resolve import plugins_of

if TYPE_CHECKING:
    from repa_lab.orchestration.progress import ProgressView

HEARTBEAT = "heartbeat"  # a file in a run directory that the process training the run touches
_POLL_S = 0.5
_EQUAL_FAILURES = 3  # if the first runs all fail for one reason, the others would fail for the same


# ---- what is asked of workers


@dataclass(frozen=True)
class Task:
    """A run to train.

    Attributes:
        run: the run.
        name: what people call the run.
        fork: the checkpoint of another run that this run begins from, if they share their first steps.
        kept_steps: steps whose checkpoints are kept for runs that begin from them.
        stop: the rules that end the run early, with metrics by their full names.
    """

    run: Run
    name: str
    fork: Fork | None = None
    kept_steps: tuple[int, ...] = ()
    stop: tuple[StopRule, ...] = ()

    def is_enough(self, row: Row) -> bool:
        """Return whether a stop rule ends the run at this measurement."""
        return any(rule.holds(row) for rule in self.stop)


@dataclass(frozen=True)
class PrepareJob:
    """Fill the caches that runs with these settings share."""

    configs: tuple[RunConfig, ...]
    options: RunOptions
    root: RunsRoot
    name = "prepare"


@dataclass(frozen=True)
class TrainJob:
    """Train a run for a sweep; a rehearsal interrupts the run after its first step and resumes it."""

    task: Task
    sweep: str
    options: RunOptions
    root: RunsRoot
    is_rehearsal: bool = False

    @property
    def name(self) -> str:
        """What tells the jobs of a sweep apart: the run's id."""
        return self.task.run.run_id

    @property
    def directory(self) -> RunDirectory:
        """The run's directory."""
        return self.root.run(self.name)


Job = PrepareJob | TrainJob


@dataclass(frozen=True)
class PackedJob:
    """A job on its way to another process, where the plugins that it needs are loaded before the job can be read.

    Attributes:
        name: the job's name.
        plugins: SHA-256 of every plugin file that the job needs.
        content: the job, pickled.
    """

    name: str
    plugins: Mapping[str, str]
    content: bytes

    @classmethod
    def of(cls, job: Job) -> PackedJob:
        """Pack a job."""
        configs = job.configs if isinstance(job, PrepareJob) else (job.task.run.config,)
        needed = {origin.file for config in configs for origin in plugins_of(config)}
        plugins = {file: digest for file, digest in loaded_plugins().items() if file in needed}
        return cls(job.name, plugins, pickle.dumps(job))

    def unpacked(self) -> Job:
        """Load the plugins and return the job.

        Raises:
            PluginError: a plugin file has changed since the sweep was planned, or cannot be loaded.
        """
        load_planned(self.plugins)
        job: Job = pickle.loads(self.content)
        return job


# ---- what workers answer


class MessageKind(StrEnum):
    """What a worker says of its job; all but PROGRESS end the job."""

    PROGRESS = "progress"  # preparing went on
    PREPARED = "prepared"  # the caches are filled
    REFUSED = "refused"  # a setting cannot be met
    FINISHED = "finished"  # the run came to rest
    BUSY = "busy"  # another process trains the run
    FAILED = "failed"  # an error ended the job, or the worker


@dataclass(frozen=True)
class WorkerMessage:
    """What a worker says to its scheduler.

    Attributes:
        kind: which of the following fields are set.
        job: the job's name.
        error: of FAILED and REFUSED, the reason in one line.
        is_diverged: of FAILED, whether the loss or the samples were no longer finite.
        state: of FINISHED, the state in which the run came to rest.
        activity, done, total: of PROGRESS, what is being cached, and the number of images so far and in all.
        config: of REFUSED, the index of the first settings of the job at fault.
        path: of REFUSED, the dotted path of the setting at fault.
    """

    kind: MessageKind
    job: str
    error: str = ""
    is_diverged: bool = False
    state: State = State.FAILED
    activity: str = ""
    done: int = 0
    total: int = 0
    config: int = 0
    path: str = ""


# ---- where runs are trained


class ExecutorError(InputError):
    """An executor cannot be opened; :attr:`field` is the option at fault, below ``run``."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class Executor(ABC):
    """Takes a job for each slot; :meth:`poll` returns what the workers say.

    Attributes:
        slots: the number of jobs that can be in hand at a time.
    """

    slots: int

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Give a free slot a job."""

    @abstractmethod
    def stop(self, run_id: str, state: State) -> None:
        """Ask for a run to end after its present step, with a checkpoint, in this state."""

    @abstractmethod
    def kill(self, run_id: str) -> None:
        """End a run at once, whatever it does; :meth:`poll` then returns its failure."""

    def withdraw(self) -> list[str]:
        """Take back the jobs that only wait in a queue, if there is one; return the ids of their runs."""
        return []

    @abstractmethod
    def poll(self, timeout: float) -> list[WorkerMessage]:
        """Return what the workers have said, waiting up to ``timeout`` seconds for a first message."""

    @abstractmethod
    def close(self) -> None:
        """Let the slots go; runs in hand are checkpointed first."""


# ---- the scheduler


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
    hangs: int = 0
    is_hung: bool = False
    _mark: int | None = None
    _alive: float | None = None

    def begin(self) -> None:
        """Wait for a first sign of life."""
        self.is_hung, self._mark, self._alive = False, self._read_mark(), None

    def silence(self) -> float:
        """Return the seconds since the last sign of life; 0 before the first, for the run may wait in a queue."""
        mark, now = self._read_mark(), time.monotonic()
        if mark != self._mark:
            self._mark, self._alive = mark, now
        return now - self._alive if self._alive is not None else 0.0

    def _read_mark(self) -> int | None:
        with suppress(FileNotFoundError):
            return (self.directory.path / HEARTBEAT).stat().st_mtime_ns
        return None


@dataclass
class Scheduler:
    """Gives tasks to free slots, passes rows on, and keeps count of failures.

    Attributes:
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
    _elsewhere: dict[str, _WatchedRun] = field(default_factory=dict)  # another process, such as a sweep, trains these

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
                elif message.kind is MessageKind.REFUSED:
                    raise SpecError([arms[configs[message.config]].problem(message.path, message.error)])
                elif message.kind is MessageKind.FAILED:
                    raise SweepBrokenError(message.error)
                else:
                    return
            self._heed_stop_request()

    def run(self, work: Work) -> None:
        """Do all of the work, or, after ``run.max_failures`` failures, what has been begun.

        Raises:
            SweepBrokenError: the first runs all failed for the same reason.
        """
        while True:
            if self.options.max_failures is not None and len(self.failures) >= self.options.max_failures:
                self._start_no_more(work)
            else:
                self._fill_slots(work)
            if not self._running and not self._elsewhere:
                return
            messages = self.executor.poll(_POLL_S)
            for run in (*self._running.values(), *self._elsewhere.values()):
                self._pass_rows_on(run, work)
            for message in messages:
                self._take_in(message, work)
            self._kill_hung_runs()
            self._heed_stop_request()
            self.view.counts(*work.counts())

    @property
    def _has_free_slot(self) -> bool:
        return len(self._running) < self.executor.slots

    def _heed_stop_request(self) -> None:
        """Treat `repa-lab stop` as Ctrl-C from another terminal."""
        if self.root.sweep(self.sweep).stop.exists():
            raise KeyboardInterrupt

    def _fill_slots(self, work: Work) -> None:
        for run_id, run in list(self._elsewhere.items()):
            if self._has_free_slot and not run.directory.is_held:
                del self._elsewhere[run_id]
                self._begin(run, work)
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
            self._elsewhere.clear()
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
        self._submit(run)

    def _submit(self, run: _WatchedRun) -> None:
        run.begin()
        self.executor.submit(TrainJob(run.task, self.sweep, self.options, self.root, self.is_rehearsal))

    def _pass_rows_on(self, run: _WatchedRun, work: Work) -> None:
        for row in run.rows.new_rows():
            self.view.row(run.task.run.run_id, row)
            for pruned in work.heard(run.task.run.run_id, row):
                self.executor.stop(pruned, State.PRUNED)

    def _take_in(self, message: WorkerMessage, work: Work) -> None:
        run_id, error = message.job, message.error
        if (run := self._running.pop(run_id, None)) is None:
            return
        self._pass_rows_on(run, work)
        if message.kind is MessageKind.BUSY:  # the run is done when the other process is, and ours should it be let go
            self._elsewhere[run_id] = run
            self.view.withdrawn(run_id)
            self.view.say(f"{run.task.name}: another process trains it; waited for")
            return
        if message.kind is MessageKind.FAILED:
            if run.is_hung:
                error = f"no sign of life for {self.options.hang_minutes:g} minutes"
            self._record_failure(run.directory, error)
            run.hangs += run.is_hung
            if run.is_hung and run.hangs == 1:
                self.view.say(f"{run.task.name}: {error}; started again")
                self._running[run_id] = run
                self._submit(run)
                return
            is_result = work.is_divergence_a_result and message.is_diverged
            (self.diverged if is_result else self.failures)[run_id] = error
        self.trained += message.kind is not MessageKind.FAILED
        self.view.finished(run_id, message.state.status, error or None)
        work.finished(run_id, message.state)

    def _kill_hung_runs(self) -> None:
        """Kill runs that have been silent for too long; their failures then arrive like those of dead workers."""
        if self.options.hang_minutes is None:
            return
        for run_id, run in self._running.items():
            if not run.is_hung and run.silence() > self.options.hang_minutes * 60:
                run.is_hung = True
                self.executor.kill(run_id)

    def _record_failure(self, directory: RunDirectory, error: str) -> None:
        """Record a failure that a killed worker could not; a run that another process trained to its end stays so."""
        if directory.state.state is State.FAILED:
            return
        # Busy: another process has taken the run up. Behind a link: the directory belongs to someone else.
        with suppress(RunBusyError, LinkError), RunWriter(directory) as writer:
            if not directory.state.state.status.is_final:
                writer.state(State.FAILED, directory.state.step, error)
