"""What a scheduler asks of a worker and what a worker answers, as plain data: one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repa_lab.registry import load_planned, loaded_plugins
from repa_lab.runs import RunsRoot, State
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.files import Row
from repa_lab.runs.forks import Fork
from repa_lab.spec import RunConfig, RunOptions, StopRule
from repa_lab.spec.identity import Run
from repa_lab.training.needs import plugins_of

HEARTBEAT = "heartbeat"  # in a run directory: touched by whoever trains it
FINAL = ("finished", "prepared", "refused", "broken")  # kinds of reports that end a job


@dataclass(frozen=True)
class PrepareJob:
    """Fill the caches for these settings."""

    configs: tuple[RunConfig, ...]
    options: RunOptions
    root: RunsRoot

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        configs = [config.model_dump(mode="json") for config in self.configs]
        return {"kind": "prepare", "configs": configs, **_common(self.options, self.root, self.configs)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PrepareJob:
        """From plain data, the plugins of the scheduler loaded."""
        load_planned(value["plugins"])
        return cls(tuple(RunConfig.model_validate(c) for c in value["configs"]), *_parse_common(value))


@dataclass(frozen=True)
class TrainJob:
    """Train a run; ``name`` is what people call it, ``group`` the sweep it is trained for; a rehearsal stops and
    resumes it.

    ``fork``, ``kept`` and ``stop`` are those of :class:`repa_lab.orchestration.work.Task`.
    """

    run: Run
    name: str
    group: str
    options: RunOptions
    root: RunsRoot
    is_rehearsal: bool = False
    fork: Fork | None = None
    kept: tuple[int, ...] = ()
    stop: tuple[StopRule, ...] = ()

    def is_enough(self, row: Row) -> bool:
        """Whether a measurement ends the run."""
        return any(rule.holds(row) for rule in self.stop)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        run = {"run_id": self.run.run_id, "spec": self.run.to_json(), "name": self.name, "group": self.group}
        shared: dict[str, Any] = {"fork": asdict(self.fork) if self.fork else None, "kept": list(self.kept)}
        shared["stop"] = [rule.model_dump() for rule in self.stop]
        common = _common(self.options, self.root, (self.run.config,))
        return {"kind": "train", "is_rehearsal": self.is_rehearsal, **run, **shared, **common}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainJob:
        """From plain data, the plugins of the scheduler loaded."""
        load_planned(value["plugins"])
        run = Run.from_json(value["run_id"], value["spec"])
        fork = Fork(**value["fork"]) if value["fork"] else None
        kept, stop = tuple(value["kept"]), tuple(StopRule(**rule) for rule in value["stop"])
        return cls(run, value["name"], value["group"], *_parse_common(value), value["is_rehearsal"], fork, kept, stop)


Job = PrepareJob | TrainJob


def parse_job(value: dict[str, Any]) -> Job:
    """A job from plain data."""
    return PrepareJob.from_json(value) if value["kind"] == "prepare" else TrainJob.from_json(value)


@dataclass(frozen=True)
class Report:
    """A worker's answer: ``ready``, ``progress``, ``prepared``, ``refused``, ``broken``, or ``finished`` with a ``state``."""

    kind: str
    run_id: str | None = None
    state: State | None = None
    error: str | None = None
    task: str | None = None
    done: int = 0
    total: int = 0
    arm: int = 0
    path: str = ""

    @property
    def is_busy(self) -> bool:
        """Whether nothing came of a run because another process trains it."""
        return self.state is State.FAILED and (self.error or "").startswith(RunBusyError.__name__)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        """From plain data."""
        state = State(value["state"]) if value["state"] else None
        return cls(**{**value, "state": state})


def _common(options: RunOptions, root: RunsRoot, configs: Iterable[RunConfig]) -> dict[str, Any]:
    files = {origin.file for config in configs for origin in plugins_of(config)}
    plugins = {file: digest for file, digest in loaded_plugins().items() if file in files}
    return {"options": options.model_dump(mode="json"), "root": str(root.path), "plugins": plugins}


def _parse_common(value: dict[str, Any]) -> tuple[RunOptions, RunsRoot]:
    return RunOptions.model_validate(value["options"]), RunsRoot(Path(value["root"]))
