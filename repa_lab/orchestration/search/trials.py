"""What a search looks for, and its study's trials read as arms and seed groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from repa_lab.orchestration.search.group import Aim, Group, Key
from repa_lab.orchestration.search.space import Space
from repa_lab.runs import RunsRoot
from repa_lab.spec import Arm, SearchConfig, SpecError
from repa_lab.spec.identity import Run

QUEUED = "settings"  # an attribute that we give to a trial that waits
# Of several trials of one setting, the one that says most of it.
_RANK = {TrialState.FAIL: 0, TrialState.WAITING: 1, TrialState.RUNNING: 2, TrialState.PRUNED: 3, TrialState.COMPLETE: 4}
_NAMES = {TrialState.FAIL: "failed"}


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
        return [
            list(space.items()),
            aims,
            list(self.seeds),
            self.arm.config.model_dump(mode="json"),
            self.group(self.arm).key,
        ]


@dataclass(frozen=True)
class Trial:
    """A trial as the sweep's manifest has it."""

    arm: Arm
    runs: tuple[Run, ...]
    record: dict[str, Any]


class Trials:
    """The trials of a study.

    Args:
        search: what is searched.
        study: of Optuna.
        space: of the search.
    """

    def __init__(self, search: Search, study: optuna.Study, space: Space) -> None:
        self._search, self._study, self._space = search, study, space
        self._entries: dict[int, tuple[Arm, Group] | None] = {}

    def all(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in one of these states, or, without any, all."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def entry(self, trial: FrozenTrial) -> tuple[Arm, Group] | None:
        """A trial's arm and runs; None for one that was never drawn to its end, or refused."""
        if trial.number not in self._entries:
            queued = trial.state == TrialState.WAITING
            settings = trial.user_attrs.get(QUEUED) if queued else self._space.of_params(trial.params)
            try:
                arm = None if settings is None else self._space.arm(settings)
            except SpecError:
                arm = None
            self._entries[trial.number] = None if arm is None else (arm, self._search.group(arm))
        return self._entries[trial.number]

    def key_of(self, trial: FrozenTrial) -> Key:
        """The ids of a trial's runs; none where there is no :meth:`entry`."""
        entry = self.entry(trial)
        return entry[1].key if entry else ()

    def shown(self) -> list[Trial]:
        """Every setting that was tried or waits to be, oldest first."""
        best: dict[Key, FrozenTrial] = {}
        for trial in self.all():
            key = self.key_of(trial)
            if key and (key not in best or _RANK[trial.state] > _RANK[best[key].state]):
                best[key] = trial
        return [self._shown(trial) for trial in best.values()]

    def front(self) -> list[str]:
        """Labels of the trials of which none is better in every objective."""
        best = {self.key_of(trial): trial for trial in self._study.best_trials if not _is_diverged(trial)}
        return [self._shown(trial).arm.label for trial in best.values()]

    def _shown(self, trial: FrozenTrial) -> Trial:
        entry = self.entry(trial)
        assert entry
        ended = trial.state.is_finished() and trial.values is not None and not _is_diverged(trial)
        names = [aim.name for aim in self._search.aims]
        values = dict(zip(names, trial.values, strict=True)) if ended else {}
        settings = self._space.of_params(trial.params) or trial.user_attrs.get(QUEUED, {})
        state = "diverged" if _is_diverged(trial) else _NAMES.get(trial.state, trial.state.name.lower())
        record = {"arm": entry[0].label, "state": state, "value": values.get(self._search.metric), "params": settings}
        return Trial(entry[0], tuple(entry[1].runs.values()), {**record, "values": values})


def _is_diverged(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and any(math.isinf(value) for value in trial.values)
