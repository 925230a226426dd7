"""The Optuna study of a search: its database, its name, its sampler, its pruner, and the runs of its trials."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from repa_lab.errors import InputError
from repa_lab.orchestration.search.space import Settings, Space
from repa_lab.runs import RunsRoot, State
from repa_lab.runs.files import DamagedFileError
from repa_lab.spec import Arm, SearchConfig, SpecError
from repa_lab.spec.identity import Run
from repa_lab.spec.options import Objective

Result = tuple[TrialState, list[float] | None]
_MAX_LABEL = 200
MAX_DRAWS = 100
# SQLite lets one process write at a time; a dashboard that reads must not end a search.
_SQLITE = {"connect_args": {"timeout": 60}}

# Samplers by name, given the seed of the search and the seed of a trial. Samplers that draw from a sequence (QMC) or
# count their draws (CMA-ES) need one seed for the whole study; the others are seeded by trial, so that a search that
# was interrupted draws what it would have drawn without the interruption.
_SAMPLERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed, of_trial: optuna.samplers.TPESampler(seed=of_trial),
    "random": lambda seed, of_trial: optuna.samplers.RandomSampler(seed=of_trial),
    "qmc": lambda seed, of_trial: optuna.samplers.QMCSampler(
        scramble=True,
        seed=seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=of_trial),
        warn_independent_sampling=False,
    ),
    "cmaes": lambda seed, of_trial: optuna.samplers.CmaEsSampler(
        seed=seed, independent_sampler=optuna.samplers.RandomSampler(seed=of_trial), warn_independent_sampling=False
    ),
}
# Pruners by name, given the length of a run in steps. The first third of a run says little about its end, so medians
# are not compared there. Successive halving keeps a third of the trials at a ninth of a run, and a third of those at a
# third of it.
_PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "none": lambda steps: optuna.pruners.NopPruner(),
    "median": lambda steps: optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=steps // 3),
    "asha": lambda steps: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 9), reduction_factor=3),
    "hyperband": lambda steps: optuna.pruners.HyperbandPruner(
        min_resource=max(1, steps // 9), max_resource=steps, reduction_factor=3
    ),
}


class StorageError(InputError):
    """The database of a study cannot be used; the text says why and holds no password."""


def open_storage(url: str | None, file: Path) -> RDBStorage:
    """Open the database at a URL, or in a file, which is renamed to ``*.damaged`` and created anew if it is damaged.

    Raises:
        StorageError: the database cannot be used.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        is_sqlite = url is None or make_url(url).get_backend_name() == "sqlite"
        return RDBStorage(url or file_url(file), engine_kwargs=_SQLITE if is_sqlite else None)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError, OSError) as error:
        is_locked = isinstance(error, OperationalError)  # or not writable: the file itself is fine
        if url is None and isinstance(error, DatabaseError) and not is_locked:
            # The run directories are the truth: a study that cannot be read is rebuilt from them.
            file.rename(file.with_name(f"{file.name}.damaged"))
            return open_storage(url, file)
        lines = str(getattr(error, "orig", None) or error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise StorageError(f"cannot use {url or file}: {reason}") from None  # shown without the password


def file_url(file: Path) -> str:
    """Return the URL of an SQLite database in a file, whose path may hold any character."""
    return URL.create("sqlite", database=str(file.absolute())).render_as_string(hide_password=False)


def open_study(
    storage: RDBStorage, name: str, config: SearchConfig, objectives: Sequence[Objective], steps: int
) -> optuna.Study:
    """Open the study of a name, or create it; objectives have full names, ``steps`` is the length of a run."""
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        pruner=_PRUNERS[config.prune](steps),
        directions=["minimize" if objective.goal == "min" else "maximize" for objective in objectives],
        load_if_exists=True,
    )
    with _without_experimental_warnings():
        study.set_metric_names([objective.metric for objective in objectives])
    return study


def study_name(sweep: str, label: str, content: Any) -> str:
    """Return a study's name: for people, and with a digest of all that its trials share, so that a changed space opens
    a new study.
    """
    text = json.dumps(content, sort_keys=True)
    return f"{sweep}, {label[:_MAX_LABEL]} [{hashlib.sha256(text.encode()).hexdigest()[:8]}]"


def replace_trials(study: optuna.Study, storage: RDBStorage, trials: Sequence[FrozenTrial]) -> optuna.Study:
    """Create a study anew with these trials, because Optuna does not change trials that have ended."""
    study_id = storage.get_study_id_from_name(study.study_name)
    attributes = storage.get_study_user_attrs(study_id), storage.get_study_system_attrs(study_id)
    optuna.delete_study(study_name=study.study_name, storage=storage)
    replaced = optuna.create_study(
        study_name=study.study_name, storage=storage, pruner=study.pruner, directions=study.directions
    )
    replaced.add_trials(trials)
    study_id = storage.get_study_id_from_name(study.study_name)
    for key, value in attributes[1].items():
        storage.set_study_system_attr(study_id, key, value)
    for key, value in attributes[0].items():
        storage.set_study_user_attr(study_id, key, value)
    return replaced


