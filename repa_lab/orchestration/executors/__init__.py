"""Where runs are trained: the interface of executors, the jobs that they take, and the messages of their workers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, TypeAdapter

from repa_lab.errors import InputError
from repa_lab.registry import load_planned, loaded_plugins
from repa_lab.runs import RunsRoot, State
from repa_lab.runs.checkpoints import Fork
from repa_lab.runs.files import Row
from repa_lab.spec import RunConfig, RunOptions, StopRule
from repa_lab.spec.identity import Run
from repa_lab.training.resolve import plugins_of

HEARTBEAT = "heartbeat"  # a file in a run directory that the process training the run touches

_Root = Annotated[
    InstanceOf[RunsRoot],
    BeforeValidator(lambda value: RunsRoot(Path(value)) if isinstance(value, str) else value),
    PlainSerializer(lambda root: str(root.path)),
]


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
    root: _Root
    kind: Literal["prepare"] = "prepare"

    @property
    def name(self) -> str:
        """What tells the jobs of a sweep apart."""
        return "prepare"


@dataclass(frozen=True)
class TrainJob:
    """Train a run for a sweep; a rehearsal interrupts the run after its first step and resumes it."""

    task: Task
    sweep: str
    options: RunOptions
    root: _Root
    is_rehearsal: bool = False
    kind: Literal["train"] = "train"

    @property
    def name(self) -> str:
        """What tells the jobs of a sweep apart: the run's id."""
        return self.task.run.run_id


Job = PrepareJob | TrainJob


class MessageKind(StrEnum):
    """What a worker says.

    Attributes:
        PROGRESS: preparing went on.
        PREPARED: the caches are filled.
        REFUSED: a setting cannot be met.
        BROKEN: the worker, or preparing, failed for a reason that is not in the spec.
        FINISHED: a run came to rest.
        BUSY: another process trains the run.
    """

    PROGRESS = "progress"
    PREPARED = "prepared"
    REFUSED = "refused"
    BROKEN = "broken"
    FINISHED = "finished"
    BUSY = "busy"

    @property
    def ends_job(self) -> bool:
        """Whether the worker is free again."""
        return self is not MessageKind.PROGRESS


@dataclass(frozen=True)
class WorkerMessage:
    """What a worker says to its scheduler.

    Attributes:
        kind: which of the following fields are set.
        run_id: of FINISHED and BUSY, the run.
        state: of FINISHED, the state in which the run came to rest.
        is_diverged: of FINISHED, whether the run failed because its loss or its samples were no longer finite.
        error: of FINISHED, REFUSED and BROKEN, the reason in one line.
        activity: of PROGRESS, what is being cached.
        done: of PROGRESS, the number of images that are cached.
        total: of PROGRESS, the number of images in all.
        config: of REFUSED, the index of the first settings of the job at fault.
        path: of REFUSED, the dotted path of the setting at fault.
    """

    kind: MessageKind
    run_id: str | None = None
    state: State | None = None
    is_diverged: bool = False
    error: str | None = None
    activity: str = ""
    done: int = 0
    total: int = 0
    config: int = 0
    path: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether nothing came of a run."""
        return self.kind is MessageKind.BUSY or self.state is State.FAILED

    @classmethod
    def failure(cls, job: Job, error: str, is_diverged: bool = False) -> WorkerMessage:
        """Return the last message of a job that failed."""
        if isinstance(job, PrepareJob):
            return cls(MessageKind.BROKEN, error=error)
        return cls(MessageKind.FINISHED, job.name, State.FAILED, is_diverged, error)


@functools.cache
def _jobs() -> TypeAdapter[Job]:
    return TypeAdapter(Annotated[Job, Field(discriminator="kind")])


@functools.cache
def _messages() -> TypeAdapter[WorkerMessage]:
    return TypeAdapter(WorkerMessage)


def dump_job(job: Job) -> dict[str, Any]:
    """Return a job as plain data, with the digests of the plugin files that it needs."""
    configs = job.configs if isinstance(job, PrepareJob) else (job.task.run.config,)
    needed = {origin.file for config in configs for origin in plugins_of(config)}
    plugins = {file: digest for file, digest in loaded_plugins().items() if file in needed}
    return {**_jobs().dump_python(job, mode="json"), "plugins": plugins}


def parse_job(value: Mapping[str, Any]) -> Job:
    """Return the job that :func:`dump_job` wrote, its plugins loaded.

    Raises:
        PluginError: a plugin file has changed since the sweep was planned, or cannot be loaded.
    """
    load_planned(value["plugins"])
    return _jobs().validate_python({name: field for name, field in value.items() if name != "plugins"})


def dump_message(message: WorkerMessage) -> dict[str, Any]:
    """Return a message as plain data."""
    value: dict[str, Any] = _messages().dump_python(message, mode="json")
    return value


def parse_message(value: Mapping[str, Any]) -> WorkerMessage:
    """Return the message that :func:`dump_message` wrote."""
    return _messages().validate_python(value)


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
