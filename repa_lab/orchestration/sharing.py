"""Runs of a sweep with a common beginning: found from their schedules, and trained once.

Two runs of one seed take the same steps for as long as their regularizers have the same weight, if all else is equal: a
cutoff, the end of a decay, its final weight and the length of training act from some step on. The later run is forked
from the earlier run's checkpoint at that step, and ends bit for bit as if it had been trained by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from repa_lab.align.settings import Schedule, agreement
from repa_lab.orchestration.scheduler import Task
from repa_lab.runs import RunsRoot, State, checkpoints
from repa_lab.runs.checkpoints import Fork, forkable_steps
from repa_lab.runs.files import Row
from repa_lab.spec import RunConfig
from repa_lab.spec.identity import Run

# The fields of a schedule that fix the weight beforehand; the other fields act by what is measured.
_SHAPE = ("type", "end", "warmup_steps", "decay_steps", "cutoff_step", "power")


def share(left: Iterable[Run], done: Sequence[Run], root: RunsRoot) -> dict[str, Fork]:
    """Return where runs begin that share their first steps with each other or with finished runs, by the run's id.

    Args:
        done: finished runs, of which checkpoints may be left.
    """
    kept = {run.run_id: checkpoints.steps(root.run(run.run_id).checkpoints) for run in done}
    groups: dict[str, list[Run]] = {}
    for run in (*done, *left):
        groups.setdefault(_group_key(run), []).append(run)
    forks: dict[str, Fork] = {}
    for runs in groups.values():
        begun = [run for run in runs if run.run_id in kept or root.run(run.run_id).checkpoint_step]
        forks |= _forks(begun, [run for run in runs if run not in begun], kept)
    return forks


def _forks(begun: list[Run], new: list[Run], kept: Mapping[str, Sequence[int]]) -> dict[str, Fork]:
    """Return the fork that shares the most steps, for each new run that shares any.

    A common beginning is of a length that obeys ``shared(a, c) >= min(shared(a, b), shared(b, c))``, so taking the
    longest at every turn (Prim's algorithm) leaves the fewest steps to train.
    """
    best: dict[str, Fork] = {}
    parents, left = begun, sorted(new, key=lambda run: -run.config.train.steps)
    while left:
        for parent in parents:
            for child in left:
                step, known = _shared(parent, child, kept.get(parent.run_id)), best.get(child.run_id)
                if step > (known.step if known else 0):
                    best[child.run_id] = Fork(parent.run_id, step)
        taken = max(left, key=lambda run: best[run.run_id].step if run.run_id in best else 0)
        left.remove(taken)
        parents = [taken]
    return best


def _shared(parent: Run, child: Run, kept: Sequence[int] | None) -> int:
    """Return the number of first steps of a run that another one can give it.

    Args:
        kept: the steps of the parent's checkpoints; None while the parent is yet to be trained, which keeps any step.
    """
    ours, theirs, last = parent.config, child.config, child.config.train.steps
    steps = min(ours.train.steps, last)
    pairs = zip(_schedules(ours), _schedules(theirs), strict=True)
    common = min((agreement(*pair, steps) for pair in pairs), default=steps)
    if common == last:  # a fork measures nothing at its last step: the parent has to have measured the same there
        is_measured = last == ours.train.steps or last % ours.evaluate.every == 0
        common -= not (is_measured and (last in ours.milestones or last not in theirs.milestones))
    return common if kept is None else max((step for step in kept if step <= common), default=0)


class RunList:
    """A fixed list of runs as a scheduler's work; a run with a fork waits for the checkpoint that it begins from.

    Args:
        tasks: the runs, in order.
        forks: where runs begin, by their ids.
    """

    is_divergence_a_result = False

    def __init__(self, tasks: Iterable[Task], root: RunsRoot, forks: Mapping[str, Fork] | None = None) -> None:
        self._root, forks = root, forks or {}
        self._children: dict[str, set[str]] = {}
        for run_id, fork in forks.items():
            self._children.setdefault(fork.parent, set()).add(run_id)
        self._waiting: dict[str, Task] = {}
        for task in sorted(tasks, key=lambda task: task.run.run_id in forks):  # forks wait longest
            run_id = task.run.run_id
            kept = {forks[child].step for child in self._children.get(run_id, ())}
            self._waiting[run_id] = replace(task, fork=forks.get(run_id), kept_steps=tuple(sorted(kept)))
        self._running: set[str] = set()
        self._total, self._done = len(self._waiting), 0

    def next(self) -> Task | None:
        """Return the next task whose beginning is there, or will never be; None if there is none at present."""
        for run_id, task in self._waiting.items():
            if self._is_ready(task.fork):
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

    def _is_ready(self, fork: Fork | None) -> bool:
        if fork is None or fork.step in forkable_steps(self._root.run(fork.parent)):
            return True
        return fork.parent not in self._running and fork.parent not in self._waiting  # the parent failed


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
