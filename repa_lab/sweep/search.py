"""Search with Optuna: one trial is one setting with all its seeds, pruned on the mean of the group at equal progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from repa_lab.runs import State, SweepDirectory
from repa_lab.runs.files import Row
from repa_lab.spec import Arm, SearchConfig
from repa_lab.spec.identity import Run
from repa_lab.spec.schema import Interval
from repa_lab.sweep.plan import Plan, arm_record, identify_arm
from repa_lab.sweep.work import Task

_SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
# Given the length of a run in steps. The first third of a run says little of its end: no pruning on medians there.
_PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "none": lambda steps: optuna.pruners.NopPruner(),
    "median": lambda steps: optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=steps // 3),
    "asha": lambda steps: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 9), reduction_factor=3),
}


@dataclass
class _Group:
    """A trial's runs: what each measured, by step, and how each ended."""

    trial: optuna.Trial
    arm: Arm
    runs: dict[str, Run]
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    ended: dict[str, State] = field(default_factory=dict)
    reported: int = 0
    pruned: bool = False

    def common_steps(self) -> list[int]:
        """Steps that every run of the group has measured, ascending."""
        seen = [set(self.values.get(run_id, {})) for run_id in self.runs]
        return sorted(set.intersection(*seen))

    def mean(self, step: int) -> float:
        return fmean(self.values[run_id][step] for run_id in self.runs)


