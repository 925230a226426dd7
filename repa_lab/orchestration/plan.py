"""What a sweep would do: its runs by identity, the status of each, and what stands in the way. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from repa_lab.errors import hide_passwords, shortened
from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.orchestration.checks import check, resolve_metric
from repa_lab.orchestration.scheduler import Task
from repa_lab.orchestration.search.space import STORAGE_VARIABLE, storage_url
from repa_lab.orchestration.sharing import share
from repa_lab.runs import RunsRoot, RunStatus, SweepManifest
from repa_lab.runs.checkpoints import Fork
from repa_lab.runs.files import LinkError, require_no_links
from repa_lab.runs.root import ArmRecord, ComparisonRecord, OrphanRecord, RunRecord, SearchRecord, TrackingRecord
from repa_lab.spec import Arm, Experiment, Problem, RunConfig, SpecError, StopRule
from repa_lab.spec.experiment import holds
from repa_lab.spec.identity import Run, identify, local_files
from repa_lab.tracking.server import resolve_mode
from repa_lab.training.resolve import Inventory, metric_names, plugins_of

BLOCKED = "blocked"
_MAX_LISTED = 10


@dataclass(frozen=True)
class PlannedRun:
    """A run of the plan.

    Attributes:
        arm: the arm that asks for the run.
        run: the run.
        status: the run's status for this sweep, whose stop rules decide whether the run is stopped.
        step: the step of the last checkpoint; of a run that is running or over, the last recorded step.
        error: the reason of a failure in one line.
        blocked: why the run cannot be trained here, or None.
        stop: the rules that end the run early.
    """

    arm: Arm
    run: Run
    status: RunStatus
    step: int
    error: str | None
    blocked: Problem | None
    stop: tuple[StopRule, ...] = ()

    @property
    def word(self) -> str:
        """The status, or ``blocked`` for a run that is left to train and cannot be trained here."""
        is_blocked = self.blocked and not self.status.is_over and self.status is not RunStatus.RUNNING
        return BLOCKED if is_blocked else self.status.value

    @property
    def task(self) -> Task:
        """The task of training the run."""
        return Task(self.run, f"{self.arm.label}, seed {self.run.seed}", stop=self.stop)

    @property
    def steps_left(self) -> int:
        """Optimizer steps to take from the last checkpoint on, which may lie behind the last row."""
        return 0 if self.status.is_over else self.run.config.train.steps - self.step


@dataclass(frozen=True)
class Match:
    """What an arm is compared with.

    Attributes:
        baseline: label of the matched baseline; None if there is none.
        reason: why there is none; empty for a baseline.
    """

    baseline: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment, the first seed of all arms first; for a search, the arms that it starts from."""

    experiment: Experiment
    root: RunsRoot
    runs: tuple[PlannedRun, ...]
    inventory: Inventory = field(default_factory=Inventory, compare=False, repr=False)

    @cached_property
    def baselines(self) -> dict[str, Match]:
        """What every arm is compared with, by label; empty for a search, whose trials are compared with each other."""
        return {} if self.experiment.search else match_baselines(self.experiment)

    @cached_property
    def orphans(self) -> tuple[OrphanRecord, ...]:
        """Begun runs that an earlier version of the spec asked for and this one does not; they are never deleted.

        The trials of a search are no orphans: the spec asks for them without naming them.
        """
        if (manifest := self._recorded) is None or manifest.search:
            return ()
        planned = {entry.run.run_id for entry in self.runs}
        recorded = [OrphanRecord(label=arm.label, **run.model_dump()) for arm in manifest.arms for run in arm.runs]
        left = {run.run_id: run for run in (*recorded, *manifest.orphaned) if run.run_id not in planned}
        return tuple(run for run_id, run in left.items() if self.root.run(run_id).status() is not RunStatus.NEW)

    @cached_property
    def other_sweep(self) -> Problem | None:
        """Why another sweep than an earlier version of this one stands under its name; None if none does."""
        if self._shares_runs or self._asks_the_same:
            return None
        assert self._recorded
        place = self.root.sweep(self.experiment.name).path
        arms = shortened("; ".join(dict.fromkeys(arm.label for arm in self._recorded.arms)))
        message = (
            f"'{place}' holds another sweep, of which this one has no run (its arms: {arms}): give another name, or "
            "--replace (in Python, replace=True) to take its place; its runs stay"
        )
        return self.experiment.problem("name", message)

    @cached_property
    def _recorded(self) -> SweepManifest | None:
        directory = self.root.sweep(self.experiment.name)
        return directory.manifest if directory.is_recorded else None

    @cached_property
    def _shares_runs(self) -> bool:
        """Whether this sweep has a run of the recorded one, or there is none to share."""
        if self._recorded is None:
            return True
        recorded = {*self._recorded.run_ids, *(run.run_id for run in self._recorded.orphaned)}
        planned = chain((entry.run.run_id for entry in self.runs), self._recorded_trials())
        return not recorded or any(run_id in recorded for run_id in planned)

    def _recorded_trials(self) -> Iterator[str]:
        """Yield the ids that the runs of the recorded search's trials have by this spec."""
        search = self._recorded and self._recorded.search
        for trial in search.trials if search and self.experiment.search else ():
            for arm in self.experiment.arms:
                with suppress(SpecError):  # the settings are refused by now
                    config = arm.with_settings(trial.params).config
                    yield from (identify_run(config, seed, self.inventory).run_id for seed in self.experiment.seeds)

    @property
    def _asks_the_same(self) -> bool:
        """Whether this sweep has the question of the recorded one, and an arm's name or a searched field in common."""
        recorded, experiment = self._recorded, self.experiment
        if recorded is None or recorded.question != experiment.question:
            return False
        if recorded.search and experiment.search:
            return any(path in experiment.search.space for trial in recorded.search.trials for path in trial.params)
        return not {arm.label for arm in experiment.arms}.isdisjoint(arm.label for arm in recorded.arms)

    @cached_property
    def left(self) -> tuple[PlannedRun, ...]:
        """The runs to train, each once even where two arms ask for it."""
        return tuple({entry.run.run_id: entry for entry in self.runs if not entry.status.is_over}.values())

    @cached_property
    def pending(self) -> tuple[Run, ...]:
        """The runs to train, without what the plan knows of them."""
        return tuple(entry.run for entry in self.left)

    @cached_property
    def forks(self) -> dict[str, Fork]:
        """Where runs to train begin that share their first steps with others, by id; empty if that is switched off."""
        if self.experiment.search is not None or not self.experiment.run.share:
            return {}
        done = {entry.run.run_id: entry.run for entry in self.runs if entry.status is RunStatus.DONE}
        return share(self.pending, [*done.values(), *self._finished_orphans()], self.root)

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps of the runs to train: ``asked``, each run by itself, and ``trained``, as they share them."""
        asked = sum(entry.steps_left for entry in self.left)
        return {"asked": asked, "trained": asked - sum(fork.step for fork in self.forks.values())}

    def _finished_orphans(self) -> Iterator[Run]:
        """Yield finished runs of an earlier version of the spec whose data and weights are unchanged."""
        for orphan in self.orphans:
            directory = self.root.run(orphan.run_id)
            with suppress(ValueError, OSError):  # of another version of repa-lab, or its data is gone
                run = Run.read(directory)
                if directory.status() is RunStatus.DONE and identify_run(run.config, run.seed, self.inventory) == run:
                    yield run

    @property
    def blocked(self) -> Problem | None:
        """The first reason why the sweep cannot be trained here."""
        return next((entry.blocked for entry in self.runs if entry.blocked), None)

    @cached_property
    def warnings(self) -> list[str]:
        """What a user may not expect: few images, numbers that mislead, dropped runs, a study elsewhere; each once."""
        texts: list[str | None] = []
        for entry in self.runs:
            data, count = entry.arm.config.data, entry.run.config.data.holdout
            if data.holdout is None and count != data.held_out(None):
                images = self.inventory.dataset(data).images
                texts.append(f"{count} of {images} images are held out, for a tenth is less than 256 (data.holdout)")
        trained = dict.fromkeys(arm.config.train for arm in self.experiment.arms)
        texts += [train.averaging.warning(train.steps) for train in trained]
        if self._asks_the_same and not self._shares_runs:
            texts.append("no run of the sweep's earlier version is asked for any more; its runs stay")
        search = self.experiment.search
        if search and search.storage is None and (url := storage_url(search)):
            texts.append(f"the study is kept in {hide_passwords(url)}, by {STORAGE_VARIABLE} in the environment")
        return list(dict.fromkeys(filter(None, texts)))

    def metric(self, name: str) -> str:
        """Return the full name of a metric that the spec may call by its kind."""
        measured = dict.fromkeys(metric for arm in self.experiment.arms for metric in metric_names(arm.config))
        return resolve_metric(name, measured) or name

    def manifest(self, arms: list[ArmRecord] | None = None, search: SearchRecord | None = None) -> SweepManifest:
        """Return the manifest of the sweep; a search gives its trials as arms."""
        compare, wandb, targets = self.experiment.compare, self.experiment.run.wandb, dict[str, list[float]]()
        for metric, values in compare.targets.items():  # a metric may be called by its kind and by its name
            known = targets.setdefault(self.metric(metric), [])
            known += [value for value in values if value not in known]
        if arms is None:
            runs = {arm.label: [entry.run for entry in self.runs if entry.arm is arm] for arm in self.experiment.arms}
            arms = [arm_record(arm, runs[arm.label], self.baselines[arm.label]) for arm in self.experiment.arms]
        return SweepManifest(
            name=self.experiment.name,
            question=self.experiment.question,
            seeds=self.experiment.seeds,
            compare=ComparisonRecord(metric=self.metric(compare.metric), goal=compare.goal, targets=targets),
            arms=tuple(arms),
            search=search,
            orphaned=self.orphans,
            wandb=TrackingRecord(**dict(wandb) | {"mode": resolve_mode(wandb.mode)}),
        )


def arm_record(arm: Arm, runs: Iterable[Run], match: Match = Match()) -> ArmRecord:
    """Return an arm as the sweep's manifest has it."""
    records = tuple(RunRecord(seed=run.seed, run_id=run.run_id) for run in runs)
    label, levels = arm.label, dict(arm.levels)
    return ArmRecord(label=label, levels=levels, baseline=match.baseline, unmatched=match.reason, runs=records)


