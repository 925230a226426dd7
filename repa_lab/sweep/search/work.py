"""The work of one search: a trial is one setting with all its seeds, pruned on the mean of the group at equal progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from repa_lab.runs import RunsRoot, State
from repa_lab.runs.files import Row
from repa_lab.spec import Arm, SearchConfig, SpecError
from repa_lab.spec.identity import Run
from repa_lab.sweep.search.group import Aim, Group, Key
from repa_lab.sweep.search.restore import find_groups, is_wanted_again
from repa_lab.sweep.search.space import Settings, Space
from repa_lab.sweep.search.study import seed_sampler
from repa_lab.sweep.work import Task

_RESTORED, _QUEUED = "restored", "settings"  # attributes that we give to a study, and to a trial that waits
_MOST_REFUSED = 100
_SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)
# Of several trials of one setting, the one that says most of it.
_RANK = {TrialState.FAIL: 0, TrialState.WAITING: 1, TrialState.RUNNING: 2, TrialState.PRUNED: 3, TrialState.COMPLETE: 4}
_NAMES = {TrialState.FAIL: "failed"}


class RefusedSpaceError(ValueError):
    """Whatever is drawn from the space is refused; the text says why."""


@dataclass(frozen=True)
class Search:
    """What is searched around an arm.

    Attributes:
        arm: the settings that are not searched.
        config: space, number of trials, sampler, pruner.
        aims: the objectives; one of them is measured, the others are costs.
        seeds: of every trial.
        identify: the run of an arm with a seed.
        root: where the runs live.
    """

    arm: Arm
    config: SearchConfig
    aims: tuple[Aim, ...]
    seeds: tuple[int, ...]
    identify: Callable[[Arm, int], Run]
    root: RunsRoot

    @property
    def metric(self) -> str:
        """Full name of the objective that is measured."""
        return next(aim.name for aim in self.aims if not aim.is_cost)

    def group(self, arm: Arm) -> Group:
        """The runs of a setting, with nothing known of them yet."""
        runs = [self.identify(arm, seed) for seed in self.seeds]
        return Group({run.run_id: run for run in runs}, self.metric, self.root)

    def content(self) -> list[Any]:
        """All that the trials of a study have in common, as plain data."""
        space = {path: interval.model_dump(mode="json") for path, interval in self.config.space.items()}
        aims = [[aim.name, aim.goal] for aim in self.aims]
        return [list(space.items()), aims, list(self.seeds), self.arm.config.model_dump(mode="json"), self.group(self.arm).key]


@dataclass(frozen=True)
class Trial:
    """A trial as the sweep's manifest has it."""

    arm: Arm
    runs: tuple[Run, ...]
    record: dict[str, Any]


