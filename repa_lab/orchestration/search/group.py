"""A trial's runs, one per seed: what each has measured, how each ended, and what that comes to for Optuna."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import optuna
from optuna.trial import TrialState

from repa_lab.runs import RunsRoot, State
from repa_lab.runs.files import DamagedFileError, Row
from repa_lab.spec.identity import Run
from repa_lab.spec.options import COSTS

_SECONDS_PER_HOUR = 3600
Key = tuple[str, ...]


@dataclass(frozen=True)
class Aim:
    """An objective under the full name of its metric."""

    name: str
    goal: str

    @property
    def is_cost(self) -> bool:
        """Whether it is what a run costs."""
        return self.name in COSTS

    @property
    def worst(self) -> float:
        """What a diverged group is told as: whatever was measured elsewhere is better."""
        return math.inf if self.goal == "min" else -math.inf


@dataclass
class Group:
    """A setting's runs, and the trials that asked for it: several, if one setting was drawn twice.

    Attributes:
        runs: by their ids, in the order of the seeds.
        metric: full name of the metric that is searched for.
        root: where the runs live.
        trials: of Optuna.
        waiting: ids of runs that were asked for and have not ended.
        stopped: whether the group's runs were told to stop.
    """

    runs: dict[str, Run]
    metric: str
    root: RunsRoot
    trials: list[optuna.Trial] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    stopped: bool = False
    _values: dict[str, dict[int, float]] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _ended: dict[str, State] = field(default_factory=dict)
    _diverged: set[str] = field(default_factory=set)
    _reported: dict[int, int] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What tells groups apart."""
        return tuple(self.runs)

    @property
    def ended(self) -> frozenset[str]:
        """Ids of the runs that came to rest."""
        return frozenset(self._ended)

    @property
    def is_diverged(self) -> bool:
        """Whether a run failed by diverging, or last measured what is not finite."""
        last = (values[max(values)] for values in self._values.values() if values)
        return bool(self._diverged) or any(math.isnan(value) for value in last)

    @property
    def is_settled(self) -> bool:
        """Whether nothing that its runs could still do would change what it comes to."""
        states = [self._ended.get(run_id) for run_id in self.runs]
        return self.is_diverged or State.PRUNED in states or all(state is State.DONE for state in states)

    def hear(self, run_id: str, row: Row) -> None:
        """Take in a row of one of the runs; null stands for what is not finite."""
        if (seconds := row.get("seconds")) is not None:
            self._seconds[run_id] = seconds
        if self.metric in row:
            value = row[self.metric]
            self._values.setdefault(run_id, {})[row["step"]] = math.nan if value is None else value

    def end(self, run_id: str, state: State) -> None:
        """Take in that a run came to rest; its directory says why it failed."""
        self.waiting.discard(run_id)
        self._ended[run_id] = state
        if self.root.run(run_id).state.is_diverged:
            self._diverged.add(run_id)

    def absorb(self, run_ids: Iterable[str]) -> None:
        """Take in what run directories tell; a failure other than divergence is left to be tried again."""
        for run_id in run_ids:
            directory = self.root.run(run_id)
            for row in directory.rows():
                self.hear(run_id, row)
            recorded = directory.state
            if recorded.state.status.is_final or recorded.is_diverged:
                self.end(run_id, recorded.state)

    def means(self) -> dict[int, float]:
        """The group's mean by step, where all of its runs have measured something finite."""
        seen = [self._values.get(run_id, {}) for run_id in self.runs]
        common = sorted(set.intersection(*(set(values) for values in seen)))
        means = {step: fmean(values[step] for values in seen) for step in common}
        return {step: mean for step, mean in means.items() if math.isfinite(mean)}

    def judge(self) -> bool:
        """Report the steps that all runs have reached since the last time; whether the pruner would end the group there."""
        verdict = False
        for trial in self.trials:
            for step, mean in self.means().items():
                if step > self._reported.get(trial.number, 0):
                    trial.report(mean, step)
                    self._reported[trial.number] = step
                    # Asked at every step, for successive halving notes down in it how far a trial got.
                    verdict = trial.should_prune() or verdict
        return verdict

    def outcome(self, aims: Sequence[Aim]) -> tuple[TrialState, list[float] | None]:
        """What the group comes to: a diverged one is the worst of all rather than lost."""
        means, states = self.means(), set(self._ended.values())
        if self.is_diverged:
            return TrialState.COMPLETE, [aim.worst for aim in aims]
        if State.PRUNED in states:
            # Optuna knows no pruning of trials with several objectives; such a run is another search's.
            return (TrialState.PRUNED if len(aims) == 1 else TrialState.FAIL), None
        if State.FAILED in states or not means:
            return TrialState.FAIL, None
        return TrialState.COMPLETE, [self._cost(aim.name) if aim.is_cost else means[max(means)] for aim in aims]

    def _cost(self, name: str) -> float:
        """The mean cost of a run."""
        seconds = {run_id: self._seconds.get(run_id, 0.0) for run_id in self.runs}
        if name == "seconds":
            return fmean(seconds.values())
        return fmean(spent * self._processes(run_id) / _SECONDS_PER_HOUR for run_id, spent in seconds.items())

    def _processes(self, run_id: str) -> int:
        try:
            return int(self.root.run(run_id).provenance.get("processes", 1))
        except (OSError, DamagedFileError):
            return 1
