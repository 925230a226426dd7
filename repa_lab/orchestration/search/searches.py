"""The searches of a sweep, one for each of its arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from repa_lab.orchestration.checks import resolve_metric
from repa_lab.orchestration.executors import Task
from repa_lab.orchestration.plan import Plan, arm_record, identify_arm
from repa_lab.orchestration.rehearsal import RehearsedArm
from repa_lab.orchestration.search.group import Aim
from repa_lab.orchestration.search.reach import is_searched
from repa_lab.orchestration.search.restore import run_ids
from repa_lab.orchestration.search.study import StorageError, open_storage, open_study, study_name
from repa_lab.orchestration.search.trials import Search
from repa_lab.orchestration.search.work import RefusedSpaceError, SearchWork
from repa_lab.runs import State, SweepDirectory
from repa_lab.runs.files import Row
from repa_lab.spec import Arm, SearchConfig, SpecError
from repa_lab.training.resolve import metric_names

STUDY = "study.db"


class Searches:
    """One search for every arm of a plan, taken in turn; the sweep's folder shows all their trials as arms.

    Args:
        plan: of an experiment with a ``search``.
        directory: the sweep's, which holds the studies unless the spec names a database.

    Raises:
        SpecError: the database that the spec names cannot be used.
    """

    is_divergence_a_result = True  # the worst one

    def __init__(self, plan: Plan, directory: SweepDirectory) -> None:
        self._plan, self._directory = plan, directory
        config = plan.experiment.search
        assert config
        try:
            # A database of results holds no rehearsals.
            is_rehearsal = isinstance(plan.experiment.arms[0], RehearsedArm)
            storage = open_storage(None if is_rehearsal else config.storage, directory.path / STUDY)
        except StorageError as error:
            raise SpecError([plan.experiment.problem("search.storage", str(error))]) from None
        begun = run_ids(directory.manifest) if (directory.path / "sweep.json").is_file() else frozenset[str]()
        identify = partial(identify_arm, inventory=plan.inventory)
        self._searches: list[SearchWork] = []
        for arm in plan.experiment.arms:
            own = config if is_searched(arm, config.space) else config.model_copy(update={"trials": 1})
            search = Search(arm, own, _aims(plan, arm, config), plan.experiment.seeds, identify, plan.root)
            name = study_name(plan.experiment.name, arm.label, search.content())
            study = open_study(storage, name, config, search.aims, arm.config.train.steps)
            self._searches.append(SearchWork(search, study, begun, self._recorded))
        self._aims = _aims(plan, plan.experiment.arms[0], config)
        self._handed: set[str] = set()
        self._recorded()

    def next(self) -> Task | None:
        """See :class:`Work`; the search that has taken up least goes first."""
        for search in sorted(self._searches, key=lambda search: search.taken):
            try:
                while task := search.next():
                    if (
                        task.run.run_id not in self._handed
                    ):  # else another search has it trained, and both will hear of it
                        self._handed.add(task.run.run_id)
                        return task
            except RefusedSpaceError as error:
                raise SpecError([self._plan.experiment.problem("search.space", str(error))]) from None
        return None

    def heard(self, run_id: str, row: Row) -> Iterable[str]:
        """See :class:`Work`."""
        return [pruned for search in self._searches for pruned in search.heard(run_id, row)]

    def finished(self, run_id: str, state: State) -> None:
        """See :class:`Work`."""
        self._handed.discard(run_id)
        for search in self._searches:
            search.finished(run_id, state)

    def counts(self) -> tuple[int, int]:
        """See :class:`Work`."""
        each = [search.counts() for search in self._searches]
        return sum(done for done, _ in each), sum(total for _, total in each)

    def _recorded(self) -> None:
        trials = [trial for search in self._searches for trial in search.trials]
        arms = [arm_record(trial.arm, None, list(trial.runs)) for trial in trials]
        measured = next(aim for aim in self._aims if not aim.is_cost)
        search: dict[str, Any] = {
            "metric": measured.name,
            "goal": measured.goal,
            "trials": [trial.record for trial in trials],
        }
        search["objectives"] = [{"metric": aim.name, "goal": aim.goal} for aim in self._aims]
        if len(self._aims) > 1:
            search["pareto"] = [label for one in self._searches for label in one.front]
        self._directory.record(self._plan.manifest(arms, search))


def _aims(plan: Plan, arm: Arm, config: SearchConfig) -> tuple[Aim, ...]:
    """The objectives under the full names by which the runs of an arm measure them."""

    def name(wanted: str) -> str:
        return resolve_metric(wanted, metric_names(arm.config)) or plan.metric(wanted)

    aims: Sequence[Aim] = [Aim(one.metric if one.is_cost else name(one.metric), one.goal) for one in config.objectives]
    return tuple(aims)
