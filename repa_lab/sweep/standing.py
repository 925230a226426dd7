"""Where the runs of a plan stand, in the words of `plan`: read from run directories, of which nothing is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repa_lab.runs import RunDirectory, RunsRoot, RunState, State, checkpoints
from repa_lab.spec import Problem, StopRule


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        word: ``new``, ``done``, ``stopped`` (by a rule), ``resumable``, ``failed``, ``pruned``, ``blocked`` or ``running`` (in
            another process).
        step: the optimizer step from which it would go on, or that it has reached if it is running.
        reason: of a failure, or why it cannot be trained.
    """

    word: str
    step: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class Orphan:
    """A run that an earlier version of the spec asked for and this one does not; it is listed and never deleted."""

    label: str
    seed: int
    run_id: str
    state: State

    def record(self) -> dict[str, Any]:
        """As plain data for the sweep's manifest."""
        return {"label": self.label, "seed": self.seed, "run_id": self.run_id}


NEW = Standing("new")
STOPPED = State.STOPPED.value


def standing_of(run: RunDirectory, state: RunState, blocked: Problem | None, stop: Sequence[StopRule] = ()) -> Standing:
    """Where a run stands, given its state, what stands in its way, and what ends it early."""
    if state.state.is_finished:
        return Standing(state.state.value, state.step)
    if stop and any(rule.holds(row) for row in run.rows() for rule in stop):
        return Standing(STOPPED, state.step)
    if state.state is State.RUNNING and run.is_held:
        return Standing("running", state.step)
    if blocked:
        return Standing("blocked", reason=blocked.message)
    if state.state is State.NEW and not run.checkpoints.exists():
        return NEW
    step = max(checkpoints.steps(run.checkpoints), default=0)
    if state.state is State.FAILED:
        return Standing("failed", step, state.error)
    return Standing("resumable", step) if step else NEW


def orphans_of(root: RunsRoot, name: str, asked: set[str]) -> tuple[Orphan, ...]:
    """Runs that the sweep's manifest knows from earlier versions of the spec and that are not asked for any more.

    The trials of a search are nobody's orphans: the spec asks for them without naming them.
    """
    directory = root.sweep(name)
    if not (directory.path / "sweep.json").is_file() or directory.manifest.get("search"):
        return ()
    manifest = directory.manifest
    known = [{"label": arm["label"], **run} for arm in manifest["arms"] for run in arm["runs"]] + manifest.get("orphaned", [])
    left = {run["run_id"]: run for run in known if run["run_id"] not in asked}
    found = (Orphan(run["label"], run["seed"], run_id, root.run(run_id).state.state) for run_id, run in left.items())
    return tuple(orphan for orphan in found if orphan.state is not State.NEW)