def make_plan(experiment: Experiment, root: RunsRoot) -> Plan:
    """Plan an experiment; nothing is created.

    Raises:
        SpecError: the experiment cannot be right; see :func:`repa_lab.orchestration.checks.check`.
    """
    inventory = Inventory()
    check(experiment, inventory)
    return Plan(experiment, root, tuple(_planned_runs(experiment, root, inventory)), inventory)


def _planned_runs(experiment: Experiment, root: RunsRoot, inventory: Inventory) -> Iterator[PlannedRun]:
    for seed in experiment.seeds:
        for arm in experiment.arms:
            names = metric_names(arm.config)
            rules = [(rule, resolve_metric(rule.metric, names)) for rule in experiment.stop]
            stop = tuple(rule.model_copy(update={"metric": name}) for rule, name in rules if name)
            run = identify_run(arm.config, seed, inventory)
            directory = root.run(run.run_id)
            status, recorded, step = (
                directory.status([r.holds for r in stop]),
                directory.state,
                directory.checkpoint_step,
            )
            if status.is_over or status is RunStatus.RUNNING:
                step = max(recorded.step, step)
            obstacle = None
            if arm.config.data.is_unset:
                obstacle = arm.problem("data.path", "not set; give a folder of images with --set data.path=FOLDER")
            elif not status.is_over:
                try:
                    require_no_links(*directory.links)
                except LinkError as error:
                    obstacle = experiment.problem((), str(error))
            yield PlannedRun(arm, run, status, step, recorded.error, obstacle, stop)