class SearchWork:
    """The work of a search around one arm.

    Args:
        arm: the settings that are not searched.
        config: space, objective, sampler, pruner.
        metric: full name of the objective.
        seeds: of every trial.
        identify: the run of an arm with a seed.
        storage: SQLite file of the study; it can be lost, the runs are the truth.
        on_change: told whenever a trial is opened or closed.
    """

    def __init__(
        self,
        arm: Arm,
        config: SearchConfig,
        metric: str,
        seeds: Iterable[int],
        identify: Callable[[Arm, int], Run],
        storage: Path,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self._arm, self._config, self._metric, self._seeds = arm, config, metric, tuple(seeds)
        self._identify, self._on_change = identify, on_change
        self._groups: list[_Group] = []
        self._queue: list[Task] = []
        # Failed trials of this session count, or a search whose every run fails would never end; a rerun tries again.
        self._failed = 0
        self._space = {path: _distribution(interval) for path, interval in config.space.items()}
        self.study = _open_study(arm, config, storage)

    @property
    def trials(self) -> list[tuple[Arm, list[Run], dict[str, Any]]]:
        """Every trial of this search with its arm, its runs and its record, oldest first."""
        return [self._record(trial) for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]

    def next(self) -> Task | None:
        """See :class:`Work`."""
        if not self._queue and self._settled() + len(self._groups) < self._config.trials:
            self._ask()
        return self._queue.pop(0) if self._queue else None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """See :class:`Work`: a group that falls behind is pruned whole."""
        value = row.get(self._metric)
        for group in self._groups:
            if value is not None and run_id in group.runs:
                group.values.setdefault(run_id, {})[row["step"]] = value
                if self._should_prune(group):
                    group.pruned = True
                    self._queue = [task for task in self._queue if task.run.run_id not in group.runs]
                    yield from (other for other in group.runs if other not in group.ended)

    def finished(self, run_id: str, state: State) -> None:
        """See :class:`Work`."""
        for group in list(self._groups):
            if run_id in group.runs:
                group.ended[run_id] = state
                if len(group.ended) == len(group.runs) or group.pruned:
                    self._tell(group)
        self._on_change()

    def counts(self) -> tuple[int, int]:
        """See :class:`Work`; in runs."""
        return self._settled() * len(self._seeds), self._config.trials * len(self._seeds)

    def _ask(self) -> None:
        trial = self.study.ask(fixed_distributions=self._space)
        arm = self._arm.with_settings(trial.params)
        runs = [self._identify(arm, seed) for seed in self._seeds]
        self._groups.append(_Group(trial, arm, {run.run_id: run for run in runs}))
        self._queue += [Task(run, f"{arm.label}, seed {run.seed}") for run in runs]
        self._on_change()

    def _should_prune(self, group: _Group) -> bool:
        for step in group.common_steps():
            if step > group.reported:
                group.trial.report(group.mean(step), step)
                group.reported = step
        return bool(not group.pruned and group.reported and group.trial.should_prune())

    def _tell(self, group: _Group) -> None:
        self._groups.remove(group)
        steps = group.common_steps()
        if State.FAILED in group.ended.values() or not steps:
            self._failed += 1
            self.study.tell(group.trial, state=TrialState.FAIL)
        elif group.pruned or State.PRUNED in group.ended.values():
            self.study.tell(group.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(group.trial, group.mean(steps[-1]))

    def _settled(self) -> int:
        settled = (TrialState.COMPLETE, TrialState.PRUNED)
        return sum(trial.state in settled for trial in self.study.get_trials(deepcopy=False)) + self._failed

    def _record(self, trial: optuna.trial.FrozenTrial) -> tuple[Arm, list[Run], dict[str, Any]]:
        arm = self._arm.with_settings(trial.params)
        runs = [self._identify(arm, seed) for seed in self._seeds]
        value = trial.value if trial.state != TrialState.RUNNING else None
        return arm, runs, {"arm": arm.label, "state": trial.state.name.lower(), "value": value, "params": dict(trial.params)}


def _open_study(arm: Arm, config: SearchConfig, storage: Path) -> optuna.Study:
    """The study of an arm; trials that a killed scheduler left running are asked again with the same parameters."""
    study = optuna.create_study(
        study_name=arm.label,
        storage=f"sqlite:///{storage}",
        pruner=_PRUNERS[config.prune](arm.config.train.steps),
        direction="minimize" if config.objective.goal == "min" else "maximize",
        load_if_exists=True,
    )
    # A sampler that starts over would draw again what the study has tried already.
    study.sampler = _SAMPLERS[config.sampler](config.seed + len(study.get_trials(deepcopy=False)))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _distribution(interval: Interval) -> BaseDistribution:
    if interval.choice is not None:
        return CategoricalDistribution(interval.choice)
    if interval.int_ is not None:
        return IntDistribution(interval.int_[0], interval.int_[1])
    low, high = interval.log or interval.uniform or (0.0, 1.0)
    return FloatDistribution(low, high, log=interval.log is not None)


class Searches:
    """One search for every arm of a plan, taken in turn; the sweep's folder shows all their trials as arms.

    Args:
        plan: of an experiment with a ``search``.
        directory: the sweep's, which holds the studies.
    """

    def __init__(self, plan: Plan, directory: SweepDirectory) -> None:
        self._plan, self._directory = plan, directory
        experiment = plan.experiment
        assert experiment.search
        self._config, self._metric = experiment.search, plan.metric(experiment.search.objective.metric)
        storage = directory.path / "study.db"
        options = (experiment.search, self._metric, experiment.seeds, identify_arm, storage, self._recorded)
        self._searches: list[SearchWork] = []
        self._searches += [SearchWork(arm, *options) for arm in experiment.arms]
        self._recorded()

    def next(self) -> Task | None:
        """See :class:`Work`; the search that has handed out least goes first."""
        for search in sorted(self._searches, key=lambda search: len(search.trials)):
            if task := search.next():
                return task
        return None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """See :class:`Work`."""
        return [pruned for search in self._searches for pruned in search.heard(run_id, row)]

    def finished(self, run_id: str, state: State) -> None:
        """See :class:`Work`."""
        for search in self._searches:
            search.finished(run_id, state)

    def counts(self) -> tuple[int, int]:
        """See :class:`Work`."""
        each = [search.counts() for search in self._searches]
        return sum(done for done, _ in each), sum(total for _, total in each)

    def _recorded(self) -> None:
        trials = [trial for search in self._searches for trial in search.trials]
        arms = [arm_record(arm, None, runs) for arm, runs, _ in trials]
        search = {"metric": self._metric, "goal": self._config.objective.goal, "trials": [record for *_, record in trials]}
        self._directory.record(self._plan.manifest(arms, search))
