"""Search with Optuna: ask for a trial, train its runs, tell Optuna what they measured.

A trial is one setting, trained with every seed of the sweep; Optuna is told the mean over the seeds, and prunes all
seeds together. The run directories are the truth: whatever Optuna's database says, a trial has the result that its runs
hold, and a lost database is rebuilt from the runs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from repa_lab.orchestration.checks import resolve_metric
from repa_lab.orchestration.plan import Plan, arm_record, identify_run
from repa_lab.orchestration.rehearsal import RehearsedArm
from repa_lab.orchestration.scheduler import Task
from repa_lab.orchestration.search.space import Settings, Space, storage_url
from repa_lab.orchestration.search.study import (
    MAX_DRAWS,
    NewSettingsSampler,
    StorageError,
    TrialRuns,
    make_sampler,
    open_storage,
    open_study,
    replace_trials,
    shuffled,
    study_name,
)
from repa_lab.runs import RunDirectory, RunStatus, State, SweepDirectory
from repa_lab.runs.files import DamagedFileError, Row
from repa_lab.runs.root import ArmRecord, ObjectiveRecord, SearchRecord, TrialRecord
from repa_lab.spec import Arm, SpecError
from repa_lab.spec.options import Objective
from repa_lab.training.resolve import metric_names

_RESTORED = "restored"  # attribute of a study that holds all trials that the run directories tell of
_REPEATS = "repeats"  # attribute of a trial whose settings another trial has, with the number of that trial


class Search:
    """The search around one arm: ask, run, tell.

    Args:
        plan: of an experiment with a search.
        arm: the settings that are not searched.
        storage: the database of the study.
        begun: ids of the runs that the sweep began before.

    Raises:
        SpecError: no setting that is drawn is valid.
    """

    def __init__(self, plan: Plan, arm: Arm, storage: RDBStorage, begun: Set[str]) -> None:
        config, self._plan, self._arm, self._storage = plan.experiment.search, plan, arm, storage
        assert config
        self._space = Space(arm, config.space)
        self._is_searched, listed = self._space.is_searched, self._space.listed()
        self._config = config if self._is_searched else config.model_copy(update={"trials": 1})
        self._listed = None if listed is None else shuffled(listed, config)
        self.objectives = tuple(_by_full_name(objective, plan, arm) for objective in config.objectives)
        self._by_runs: dict[tuple[str, ...], TrialRuns] = {}
        self._by_settings: dict[str, TrialRuns | SpecError] = {}
        self._tried: dict[TrialRuns, int] = {}  # the number of the trial that has these runs
        self._queue: list[Task] = []
        name = study_name(plan.experiment.name, arm.label, self._content())
        self._study = open_study(storage, name, self._config, self.objectives, arm.config.train.steps)
        self._restore(begun)

    @property
    def taken(self) -> int:
        """The number of trials that have a result, have failed, repeat another or are open, without refused draws."""
        return sum(not self._is_refused(trial) for trial in self._trials() if trial.state is not TrialState.WAITING)

    def _is_refused(self, trial: FrozenTrial) -> bool:
        """Return whether a trial ended without valid settings."""
        return trial.state is TrialState.FAIL and _REPEATS not in trial.user_attrs and self._find(trial) is None

    @property
    def exhausted(self) -> dict[str, int]:
        """The number of settings that have a trial, by the label of the arm; empty while others are left to try."""
        if not self._is_searched or not self._tried:
            return {}
        if self._listed is None:
            is_left = not any(_REPEATS in trial.user_attrs for trial in self._trials())
        else:
            is_left = next(self._left(), None) is not None
        return {} if is_left else {self._arm.label: len(self._tried)}

    def next(self) -> Task | None:
        """Return the next run to train; ask for new trials as long as there is none."""
        while not self._queue and self.taken < self._config.trials:
            if self.exhausted and not self._trials(TrialState.WAITING):
                break
            self._ask()
        return self._queue.pop(0) if self._queue else None

    def heard(self, run_id: str, row: Row) -> Iterator[str]:
        """Yield the ids of the runs to prune after a row: all runs of a trial that diverges or falls behind."""
        for runs in self._open:
            if runs.is_stopped or run_id not in runs.runs or runs.metric not in row:
                continue
            if runs.is_diverged or runs.should_prune():
                runs.is_stopped = True
                self._withdraw(runs)
                yield from sorted(runs.waiting)

    def finished(self, run_id: str) -> None:
        """Tell Optuna the result of a trial if this was the last of its runs to end."""
        self._queue = [task for task in self._queue if task.run.run_id != run_id]
        for runs in self._open:
            if run_id in runs.runs:
                runs.waiting.discard(run_id)
                if runs.is_diverged:
                    self._withdraw(runs)
                if not runs.waiting:
                    self._tell(runs)

    def counts(self) -> tuple[int, int]:
        """Return the number of runs that have ended, and of all runs."""
        trials = self._trials()
        taken = [runs for runs, number in self._tried.items() if trials[number].state is not TrialState.WAITING]
        total, waiting = sum(len(runs.runs) for runs in taken), sum(len(runs.waiting) for runs in taken)
        left = max(0, self._config.trials - self.taken)
        if self._listed is not None or self.exhausted:
            left = min(left, len(self._trials(TrialState.WAITING)) + len([*itertools.islice(self._left(), left)]))
        return total - waiting, total + left * len(self._plan.experiment.seeds)

    def records(self) -> list[tuple[ArmRecord, TrialRecord]]:
        """Return every trial whose settings were drawn, oldest first, as the sweep's manifest has it."""
        return [self._record(runs, trial) for trial in self._trials() if (runs := self._find(trial))]

    def pareto_front(self) -> list[str]:
        """Return the labels of the trials of which no other is better in every objective."""
        best = (self._find(trial) for trial in self._study.best_trials if not _is_diverged(trial))
        return list(dict.fromkeys(runs.arm.label for runs in best if runs))

    # ---- ask

    def _ask(self) -> None:
        sampler = make_sampler(self._config, len(self._trials()))
        self._study.sampler = NewSettingsSampler(sampler, self._space, self._is_new, self._left())
        trial = self._study.ask()
        try:
            runs = self._runs(self._space.suggest(trial))
        except SpecError as error:
            self._study.tell(trial, state=TrialState.FAIL)
            last = f"{error.problems[0].path}: {error.problems[0].message}"
            message = f"{MAX_DRAWS} settings in a row cannot be, the last for {last}; use when, or other bounds"
            raise SpecError([self._plan.experiment.problem("search.space", message)]) from None
        number = self._tried.setdefault(runs, trial.number)
        if number == trial.number:
            self._take_up(trial, runs)
        else:
            trial.set_user_attr(_REPEATS, number)
            self._study.tell(trial, state=TrialState.FAIL)

    def _is_new(self, settings: Settings) -> bool:
        return self._runs(settings) not in self._tried

    def _left(self) -> Iterator[Settings]:
        """Yield the settings of a finite space that no trial has, in the order of the seed; of equal runs the first."""
        known = set(self._tried)
        for settings in self._listed or ():
            with suppress(SpecError):
                if (runs := self._runs(settings)) not in known:
                    known.add(runs)
                    yield settings

    def _take_up(self, trial: optuna.Trial, runs: TrialRuns) -> None:
        """Queue the runs of a trial that are left to train; tell Optuna its result at once if there are none."""
        runs.trial, runs.reported = trial, 0
        left = set() if runs.result() else runs.runs.keys() - runs.ended()
        runs.waiting, runs.is_stopped = set(left), False
        tasks = [Task(run, f"{runs.arm.label}, seed {run.seed}") for run in runs.runs.values() if run.run_id in left]
        self._queue += tasks
        if not tasks:
            self._tell(runs)

    # ---- tell

    def _tell(self, runs: TrialRuns) -> None:
        runs.should_prune()  # reports what was measured since
        state, values = runs.result() or (TrialState.FAIL, None)
        if runs.trial:
            self._study.tell(runs.trial, values, state=state)
        # Failed trials count too, or a search whose every run fails would never end; the next session tries them again.
        runs.trial = None

    def _withdraw(self, runs: TrialRuns) -> None:
        """Start no more runs of a trial."""
        queued = {task.run.run_id for task in self._queue if task.run.run_id in runs.runs}
        self._queue = [task for task in self._queue if task.run.run_id not in queued]
        runs.waiting -= queued

    # ---- restore

    def _restore(self, begun: Set[str]) -> None:
        """Make the study agree with the run directories.

        A trial whose runs do not hold its result waits to be trained, under its number and with its settings: it
        failed, its session was killed, or its runs were deleted. A new study begins with the settings of which the root
        holds runs. Asking again with the same seeds would not find them all, because the draws of TPE and CMA-ES depend
        on which trials had ended, and because the space may have changed.
        """
        trials, numbers = self._trials(), self._numbers()
        confirmed = [found for trial in trials if (found := self._confirmed(trial, numbers))]
        if confirmed != trials:
            self._study = replace_trials(self._study, self._storage, confirmed)
        self._tried = self._numbers()
        if _RESTORED not in self._study.user_attrs:
            for settings in self._trained_settings(begun):
                self._study.enqueue_trial(self._space.params(settings))
            self._study.set_user_attr(_RESTORED, True)
            self._tried = self._numbers()
        while (waiting := self._trials(TrialState.WAITING)) and self.taken < self._config.trials:
            if not ((runs := self._find(waiting[0])) and runs.result()):
                break
            self._ask()  # tells the result at once

    def _confirmed(self, trial: FrozenTrial, numbers: Mapping[TrialRuns, int]) -> FrozenTrial | None:
        """Return a trial if its runs hold its result, else the trial as one that waits.

        Returns:
            None for a trial that was never drawn to the end, or whose settings an earlier one has.
        """
        if _REPEATS in trial.user_attrs:
            return trial
        if (runs := self._find(trial)) is None:  # refused, or a kill came between the draws of two fields
            return trial if trial.state.is_finished() else None
        if numbers[runs] != trial.number:
            return None
        state, values = runs.result() or (None, None)
        is_held = state is trial.state and (values is None or np.allclose(values, trial.values, rtol=1e-9, atol=0))
        if is_held or trial.state is TrialState.WAITING:
            return trial
        # CMA-ES notes the generation of a trial; the notes of pruners are about values that are measured again.
        notes = {key: note for key, note in trial.system_attrs.items() if not key.startswith("completed_rung")}
        return create_trial(state=TrialState.WAITING, system_attrs={**notes, "fixed_params": trial.params})

    def _trained_settings(self, begun: Set[str]) -> list[Settings]:
        """Return the settings of the space of which the root holds runs, those with a result first, in order of time.

        Settings without a result count if this sweep began one of their runs, or if one was interrupted.
        """
        known = set(self._tried)
        trained: list[tuple[bool, str, Settings]] = []
        for directory in self._plan.root.runs():
            try:
                spec, time = directory.spec, str(directory.provenance.get("time"))
            except DamagedFileError:
                continue
            for settings in self._space.candidates(spec):
                try:
                    runs = self._runs(settings)
                except SpecError:
                    continue
                if directory.run_id in runs.runs and runs not in known:
                    has_result = runs.result() is not None
                    if has_result or any(_goes_on(self._plan.root.run(run_id), begun) for run_id in runs.runs):
                        known.add(runs)
                        trained.append((not has_result, time, settings))
        return [settings for _, _, settings in sorted(trained, key=lambda entry: entry[:2])]

    # ---- trials and their runs

    @property
    def _open(self) -> list[TrialRuns]:
        return [runs for runs in self._by_runs.values() if runs.trial]

    def _numbers(self) -> dict[TrialRuns, int]:
        """Return the numbers of the trials by their runs; of a repeated setting, the first."""
        return {runs: trial.number for trial in reversed(self._trials()) if (runs := self._find(trial))}

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _runs(self, settings: Settings) -> TrialRuns:
        """Return the runs of a setting; settings that differ in nothing that matters share their runs.

        Raises:
            SpecError: the settings contradict each other.
        """
        text = json.dumps(settings, sort_keys=True)
        if text not in self._by_settings:
            self._by_settings[text] = self._identified(settings)
        if isinstance(found := self._by_settings[text], SpecError):
            raise found
        return found

    def _identified(self, settings: Settings) -> TrialRuns | SpecError:
        plan = self._plan
        try:
            arm = self._space.arm(settings)
        except SpecError as error:
            return error
        identified = [identify_run(arm.config, seed, plan.inventory) for seed in plan.experiment.seeds]
        runs = {run.run_id: run for run in identified}
        return self._by_runs.setdefault(tuple(runs), TrialRuns(settings, arm, runs, self.objectives, plan.root))

    def _find(self, trial: FrozenTrial) -> TrialRuns | None:
        """Return the runs of a trial; None if its settings were refused or never drawn to the end."""
        settings = self._space.settings(trial.params or trial.system_attrs.get("fixed_params", {}))
        try:
            return None if settings is None else self._runs(settings)
        except SpecError:
            return None

    def _record(self, runs: TrialRuns, trial: FrozenTrial) -> tuple[ArmRecord, TrialRecord]:
        is_measured = trial.state is TrialState.COMPLETE and not _is_diverged(trial)
        names = [objective.metric for objective in self.objectives]
        values = dict(zip(names, trial.values, strict=True)) if is_measured else {}
        record = {
            "arm": runs.arm.label,
            "state": _state(trial),
            "value": values.get(runs.metric),
            "params": runs.settings,
            "values": values,
        }
        return arm_record(runs.arm, runs.runs.values()), TrialRecord.model_validate(record)

    def _content(self) -> list[object]:
        """Return all that the trials of a study share, as plain data."""
        space = {path: interval.model_dump(mode="json") for path, interval in self._config.space.items()}
        return [
            list(space.items()),
            [[objective.metric, objective.goal] for objective in self.objectives],
            list(self._plan.experiment.seeds),
            self._arm.config.model_dump(mode="json"),
            [identify_run(self._arm.config, seed, self._plan.inventory).run_id for seed in self._plan.experiment.seeds],
        ]


