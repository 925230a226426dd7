"""What a sweep would do: its runs by identity, what is done already, what is left, what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.orchestration.check import blocked, check, resolve_metric
from repa_lab.orchestration.orphans import Orphan, orphans_of
from repa_lab.orchestration.sharing import Sharing, share
from repa_lab.runs import RunDirectory, RunsRoot, RunStatus
from repa_lab.spec import Arm, Experiment, Problem, RunConfig, StopRule
from repa_lab.spec.expand import holds
from repa_lab.spec.identity import Run, identify, local_files
from repa_lab.training.fingerprints import Inventory
from repa_lab.training.needs import plugins_of
from repa_lab.training.protocol import metric_names

BLOCKED = "blocked"


@dataclass(frozen=True)
class PlannedRun:
    """A run of the plan.

    Attributes:
        arm: the arm that asks for it.
        run: the run.
        status: where it stands for this sweep, whose stop rules decide whether it is stopped.
        step: the step of its last checkpoint, from which it goes on; the last recorded one of a run that is running or
            over.
        error: the reason of a failure in one line.
        blocked: why it cannot be trained here, or None.
        stop: the rules that end it early.
    """

    arm: Arm
    run: Run
    status: RunStatus
    step: int
    error: str | None
    blocked: Problem | None
    stop: tuple[StopRule, ...] = ()

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to train for this sweep."""
        return self.status.is_over

    @property
    def word(self) -> str:
        """The status, or ``blocked`` for a run that is left to train and cannot be trained here."""
        is_blocked = self.blocked and not self.is_settled and self.status is not RunStatus.RUNNING
        return BLOCKED if is_blocked else self.status.value

    @property
    def steps_left(self) -> int:
        """Optimizer steps that are still to be taken, from the last checkpoint on, which may lie behind the last row."""
        return 0 if self.is_settled else self.run.config.train.steps - self.step


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment, seed 0 of all arms first; for a search, those of its arms before anything is varied."""

    experiment: Experiment
    root: RunsRoot
    runs: tuple[PlannedRun, ...]
    inventory: Inventory = field(default_factory=Inventory, compare=False, repr=False)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What was chosen because of how few images there are."""
        given = [(p.arm.config.data, p.run.config.data.holdout) for p in self.runs if p.arm.config.data.holdout is None]
        small = [(data, held) for data, held in given if held != data.held_out(None)]
        notes = (f"{held} of {self.inventory.dataset(data).images} images" for data, held in small)
        return tuple(
            f"{note} are held out, for a tenth is less than 256 (data.holdout)" for note in dict.fromkeys(notes)
        )

    @cached_property
    def orphans(self) -> tuple[Orphan, ...]:
        """Runs that an earlier version of the spec asked for and this one does not."""
        return orphans_of(self.root, self.experiment.name, {planned.run.run_id for planned in self.runs})

    @cached_property
    def left(self) -> tuple[PlannedRun, ...]:
        """Runs to train, each once even where two arms ask for it."""
        return tuple({planned.run.run_id: planned for planned in self.runs if not planned.is_settled}.values())

    @cached_property
    def pending(self) -> tuple[Run, ...]:
        """The runs to train by themselves."""
        return tuple(planned.run for planned in self.left)

    @cached_property
    def sharing(self) -> Sharing:
        """What the runs that are left have in common with each other and with those that are done, if it may be shared."""
        if self.experiment.search is not None or not self.experiment.run.share:
            asked = sum(planned.steps_left for planned in {p.run.run_id: p for p in self.runs}.values())
            return Sharing({}, asked, asked)
        done = {planned.run.run_id: planned.run for planned in self.runs if planned.status is RunStatus.DONE}
        return share(self.pending, [*done.values(), *self._done_before()], self.root)

    def _done_before(self) -> Iterator[Run]:
        """Finished runs of an earlier version of the spec, whose data and weights are those that are here now."""
        for orphan in self.orphans:
            directory = self.root.run(orphan.run_id)
            with suppress(ValueError, OSError):  # of an older version, or its data is gone
                run = Run.from_json(orphan.run_id, directory.spec)
                if directory.status() is RunStatus.DONE and identify_run(run.config, run.seed, self.inventory) == run:
                    yield run

    @property
    def blocked(self) -> Problem | None:
        """The first reason why the sweep cannot be trained here."""
        return next((planned.blocked for planned in self.runs if planned.blocked), None)

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader of the arms' numbers should know before they are trained, each sentence once."""
        trained = dict.fromkeys(arm.config.train for arm in self.experiment.arms)
        return list(dict.fromkeys(text for train in trained if (text := train.averaging.warning(train.steps))))

    @property
    def measured(self) -> list[str]:
        """Full names of what the arms measure of their samples."""
        return list(dict.fromkeys(name for arm in self.experiment.arms for name in metric_names(arm.config)))

    def metric(self, wanted: str) -> str:
        """The full name of a metric that the spec calls by its kind."""
        return resolve_metric(wanted, self.measured) or wanted

    def manifest(
        self, arms: list[dict[str, Any]] | None = None, search: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What :meth:`SweepDirectory.record` keeps; a search gives its trials as arms."""
        compare = self.experiment.compare
        return {
            "name": self.experiment.name,
            "question": self.experiment.question,
            "seeds": list(self.experiment.seeds),
            "compare": {
                "metric": self.metric(compare.metric),
                "goal": compare.goal,
                "targets": self._targets(),
            },
            "arms": arms if arms is not None else self._arms(),
            "search": search,
            **({"orphaned": [orphan.record() for orphan in self.orphans]} if self.orphans else {}),
        }

    def _targets(self) -> dict[str, list[float]]:
        """By full name: a metric may be called by its kind and by its name."""
        targets: dict[str, list[float]] = {}
        for metric, values in self.experiment.compare.targets.items():
            known = targets.setdefault(self.metric(metric), [])
            known += [value for value in values if value not in known]
        return targets

    def _arms(self) -> list[dict[str, Any]]:
        matched, runs = baselines(self.experiment), dict[str, list[Run]]()
        for planned in self.runs:
            runs.setdefault(planned.arm.label, []).append(planned.run)
        return [arm_record(arm, matched[arm.label], runs[arm.label]) for arm in self.experiment.arms]


def arm_record(arm: Arm, baseline: str | None, runs: list[Run]) -> dict[str, Any]:
    """An arm as plain data for the sweep's manifest."""
    identified = [{"seed": run.seed, "run_id": run.run_id} for run in runs]
    return {"label": arm.label, "levels": dict(arm.levels), "baseline": baseline, "runs": identified}


def make_plan(experiment: Experiment, root: RunsRoot) -> Plan:
    """Plan an experiment; nothing is created.

    Raises:
        SpecError: the experiment cannot be right; see `check`.
    """
    inventory = Inventory()
    check(experiment, inventory)
    obstacles = {arm.label: blocked(arm) for arm in experiment.arms}
    runs = []
    for seed in experiment.seeds:
        for arm in experiment.arms:
            run = identify_arm(arm, seed, inventory)
            runs.append(_planned(arm, run, root.run(run.run_id), obstacles[arm.label], _rules(experiment, arm)))
    return Plan(experiment, root, tuple(runs), inventory)


def _planned(
    arm: Arm, run: Run, directory: RunDirectory, obstacle: Problem | None, stop: tuple[StopRule, ...]
) -> PlannedRun:
    status, recorded = directory.status([rule.holds for rule in stop]), directory.state
    step = directory.checkpoint_step
    if status.is_over or status is RunStatus.RUNNING:
        step = max(recorded.step, step)
    return PlannedRun(arm, run, status, step, recorded.error, obstacle, stop)


def _rules(experiment: Experiment, arm: Arm) -> tuple[StopRule, ...]:
    """The rules that are about what an arm measures, by its full name."""
    named = [(rule, resolve_metric(rule.metric, metric_names(arm.config))) for rule in experiment.stop]
    return tuple(rule.model_copy(update={"metric": name}) for rule, name in named if name)


def identify_arm(arm: Arm, seed: int, inventory: Inventory | None = None) -> Run:
    """The run of an arm with a seed."""
    return identify_run(arm.config, seed, inventory)


def identify_run(config: RunConfig, seed: int, inventory: Inventory | None = None) -> Run:
    """The run of these settings with a seed, over the data and weights that are in the inventory, None being those of now."""
    inventory = inventory or Inventory()
    contents = {place: inventory.content(place) for place in local_files(config)}
    plugins = (origin.digest for origin in plugins_of(config))
    fingerprint = inventory.dataset(config.data).fingerprint
    return identify(inventory.resolve(config), seed, PROTOCOL_VERSION, fingerprint, contents, plugins)


def baselines(experiment: Experiment) -> dict[str, str | None]:
    """The matched baseline of every arm, by label: the one that shares the most axis levels with it; None for a baseline."""
    wanted = experiment.compare.baseline
    candidates = [arm for arm in experiment.arms if _satisfies(arm, wanted)]
    return {arm.label: None if arm in candidates else _nearest(arm, candidates) for arm in experiment.arms}


def _nearest(arm: Arm, candidates: list[Arm]) -> str | None:
    """The candidate with the most levels in common; none if several share as many, for then no match is the right one."""
    shared = [(len(arm.levels.items() & candidate.levels.items()), candidate.label) for candidate in candidates]
    most = max(shared, default=(0, ""))[0]
    nearest = [label for count, label in shared if count == most]
    return nearest[0] if len(nearest) == 1 else None


def _satisfies(arm: Arm, wanted: Mapping[str, Any]) -> bool:
    """Whether an arm is a baseline."""
    return holds(wanted, arm.levels, arm.asked.model_dump(mode="json"))
