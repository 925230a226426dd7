"""The work of one search: a trial is one setting with all its seeds, pruned on the mean of the group at equal progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

import optuna
from optuna.trial import TrialState

from repa_lab.orchestration.executors import Task
from repa_lab.orchestration.search.group import Group, Key
from repa_lab.orchestration.search.restore import find_groups, is_wanted_again
from repa_lab.orchestration.search.space import Settings, Space
from repa_lab.orchestration.search.study import seed_sampler
from repa_lab.orchestration.search.trials import QUEUED, Search, Trial, Trials
from repa_lab.runs import State
from repa_lab.runs.files import Row
from repa_lab.spec import Arm, SpecError
from repa_lab.spec.identity import Run

_RESTORED = "restored"  # an attribute that we give to a study
_MOST_REFUSED = 100
_SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)


class RefusedSpaceError(ValueError):
    """Whatever is drawn from the space is refused; the text says why."""


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
        self._known = Trials(search, study, self._space)
        self._open: dict[Key, Group] = {}
        self._queue: list[Task] = []
        # Failed trials of this session count, or a search whose every run fails would never end; a rerun tries again.
        self._failed = 0
        self._is_ready = False
        if _RESTORED not in study.user_attrs:
            self._restore(begun)
            study.set_user_attr(_RESTORED, True)
        arms = [entry for trial in self._known.all(*_SETTLED) if (entry := self._known.entry(trial))]
        settled = {run.run_id: _task(arm, run) for arm, group in arms for run in group.runs.values()}
        self._again = {run_id: task for run_id, task in settled.items() if is_wanted_again(search.root.run(run_id))}
        self._done = settled.keys() - self._again.keys()

    @property
    def trials(self) -> list[Trial]:
        """Every setting that was tried or waits to be, with its runs and its record, oldest first."""
        return self._known.shown()

    @property
    def front(self) -> list[str]:
        """Labels of the trials of which none is better in every objective."""
        return self._known.front()

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
            self._enqueue(settings)
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
        raise RefusedSpaceError(
            f"{_MOST_REFUSED} settings in a row cannot be, the last for {what}; use when, or other bounds"
        )

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
        known = {self._known.key_of(trial) for trial in self._known.all()}
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
        for trial in self._known.all(TrialState.RUNNING):
            entry = self._known.entry(trial)
            state, values = TrialState.FAIL, None
            if entry is not None:
                entry[1].absorb(entry[1].runs)
                if entry[1].is_settled:
                    state, values = entry[1].outcome(self._search.aims)
            self.study.tell(trial.number, values, state=state)

    def _retry(self) -> None:
        """Queue what failed, or was left open, with the same settings, as far as there is room for it."""
        taken = {self._known.key_of(trial) for trial in self._known.all(*_SETTLED, TrialState.WAITING)}
        room = self._search.config.trials - self._settled() - len(self._known.all(TrialState.WAITING))
        for trial in self._known.all(TrialState.FAIL):
            key, settings = self._known.key_of(trial), self._space.of_params(trial.params)
            if room > 0 and key and key not in taken and settings is not None:
                taken.add(key)
                room -= 1
                self._enqueue(settings)

    def _enqueue(self, settings: Settings) -> None:
        self.study.enqueue_trial(self._space.params(settings), user_attrs={QUEUED: settings})

    def _settled(self) -> int:
        return len(self._known.all(*_SETTLED)) + self._failed


def _task(arm: Arm, run: Run) -> Task:
    return Task(run, f"{arm.label}, seed {run.seed}")