def make_sampler(config: SearchConfig, trial: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of the trial of this number, which does not depend on interruptions before it."""
    with _without_experimental_warnings():
        return _SAMPLERS[config.sampler](_mixed(config.seed), _mixed(config.seed, trial))


class NewSettingsSampler(optuna.samplers.BaseSampler):
    """Draws with another sampler until the settings are new, or else takes new settings of a finite space.

    Args:
        is_new: returns whether no trial has these settings; raises SpecError if they contradict each other.
        left: settings of a finite space that no trial has.
    """

    def __init__(
        self,
        sampler: optuna.samplers.BaseSampler,
        space: Space,
        is_new: Callable[[Settings], bool],
        left: Iterator[Settings],
    ) -> None:
        self._sampler, self._space, self._is_new, self._left = sampler, space, is_new, left

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space, because all fields are drawn together."""
        return self._space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return new settings; settings that a trial has already if a hundred draws give no others.

        Raises:
            SpecError: none of the settings that were drawn can be.
        """
        known: Settings | None = None
        for _ in range(MAX_DRAWS):
            drawn = self._drawn(study, trial, search_space)
            try:
                if self._is_new(drawn):
                    return self._space.params(drawn)
                known = drawn
            except SpecError as error:
                refusal = error
            if (left := next(self._left, None)) is not None:
                return self._space.params(left)
        if known is None:
            raise refusal
        return self._space.params(known)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one field."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Let the sampler prepare a trial."""
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Let the sampler note the result of a trial."""
        self._sampler.after_trial(study, trial, state, values)

    def _drawn(self, study: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution]) -> Settings:
        shared = self._sampler.infer_relative_search_space(study, trial)
        params = self._sampler.sample_relative(study, trial, shared)

        def param(path: str) -> Any:
            if path in params:
                return params[path]
            return self._sampler.sample_independent(study, trial, path, space[path])

        return self._space.draw(param)


def shuffled(settings: Sequence[Settings], config: SearchConfig) -> list[Settings]:
    """Return settings in an order that the search's seed decides."""
    return random.Random(_mixed(config.seed)).sample(settings, len(settings))


def _mixed(*numbers: int) -> int:
    """Return a seed made from several, so that neighbouring seeds do not give related draws."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4])


@contextmanager
def _without_experimental_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


# ---- trials and their runs


@dataclass(eq=False)
class TrialRuns:
    """The runs of one setting, one per seed, and what their directories say.

    Attributes:
        runs: by their ids, in the order of the seeds.
        objectives: what the search improves, by full names; one is measured, the others are costs.
        trial: Optuna's trial of this setting while it is open, else None.
        waiting: ids of the runs that were asked for and have not ended.
        is_stopped: whether the runs were told to stop.
        reported: the last step that was reported to Optuna.
    """

    settings: Settings
    arm: Arm
    runs: dict[str, Run]
    objectives: tuple[Objective, ...]
    root: RunsRoot
    trial: optuna.Trial | None = None
    waiting: set[str] = field(default_factory=set)
    is_stopped: bool = False
    reported: int = 0

    @property
    def metric(self) -> str:
        """Full name of the objective that is measured."""
        return next(objective.metric for objective in self.objectives if not objective.is_cost)

    def curves(self) -> list[dict[int, float]]:
        """Return the measured metric by step, for every seed; NaN where it was not finite."""
        curves = []
        for run_id in self.runs:
            rows = [row for row in self.root.run(run_id).rows() if self.metric in row]
            curves.append({row["step"]: math.nan if row[self.metric] is None else row[self.metric] for row in rows})
        return curves

    def means(self) -> dict[int, float]:
        """Return the mean over the seeds by step, at the steps where every seed has measured a finite value."""
        curves = self.curves()
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = {step: fmean(curve[step] for curve in curves) for step in shared}
        return {step: mean for step, mean in means.items() if math.isfinite(mean)}

    def ended(self) -> set[str]:
        """Return the ids of the runs that are done, pruned or diverged; other failures are tried again."""
        states = {run_id: self.root.run(run_id).state for run_id in self.runs}
        return {run_id for run_id, state in states.items() if state.state.status.is_final or state.is_diverged}

    @property
    def is_diverged(self) -> bool:
        """Whether a run failed by diverging, or its last measurement is not finite."""
        last = [curve[max(curve)] for curve in self.curves() if curve]
        return any(map(math.isnan, last)) or any(self.root.run(run_id).state.is_diverged for run_id in self.runs)

    def result(self) -> Result | None:
        """Return state and values of the trial; None while a run that is still to be trained may change them.

        A diverged trial is complete, and worse than any measured one.
        """
        if self.is_diverged:
            return TrialState.COMPLETE, [math.inf if goal.goal == "min" else -math.inf for goal in self.objectives]
        states = {self.root.run(run_id).state.state for run_id in self.runs}
        if State.PRUNED in states:
            # Optuna prunes no trials with several objectives: another search pruned this run.
            return (TrialState.PRUNED if len(self.objectives) == 1 else TrialState.FAIL), None
        means = self.means()
        if states != {State.DONE} or not means:
            return None
        return TrialState.COMPLETE, [
            self._cost(objective.metric) if objective.is_cost else means[max(means)] for objective in self.objectives
        ]

    def should_prune(self) -> bool:
        """Report the means at new steps to Optuna, and return whether its pruner would end the trial there."""
        if len(self.objectives) > 1 or self.trial is None:
            return False
        verdict, means = False, self.means()
        for step in (step for step in means if step > self.reported):
            self.trial.report(means[step], step)
            self.reported = step
            # Asked at every step, because successive halving notes in the trial how far it got.
            verdict = self.trial.should_prune() or verdict
        return verdict

    def _cost(self, name: str) -> float:
        """Return the mean cost of a run: its seconds of training, or the GPU hours of all its processes."""
        costs = []
        for directory in map(self.root.run, self.runs):
            seconds = [row["seconds"] for row in directory.rows() if row.get("seconds") is not None]
            processes = 1
            with suppress(OSError, DamagedFileError):
                processes = int(directory.provenance.get("processes", 1))
            costs.append((seconds or [0.0])[-1] * (1 if name == "seconds" else processes / 3600))
        return fmean(costs)
