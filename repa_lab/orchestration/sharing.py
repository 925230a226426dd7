"""Which runs of a sweep have a beginning in common, and the work of training it once.

Two runs of one seed take the same steps for as long as their regularizers have the same weight, if all else is equal: a
cutoff, the end of a decay, its final weight and the length of training act from some step on. The later run is forked
from the earlier one's checkpoint there, and ends bit for bit as if it had been trained by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from repa_lab.align.schedule import Schedule, agreement
from repa_lab.orchestration.work import Task
from repa_lab.runs import RunsRoot, State, checkpoints
from repa_lab.runs.files import Row
from repa_lab.runs.forks import Fork, available, clear
from repa_lab.spec import RunConfig
from repa_lab.spec.identity import Run

# The fields of a schedule that say the weight beforehand; the others act by what is measured.
_SHAPE = ("type", "end", "warmup_steps", "decay_steps", "cutoff_step", "power")


@dataclass(frozen=True)
class Sharing:
    """What is shared.

    Attributes:
        forks: where a run begins that does not begin at its first step, by its id.
        asked: steps of the runs that are left, each by itself.
        trained: steps that have to be trained for them.
    """

    forks: Mapping[str, Fork]
    asked: int
    trained: int


def share(left: Iterable[Run], done: Iterable[Run], root: RunsRoot) -> Sharing:
    """Find the beginnings that runs have in common with each other and with runs that are done.

    Args:
        left: runs to train.
        done: finished runs, of which checkpoints may be left.
        root: where runs live.
    """
    groups: dict[str, _Group] = {}
    for run in done:
        _group(groups, run).trained.append(_Trajectory(run, tuple(checkpoints.steps(root.run(run.run_id).checkpoints))))
    asked = trained = 0
    for run in left:
        begun = max(checkpoints.steps(root.run(run.run_id).checkpoints), default=0)
        asked += run.config.train.steps - begun
        if begun:
            _group(groups, run).trained.append(_Trajectory(run, None))
            trained += run.config.train.steps - begun
        else:
            _group(groups, run).waiting.append(_Trajectory(run, None))
    forks: dict[str, Fork] = {}
    for group in groups.values():
        for trajectory, fork in group.tree():
            trained += trajectory.steps - (fork.step if fork else 0)
            forks |= {trajectory.run.run_id: fork} if fork else {}
    return Sharing(forks, asked, trained)


class SharedWork:
    """A list of tasks of which some wait for the beginning that they share; see
    :class:`repa_lab.orchestration.work.Work`.

    Args:
        tasks: in order.
        forks: where they begin.
        root: where runs live.
    """

    is_divergence_a_result = False

    def __init__(self, tasks: Iterable[Task], forks: Mapping[str, Fork], root: RunsRoot) -> None:
        kept = {
            parent: tuple(sorted({f.step for f in forks.values() if f.parent == parent})) for parent in _parents(forks)
        }
        self._waiting = {
            task.run.run_id: replace(task, fork=forks.get(task.run.run_id), kept=kept.get(task.run.run_id, ()))
            for task in tasks
        }
        self._forks, self._root = forks, root
        self._running: set[str] = set()
        self._total, self._done = len(self._waiting), 0
        self._children = {
            parent: {c for c, fork in forks.items() if fork.parent == parent} for parent in _parents(forks)
        }

    def next(self) -> Task | None:
        """The next task whose beginning is there, or will never be."""
        for run_id in sorted(self._waiting, key=lambda run_id: run_id in self._forks):
            if self._is_ready(run_id):
                self._running.add(run_id)
                return self._waiting.pop(run_id)
        return None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """A list prunes nothing."""
        return ()

    def finished(self, run_id: str, state: State) -> None:
        """A run came to rest; what was kept for others goes when the last of them is done."""
        self._running.discard(run_id)
        self._done += 1
        for parent, children in self._children.items():
            if state in (State.DONE, State.STOPPED):
                children.discard(run_id)
            if not children:
                clear(self._root.run(parent))

    def counts(self) -> tuple[int, int]:
        """Tasks done, and tasks in all."""
        return self._done, self._total

    def _is_ready(self, run_id: str) -> bool:
        fork = self._forks.get(run_id)
        if fork is None or fork.step in available(self._root.run(fork.parent)):
            return True
        return fork.parent not in self._running and fork.parent not in self._waiting  # it will not get there any more


@dataclass(frozen=True)
class _Trajectory:
    """A run, and the steps at which its state can be had: all of them while it is yet to be trained (None)."""

    run: Run
    kept: tuple[int, ...] | None

    @property
    def steps(self) -> int:
        return self.run.config.train.steps

    def shared(self, other: _Trajectory) -> int:
        """How many steps of ``other`` this one can give it."""
        common = agreement(_schedule(self.run.config), _schedule(other.run.config), min(self.steps, other.steps))
        if common == other.steps and not self._measures_the_end_of(other):
            common -= 1
        return common if self.kept is None else max((step for step in self.kept if step <= common), default=0)

    def _measures_the_end_of(self, other: _Trajectory) -> bool:
        """Whether what the other one measures at its last step is measured here too: nothing is, without a step to take."""
        last, own, others = other.steps, self.run.config, other.run.config
        is_usual = last == self.steps or last % own.evaluate.every == 0
        return is_usual and (last in own.milestones or last not in others.milestones)


class _Group:
    """Runs that differ in nothing but the weight over the steps and the number of steps."""

    def __init__(self) -> None:
        self.trained: list[_Trajectory] = []
        self.waiting: list[_Trajectory] = []

    def tree(self) -> list[tuple[_Trajectory, Fork | None]]:
        """The waiting runs in an order in which parents come first, each with its fork: the most steps that can be
        shared.

        A common beginning is of a length that obeys ``shared(a, c) >= min(shared(a, b), shared(b, c))``, so taking the
        longest at every turn (Prim's algorithm) leaves the fewest steps to train.
        """
        left = sorted(self.waiting, key=lambda one: -one.steps)
        best: dict[str, Fork] = {}
        order: list[tuple[_Trajectory, Fork | None]] = []
        for parent in self.trained:
            _improve(best, left, parent)
        while left:
            taken = max(left, key=lambda one: best[one.run.run_id].step if one.run.run_id in best else 0)
            left.remove(taken)
            order.append((taken, best.get(taken.run.run_id)))
            _improve(best, left, taken)
        return order


def _improve(best: dict[str, Fork], left: list[_Trajectory], parent: _Trajectory) -> None:
    for child in left:
        step = parent.shared(child)
        known = best.get(child.run.run_id)
        if step > (known.step if known else 0):
            best[child.run.run_id] = Fork(parent.run.run_id, step)


def _group(groups: dict[str, _Group], run: Run) -> _Group:
    return groups.setdefault(_key(run), _Group())


def _key(run: Run) -> str:
    """All that decides a run's steps but for the weight and their number, and what tells at once that nothing is
    shared.

    That is the weight in the first two steps: one step, which all that warms up has in common, is not worth a
    checkpoint.
    """
    schedule = _schedule(run.config)
    value = run.config.model_dump(mode="json")
    if not run.config.train.lr_schedule.depends_on_length():
        del value["train"]["steps"]
    value["regularizer"].pop("weight", None)
    for name in _SHAPE:
        value["regularizer"].get("schedule", {}).pop(name, None)
    return json.dumps([run.seed, value, schedule(0), schedule(1)], sort_keys=True)


def _schedule(config: RunConfig) -> Schedule:
    return Schedule.of(config.regularizer, config.train.steps)


def _parents(forks: Mapping[str, Fork]) -> set[str]:
    return {fork.parent for fork in forks.values()}
