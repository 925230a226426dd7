"""Runs of a sweep with a common beginning: found from their schedules, and trained once.

Two runs of one seed take the same steps for as long as their regularizers have the same weight, if all else is equal: a
cutoff, the end of a decay, its final weight and the length of training act from some step on. The later run is forked
from the earlier run's checkpoint at that step, and ends bit for bit as if it had been trained by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from repa_lab.align.settings import Schedule, agreement
from repa_lab.orchestration.executors import Task
from repa_lab.runs import RunsRoot, State, checkpoints
from repa_lab.runs.checkpoints import Fork, forkable_steps
from repa_lab.runs.files import Row
from repa_lab.spec import RunConfig
from repa_lab.spec.identity import Run

# The fields of a schedule that fix the weight beforehand; the other fields act by what is measured.
_SHAPE = ("type", "end", "warmup_steps", "decay_steps", "cutoff_step", "power")


@dataclass(frozen=True)
class Sharing:
    """The beginnings that runs share.

    Attributes:
        forks: where each run begins that does not begin at its first step, by the run's id.
        asked: optimizer steps of the runs that are left, each trained by itself.
        trained: optimizer steps that have to be trained for them.
    """

    forks: Mapping[str, Fork]
    asked: int
    trained: int


def share(left: Iterable[Run], done: Iterable[Run], root: RunsRoot) -> Sharing:
    """Find the beginnings that runs share with each other and with finished runs.

    Args:
        done: finished runs, of which checkpoints may be left.
    """
    groups: dict[str, _Group] = {}
    for run in done:
        trajectory = _Trajectory(run, tuple(checkpoints.steps(root.run(run.run_id).checkpoints)))
        groups.setdefault(_group_key(run), _Group()).begun.append(trajectory)
    asked = trained = 0
    for run in left:
        group, begun = groups.setdefault(_group_key(run), _Group()), root.run(run.run_id).checkpoint_step
        asked += run.config.train.steps - begun
        if begun:
            group.begun.append(_Trajectory(run, None))
            trained += run.config.train.steps - begun
        else:
            group.new.append(_Trajectory(run, None))
    forks: dict[str, Fork] = {}
    for group in groups.values():
        for trajectory, fork in group.tree():
            trained += trajectory.steps - (fork.step if fork else 0)
            forks |= {trajectory.run.run_id: fork} if fork else {}
    return Sharing(forks, asked, trained)


class RunList:
    """A fixed list of runs as a scheduler's work; a run with a fork waits for the checkpoint that it begins from.

    Args:
        tasks: the runs, in order.
        forks: where runs begin, by their ids.
    """

    is_divergence_a_result = False

    def __init__(self, tasks: Iterable[Task], root: RunsRoot, forks: Mapping[str, Fork] | None = None) -> None:
        self._root, self._forks = root, dict(forks or {})
        self._children: dict[str, set[str]] = {}
        kept: dict[str, set[int]] = {}
        for run_id, fork in self._forks.items():
            self._children.setdefault(fork.parent, set()).add(run_id)
            kept.setdefault(fork.parent, set()).add(fork.step)
        waiting = {
            (run_id := task.run.run_id): replace(
                task, fork=self._forks.get(run_id), kept_steps=tuple(sorted(kept.get(run_id, ())))
            )
            for task in tasks
        }
        self._waiting = dict(sorted(waiting.items(), key=lambda item: item[0] in self._forks))  # forks wait longest
        self._running: set[str] = set()
        self._total, self._done = len(self._waiting), 0

    def next(self) -> Task | None:
        """Return the next task whose beginning is there, or will never be; None if there is none at present."""
        for run_id in self._waiting:
            if self._is_ready(run_id):
                self._running.add(run_id)
                return self._waiting.pop(run_id)
        return None

    def heard(self, run_id: str, row: Row) -> Sequence[str]:
        """Return nothing: a fixed list prunes no runs."""
        return ()

    def finished(self, run_id: str, state: State) -> None:
        """Take in that a run came to rest; delete kept checkpoints once all runs that begin from them are done."""
        self._running.discard(run_id)
        self._done += 1
        for parent, children in self._children.items():
            if state in (State.DONE, State.STOPPED):
                children.discard(run_id)
            if not children:
                run = self._root.run(parent)
                if not run.links:
                    checkpoints.clear(run.forks)

    def counts(self) -> tuple[int, int]:
        """Return the number of runs done, and of runs in all."""
        return self._done, self._total

    def _is_ready(self, run_id: str) -> bool:
        fork = self._forks.get(run_id)
        if fork is None or fork.step in forkable_steps(self._root.run(fork.parent)):
            return True
        return fork.parent not in self._running and fork.parent not in self._waiting  # the parent failed


@dataclass(frozen=True)
class _Trajectory:
    """A run, and the steps at which its state can be had: all of them while the run is yet to be trained (None)."""

    run: Run
    kept: tuple[int, ...] | None

    @property
    def steps(self) -> int:
        return self.run.config.train.steps

    def shared(self, other: _Trajectory) -> int:
        """Return the number of first steps of ``other`` that this run can give it."""
        steps = min(self.steps, other.steps)
        pairs = zip(_schedules(self.run.config), _schedules(other.run.config), strict=True)
        common = min((agreement(*pair, steps) for pair in pairs), default=steps)
        if common == other.steps and not self._measures_end_of(other):
            common -= 1
        return common if self.kept is None else max((step for step in self.kept if step <= common), default=0)

    def _measures_end_of(self, other: _Trajectory) -> bool:
        """Return whether this run measures what ``other`` measures at its last step; a fork measures nothing there."""
        last, ours, theirs = other.steps, self.run.config, other.run.config
        is_measured = last == self.steps or last % ours.evaluate.every == 0
        return is_measured and (last in ours.milestones or last not in theirs.milestones)


@dataclass
class _Group:
    """Runs that differ in nothing but the weight over the steps and the number of steps."""

    begun: list[_Trajectory] = field(default_factory=list)
    new: list[_Trajectory] = field(default_factory=list)

    def tree(self) -> list[tuple[_Trajectory, Fork | None]]:
        """Return the new runs, parents first, each with the fork that shares the most steps.

        A common beginning is of a length that obeys ``shared(a, c) >= min(shared(a, b), shared(b, c))``, so taking the
        longest at every turn (Prim's algorithm) leaves the fewest steps to train.
        """
        left = sorted(self.new, key=lambda run: -run.steps)
        best: dict[str, Fork] = {}

        def offer(parent: _Trajectory) -> None:
            for child in left:
                step, known = parent.shared(child), best.get(child.run.run_id)
                if step > (known.step if known else 0):
                    best[child.run.run_id] = Fork(parent.run.run_id, step)

        for parent in self.begun:
            offer(parent)
        order: list[tuple[_Trajectory, Fork | None]] = []
        while left:
            taken = max(left, key=lambda run: best[run.run.run_id].step if run.run.run_id in best else 0)
            left.remove(taken)
            order.append((taken, best.get(taken.run.run_id)))
            offer(taken)
        return order


def _group_key(run: Run) -> str:
    """Return a key that is equal for runs whose first steps may be identical.

    The key has the weight in the first two steps: a single step, which all runs that warm up share, is not worth a
    checkpoint.
    """
    starts = [schedule(step) for schedule in _schedules(run.config) for step in (0, 1)]
    value = run.config.model_dump(mode="json")
    if not run.config.train.lr_schedule.depends_on_length():
        del value["train"]["steps"]
    value["regularizer"] = [settings.model_dump(mode="json") for settings in run.config.regularizers]
    for section in value["regularizer"]:
        section.pop("weight", None)
        for name in _SHAPE:
            section.get("schedule", {}).pop(name, None)
    return json.dumps([run.seed, value, starts], sort_keys=True)


def _schedules(config: RunConfig) -> list[Schedule]:
    return [Schedule.of(settings, config.train.steps) for settings in config.regularizers]