def identify_run(config: RunConfig, seed: int, inventory: Inventory | None = None) -> Run:
    """Return the run of these settings with a seed.

    Args:
        inventory: the data sets and weights on this machine; None reads them anew.
    """
    inventory = inventory or Inventory()
    contents = {place: inventory.content(place) for place in local_files(config)}
    plugins = (origin.digest for origin in plugins_of(config))
    fingerprint = inventory.dataset(config.data).fingerprint
    return identify(inventory.resolve(config), seed, PROTOCOL_VERSION, fingerprint, contents, plugins)


def match_baselines(experiment: Experiment) -> dict[str, Match]:
    """Return what every arm is compared with, by label: the baseline that shares the most axis levels with the arm.

    A baseline is compared with nothing. Baselines with the same settings are one.
    """
    condition, arms = experiment.compare.baseline, experiment.arms
    baselines = [arm for arm in arms if _is_baseline(arm, condition)]
    candidates = list({arm.asked: arm for arm in reversed(baselines)}.values())[::-1]
    if not candidates:
        alike = [arm.label for arm in arms if holds(condition, arm.levels, arm.asked.model_dump(mode="json"))]
        unused = f" (in {listed(alike)} it has no effect)" if alike else ""
        reason = f"no arm has compare.baseline {json.dumps(condition, ensure_ascii=False)}{unused}"
        return {arm.label: Match(reason=reason) for arm in arms}
    labels = {arm.label for arm in baselines}
    return {arm.label: Match() if arm.label in labels else _nearest(arm, candidates) for arm in arms}


def _is_baseline(arm: Arm, condition: Mapping[str, Any]) -> bool:
    """Return whether an arm has the values of a condition.

    A value that has no effect in the arm, such as the temperature of another loss, counts only if the arm is at that
    level of an axis.
    """
    on_axes = {key: wanted for key, wanted in condition.items() if key in arm.levels}
    others = {key: wanted for key, wanted in condition.items() if key not in arm.levels}
    return holds(on_axes, arm.levels, arm.asked.model_dump(mode="json")) and holds(others, arm.levels, arm.used)


def _nearest(arm: Arm, candidates: Sequence[Arm]) -> Match:
    shared = {other.label: len(arm.levels.items() & other.levels.items()) for other in candidates}
    most = max(shared.values())
    nearest = [label for label, count in shared.items() if count == most]
    if len(nearest) == 1:
        return Match(nearest[0])
    levels = f"share {most} of its levels each" if most else "share none of its levels"
    return Match(reason=f"{listed(nearest)} are equally near: they {levels}")


def listed(labels: Sequence[str]) -> str:
    """Return labels in quotation marks, those beyond the tenth as a number."""
    more = [f"{len(labels) - _MAX_LISTED} more"] if len(labels) > _MAX_LISTED else []
    return ", ".join([*(f"'{label}'" for label in labels[:_MAX_LISTED]), *more])