class SearchWork:
    """The work of a sweep with a search: one search for every arm of the plan, taken in turn.

    The sweep's manifest shows all trials as arms.

    Args:
        plan: of an experiment with a search.
        directory: the sweep's folder, which holds the studies unless the spec names a database.

    Raises:
        SpecError: the database cannot be used, or no setting that is drawn is valid.
    """

    is_divergence_a_result = True  # the worst one

    def __init__(self, plan: Plan, directory: SweepDirectory) -> None:
        self._plan, self._directory = plan, directory
        assert plan.experiment.search
        try:
            # A database of results holds no rehearsals.
            is_rehearsal = isinstance(plan.experiment.arms[0], RehearsedArm)
            storage = open_storage(None if is_rehearsal else storage_url(plan.experiment.search), directory.study)
        except StorageError as error:
            raise SpecError([plan.experiment.problem("search.storage", str(error))]) from None
        begun = frozenset(directory.manifest.run_ids if directory.is_recorded else ())
        self._searches = [Search(plan, arm, storage, begun) for arm in plan.experiment.arms]
        self._handed_out: set[str] = set()
        self._record()

    def next(self) -> Task | None:
        """Return the next run to train, of the search that has taken up the fewest trials."""
        for search in sorted(self._searches, key=lambda search: search.taken):
            taken = search.taken
            # A run that another search has handed out is trained once, and both searches hear of it.
            while (task := search.next()) and task.run.run_id in self._handed_out:
                pass
            if search.taken != taken:
                self._record()
            if task:
                self._handed_out.add(task.run.run_id)
                return task
        return None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """Return the ids of the runs to prune after a run wrote a row."""
        return [pruned for search in self._searches for pruned in search.heard(run_id, row)]

    def finished(self, run_id: str, state: State) -> None:
        """Note that a run has ended; its directory says how."""
        self._handed_out.discard(run_id)
        for search in self._searches:
            search.finished(run_id)
        self._record()

    def counts(self) -> tuple[int, int]:
        """Return the number of runs that have ended, and of all runs as far as is known."""
        counts = [search.counts() for search in self._searches]
        return sum(ended for ended, _ in counts), sum(total for _, total in counts)

    def _record(self) -> None:
        records = [record for search in self._searches for record in search.records()]
        objectives = self._searches[0].objectives
        measured = next(objective for objective in objectives if not objective.is_cost)
        is_front = len(objectives) > 1
        search = SearchRecord(
            metric=measured.metric,
            goal=measured.goal,
            trials=tuple(trial for _, trial in records),
            exhausted={label: count for each in self._searches for label, count in each.exhausted.items()},
            objectives=tuple(ObjectiveRecord(metric=each.metric, goal=each.goal) for each in objectives),
            pareto=tuple(label for each in self._searches for label in each.pareto_front()) if is_front else (),
        )
        arms = {arm.label: arm for arm, _ in records}  # a repeated setting is one arm
        self._directory.record(self._plan.manifest([*arms.values()], search))


def _by_full_name(objective: Objective, plan: Plan, arm: Arm) -> Objective:
    """Return an objective under the full name by which the runs of an arm measure it."""
    if objective.is_cost:
        return objective
    name = resolve_metric(objective.metric, metric_names(arm.config)) or plan.metric(objective.metric)
    return objective.model_copy(update={"metric": name})


def _state(trial: FrozenTrial) -> str:
    """Return the state of a trial as the sweep's manifest has it."""
    if _REPEATS in trial.user_attrs:
        return "repeated"
    if _is_diverged(trial):
        return "diverged"
    return "failed" if trial.state is TrialState.FAIL else trial.state.name.lower()


def _is_diverged(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and any(math.isinf(value) for value in trial.values)


def _goes_on(run: RunDirectory, begun: Set[str]) -> bool:
    """Return whether a run makes its trial one to complete; a run in training may be another sweep's."""
    status = run.status()
    return status in (RunStatus.RESUMABLE, RunStatus.FAILED) or (run.run_id in begun and status is not RunStatus.NEW)