class SearchWork:
    """The work of a search around one arm.

    A new study begins with the trials that the run directories tell of.

    Args:
        search: what is searched.
        study: of Optuna; it can be lost, the runs are the truth.
        begun: ids of runs that this search has begun.
        on_change: told whenever a trial is opened or closed.
    """

    def __init__(
        self,
        search: Search,
        study: optuna.Study,
        begun: Set[str] = frozenset(),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.study = study
        self._search, self._on_change = search, on_change
        self._space = Space(search.arm, search.config.space)
        self._open: dict[Key, Group] = {}
        self._queue: list[Task] = []
        self._entries: dict[int, tuple[Arm, Group] | None] = {}
        # Failed trials of this session count, or a search whose every run fails would never end; a rerun tries again.
        self._failed = 0
        self._is_ready = False
        if _RESTORED not in study.user_attrs:
            self._restore(begun)
            study.set_user_attr(_RESTORED, True)
        settled = {run.run_id: task for trial in self._all(*_SETTLED) for run, task in self._tasks_of(trial)}
        self._again = {run_id: task for run_id, task in settled.items() if is_wanted_again(search.root.run(run_id))}
        self._done = settled.keys() - self._again.keys()

    @property
    def trials(self) -> list[Trial]:
        """Every setting that was tried or waits to be, with its runs and its record, oldest first."""
        best: dict[Key, FrozenTrial] = {}
        for trial in self._all():
            key = self._key_of(trial)
            if key and (key not in best or _RANK[trial.state] > _RANK[best[key].state]):
                best[key] = trial
        return [self._shown(trial) for trial in best.values()]

    @property
    def front(self) -> list[str]:
        """Labels of the trials of which none is better in every objective."""
        best = {self._key_of(trial): trial for trial in self.study.best_trials if not _is_diverged(trial)}
        return [self._shown(trial).arm.label for trial in best.values()]

    @property
    def taken(self) -> int:
        """Trials that were taken up."""
        return self._settled() + sum(len(group.trials) for group in self._open.values())

    def next(self) -> Task | None:
        """See :class:`Work`.

        Raises:
            RefusedSpaceError: no setting that is drawn is valid.
        """
        if not self._is_ready:  # not before: only who is given work holds the sweep
            self._reap()
            self._retry()
            self._queue += self._again.values()
            self._is_ready = True
        while not self._queue and self.taken < self._search.config.trials:
            self._ask()
            self._on_change()
        return self._queue.pop(0) if self._queue else None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """See :class:`Work`: a group that falls behind, or diverges, is stopped whole."""
        for group in list(self._open.values()):
            if run_id in group.runs:
                group.hear(run_id, row)
                if not group.stopped and (group.is_diverged or self._judge(group)):
                    yield from self._stop(group)

    def finished(self, run_id: str, state: State) -> None:
        """See :class:`Work`."""
        self._queue = [task for task in self._queue if task.run.run_id != run_id]
        if self._again.pop(run_id, None):  # what its trial was told stays
            self._done.add(run_id)
        for group in list(self._open.values()):
            if run_id in group.runs:
                group.end(run_id, state)
                self._done.add(run_id)
                if group.is_diverged:
                    self._drop(group)
                if not group.waiting:
                    self._tell(group)
        self._on_change()

    def counts(self) -> tuple[int, int]:
        """See :class:`Work`; in runs."""
        waiting = sum(len(group.waiting) for group in self._open.values())
        left = max(0, self._search.config.trials - self.taken)
        return len(self._done), len(self._done) + waiting + len(self._again) + left * len(self._search.seeds)

    def _ask(self, settings: Settings | None = None) -> None:
        """Take up a trial, of these settings if any; what its runs have done already is taken in at once."""
        if settings is not None:
            self.study.enqueue_trial(self._space.params(settings), user_attrs={_QUEUED: settings})
        trial, arm = self._draw()
        group = self._search.group(arm)
        if group.key in self._open:
            self._open[group.key].trials.append(trial)
            return
        group.trials.append(trial)
        group.absorb(group.runs)
        self._open[group.key] = group
        if group.is_settled:
            self._tell(group)
            return
        group.waiting |= set(group.runs) - group.ended
        self._queue += [_task(arm, run) for run in group.runs.values() if run.run_id in group.waiting]

    def _draw(self) -> tuple[optuna.Trial, Arm]:
        for _ in range(_MOST_REFUSED):
            seed_sampler(self.study, self._search.config)
            trial = self.study.ask()
            try:
                return trial, self._space.arm(self._space.suggest(trial))
            except SpecError as error:
                refusal = error.problems[0]
                self.study.tell(trial, state=TrialState.FAIL)
        what = f"{refusal.path}: {refusal.message}"
        raise RefusedSpaceError(f"{_MOST_REFUSED} settings in a row cannot be, the last for {what}; use when, or other bounds")

    def _judge(self, group: Group) -> bool:
        return len(self._search.aims) == 1 and group.judge()

    def _stop(self, group: Group) -> list[str]:
        """Give a group up; the ids of its runs that are going on."""
        group.stopped = True
        self._drop(group)
        return sorted(group.waiting)

    def _drop(self, group: Group) -> None:
        """Begin no more runs of a group."""
        queued = {task.run.run_id for task in self._queue if task.run.run_id in group.runs}
        self._queue = [task for task in self._queue if task.run.run_id not in queued]
        group.waiting -= queued

    def _tell(self, group: Group) -> None:
        del self._open[group.key]
        self._judge(group)
        state, values = group.outcome(self._search.aims)
        for trial in group.trials:
            self.study.tell(trial, values, state=state)
        if state is TrialState.FAIL:
            self._failed += len(group.trials)

    def _restore(self, begun: Set[str]) -> None:
        """Fill a new study from run directories: what has ended is told, what was begun waits to be completed."""
        known = {self._key_of(trial) for trial in self._all()}
        found = find_groups(self._search.root, self._search.arm, self._space, self._search.group, begun)
        left = [one for one in found if one.group.key not in known]
        for one in left:
            if one.group.is_settled:
                self._ask(one.settings)
        for one in left:
            if not one.group.is_settled:
                self._enqueue(one.settings)

    def _reap(self) -> None:
        """Close what a killed scheduler left open: as its runs say if they have ended, else as failed, to be tried again."""
        for trial in self._all(TrialState.RUNNING):
            entry = self._entry(trial)
            state, values = TrialState.FAIL, None
            if entry is not None:
                entry[1].absorb(entry[1].runs)
                if entry[1].is_settled:
                    state, values = entry[1].outcome(self._search.aims)
            self.study.tell(trial.number, values, state=state)

    def _retry(self) -> None:
        """Queue what failed, or was left open, with the same settings, as far as there is room for it."""
        taken = {self._key_of(trial) for trial in self._all(*_SETTLED, TrialState.WAITING)}
        room = self._search.config.trials - self._settled() - len(self._all(TrialState.WAITING))
        for trial in self._all(TrialState.FAIL):
            key, settings = self._key_of(trial), self._space.of_params(trial.params)
            if room > 0 and key and key not in taken and settings is not None:
                taken.add(key)
                room -= 1
                self._enqueue(settings)

    def _enqueue(self, settings: Settings) -> None:
        self.study.enqueue_trial(self._space.params(settings), user_attrs={_QUEUED: settings})

    def _settled(self) -> int:
        return len(self._all(*_SETTLED)) + self._failed

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _key_of(self, trial: FrozenTrial) -> Key:
        """The ids of a trial's runs; none for one that was never drawn to its end, or refused."""
        entry = self._entry(trial)
        return entry[1].key if entry else ()

    def _tasks_of(self, trial: FrozenTrial) -> Iterator[tuple[Run, Task]]:
        if entry := self._entry(trial):
            yield from ((run, _task(entry[0], run)) for run in entry[1].runs.values())

    def _entry(self, trial: FrozenTrial) -> tuple[Arm, Group] | None:
        if trial.number not in self._entries:
            queued = trial.state == TrialState.WAITING
            settings = trial.user_attrs.get(_QUEUED) if queued else self._space.of_params(trial.params)
            try:
                arm = None if settings is None else self._space.arm(settings)
            except SpecError:
                arm = None
            self._entries[trial.number] = None if arm is None else (arm, self._search.group(arm))
        return self._entries[trial.number]

    def _shown(self, trial: FrozenTrial) -> Trial:
        entry = self._entry(trial)
        assert entry
        ended = trial.state.is_finished() and trial.values is not None and not _is_diverged(trial)
        names = [aim.name for aim in self._search.aims]
        values = dict(zip(names, trial.values, strict=True)) if ended else {}
        settings = self._space.of_params(trial.params) or trial.user_attrs.get(_QUEUED, {})
        state = "diverged" if _is_diverged(trial) else _NAMES.get(trial.state, trial.state.name.lower())
        record = {"arm": entry[0].label, "state": state, "value": values.get(self._search.metric), "params": settings}
        return Trial(entry[0], tuple(entry[1].runs.values()), {**record, "values": values})


def _task(arm: Arm, run: Run) -> Task:
    return Task(run, f"{arm.label}, seed {run.seed}")


def _is_diverged(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and any(math.isinf(value) for value in trial.values)
