"""What is left of a plan in GPU hours and bytes, run by run and in all, and the refusal of what is beyond the budget."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import image_files
from repa_lab.data.layout import IMAGES
from repa_lab.runs import RunDirectory, RunsRoot
from repa_lab.runs.files import read_json
from repa_lab.runs.forks import Fork
from repa_lab.spec import Arm, Problem, RunConfig, SpecError
from repa_lab.spec.identity import Run
from repa_lab.spec.schema import DataConfig
from repa_lab.sweep.plan import Plan, PlannedRun
from repa_lab.sweep.speed import PUBLISHED, UTILISATION, Device, Measured, Speed, assumed_device, assumed_speed, kind_of
from repa_lab.training.costs import Cache, Cost, caches_of, cost_of, images_of

GIB = float(2**30)
_HOUR = 3600.0
_OWN, _OTHERS = 300, 500  # started runs, of this and of other sweeps, that are asked for their speed


@dataclass(frozen=True)
class Share:
    """What a run, an arm, or all of a sweep still takes.

    Attributes:
        runs: how many are left.
        steps: optimizer steps.
        images: seen in training.
        flops: of training and evaluations.
        gpu_hours: on one device; of a worker's time on a CPU.
        disk_bytes: of checkpoints that are not there yet.
    """

    runs: int = 0
    steps: int = 0
    images: int = 0
    flops: float = 0.0
    gpu_hours: float = 0.0
    disk_bytes: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.runs + other.runs,
            self.steps + other.steps,
            self.images + other.images,
            self.flops + other.flops,
            self.gpu_hours + other.gpu_hours,
            self.disk_bytes + other.disk_bytes,
        )

    def times(self, factor: float) -> Share:
        """As much of it, in whole runs, steps and images."""
        runs, steps, images = (round(value * factor) for value in (self.runs, self.steps, self.images))
        return Share(runs, steps, images, self.flops * factor, self.gpu_hours * factor, self.disk_bytes * factor)


@dataclass(frozen=True)
class PlannedCache:
    """A cache of the sweep.

    Attributes:
        cache: what it is.
        images: how many it is of, None where that is not known.
        is_begun: whether a run that needs it has started, so that it is there.
        gpu_hours: to fill it, 0 where it is there or its images are not known.
        disk_bytes: likewise.
    """

    cache: Cache
    images: int | None
    is_begun: bool
    gpu_hours: float
    disk_bytes: float


@dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    Attributes:
        plan: the plan.
        costs: of each arm, by label.
        speeds: likewise.
        shares: of each run of the plan, in its order; one that two arms ask for has the same in both.
        caches: of all arms, each once.
        total: runs once each, with all caches; of a search, all trials that are left.
        saved_hours: what caches save of training, beyond what it takes to fill those whose number of images is known.
        device: what the speeds are assumed for where none were measured.
        reason: why that device.
    """

    plan: Plan
    costs: dict[str, Cost]
    speeds: dict[str, Speed]
    shares: tuple[Share, ...]
    caches: tuple[PlannedCache, ...]
    total: Share
    saved_hours: float
    device: Device
    reason: str

    @property
    def notes(self) -> list[str]:
        """What all of it rests on, a sentence each."""
        return [*_speed_notes(self), *dict.fromkeys(note for cost in self.costs.values() for note in cost.rough)]


def estimate(plan: Plan) -> Estimate:
    """Estimate what is left of a plan; reads run directories of the root for their speeds."""
    options, arms = plan.experiment.run, plan.experiment.arms
    costs = {arm.label: cost_of(arm.config, options) for arm in arms}
    device, reason = assumed_device(options)
    speeds = _speeds(plan, costs, device)
    forks = plan.sharing.forks
    shares = tuple(
        _share(entry, forks.get(entry.run.run_id), costs[entry.arm.label], speeds[entry.arm.label]) for entry in plan.runs
    )
    caches = tuple(_caches(plan, speeds))
    once = {entry.run.run_id: (entry, share) for entry, share in zip(plan.runs, shares, strict=True)}
    factor = _trials_left(plan) / max(1, len(once)) if plan.experiment.search else 1.0
    total = sum((share for _, share in once.values()), Share()).times(factor)
    filled = Share(gpu_hours=sum(one.gpu_hours for one in caches), disk_bytes=sum(one.disk_bytes for one in caches))
    spared = sum(share.images * _saved(costs, speeds, entry) for entry, share in once.values()) * factor
    return Estimate(plan, costs, speeds, shares, caches, total + filled, spared - filled.gpu_hours, device, reason)


def require_budget(plan: Plan) -> None:
    """Refuse what would take more than the spec's budget.

    Raises:
        SpecError: at the limit that does not suffice, with both numbers.
    """
    budget = plan.experiment.budget
    if budget.gpu_hours is None and budget.disk_gib is None:
        return
    if problems := list(_over_budget(estimate(plan))):
        raise SpecError(problems)


def _over_budget(found: Estimate) -> Iterator[Problem]:
    experiment, total = found.plan.experiment, found.total
    needed = {"gpu_hours": (total.gpu_hours, "GPU hours"), "disk_gib": (total.disk_bytes / GIB, "GiB")}
    for name, (value, unit) in needed.items():
        limit = getattr(experiment.budget, name)
        if limit is not None and value > limit:
            advice = f"allow it with --set budget.{name}={_rounded_up(value)}, or ask for less; see `repa-lab plan`"
            message = f"what is left takes about {value:,.3g} {unit}, the budget is {limit:,.6g}: {advice}"
            yield experiment.problem(f"budget.{name}", message)


def _rounded_up(value: float) -> float:
    """A number of two digits that suffices."""
    rounded = float(f"{value:.2g}")
    return rounded if rounded >= value else float(f"{value * 1.1:.2g}")


def _speeds(plan: Plan, costs: dict[str, Cost], device: Device) -> dict[str, Speed]:
    options, arms = plan.experiment.run, plan.experiment.arms
    dumped = options.model_dump(mode="json")
    kinds = {arm.label: kind_of(arm.config, dumped, options.gpus_per_run) for arm in arms}
    measured = Measured(_begun(plan), frozenset(kinds.values()))

    def speed(arm: Arm) -> Speed:
        found = measured.speed(arm.config, kinds[arm.label], costs[arm.label])
        return found or assumed_speed(costs[arm.label], device, options.precision)

    return {arm.label: speed(arm) for arm in arms}


def _share(entry: PlannedRun, fork: Fork | None, cost: Cost, speed: Speed) -> Share:
    """What is left of a run, which begins after the steps that another one shares with it."""
    if entry.is_settled:
        return Share()
    train, is_begun = entry.run.config.train, entry.standing.step > 0
    begun = entry.standing.step if is_begun or fork is None else fork.step
    steps = train.steps - begun
    images = steps * train.batch_size
    measuring = cost.measuring(entry.run.config, begun, train.steps)
    flops = images * cost.image_flops + measuring
    # A dear measurement takes as many times longer as it has more to compute.
    seconds = images * speed.image + measuring / cost.evaluation_flops * speed.evaluation
    return Share(1, steps, images, flops, seconds / _HOUR, 0.0 if is_begun else cost.checkpoint_bytes)


def _saved(costs: dict[str, Cost], speeds: dict[str, Speed], entry: PlannedRun) -> float:
    """Hours that caches save of an image."""
    return costs[entry.arm.label].saved_flops / speeds[entry.arm.label].flops / _HOUR


def _caches(plan: Plan, speeds: dict[str, Speed]) -> Iterator[PlannedCache]:
    options = plan.experiment.run
    begun = {entry.arm.label for entry in plan.runs if entry.state.step or entry.state.state.is_finished}
    found: dict[Cache, list[str]] = {}
    for arm in plan.experiment.arms:
        for cache in caches_of(arm.config, options):
            found.setdefault(cache, []).append(arm.label)
    for cache, labels in found.items():
        images, is_begun = images_of(cache.data, _files(cache.data)), not begun.isdisjoint(labels)
        left = 0 if is_begun else images or 0
        hours = left * cache.image_flops / speeds[labels[0]].flops / _HOUR
        yield PlannedCache(cache, images, is_begun, hours, left * cache.image_bytes)


def _files(data: DataConfig) -> int | None:
    return _count(data.source, Path(data.path)) if data.path else None


@functools.lru_cache(maxsize=16)
def _count(source: str, folder: Path) -> int | None:
    """Images of a folder, or of a saved data set by what it says of itself; None where it cannot be told."""
    try:
        if source == "imagefolder":
            return len(image_files(folder))
        if source == "repa":
            return len(IMAGES.numbers(folder)) or None
        splits = read_json(folder / "dataset_info.json").get("splits") or {}
        return sum(split["num_examples"] for split in splits.values()) or None
    except (DataError, OSError, ValueError, KeyError, AttributeError):
        return None


def _begun(plan: Plan) -> Iterator[tuple[RunDirectory, RunConfig]]:
    """Runs of the plan that have started, finished ones first, and then others of the root."""
    started = [entry for entry in plan.runs if entry.state.step]
    for entry in sorted(started, key=lambda entry: not entry.state.state.is_finished)[:_OWN]:
        yield plan.root.run(entry.run.run_id), entry.run.config
    yield from _others(plan.root, {entry.run.run_id for entry in plan.runs})


def _others(root: RunsRoot, known: set[str]) -> Iterator[tuple[RunDirectory, RunConfig]]:
    for directory in [run for run in root.runs() if run.run_id not in known][-_OTHERS:]:
        try:
            yield directory, Run.from_json(directory.run_id, directory.spec).config
        except (OSError, ValueError):  # of an older or a newer lab, or damaged
            continue


def _trials_left(plan: Plan) -> int:
    """Runs that a search has yet to train, at most."""
    experiment = plan.experiment
    assert experiment.search
    asked = len(experiment.arms) * experiment.search.trials * len(experiment.seeds)
    directory = plan.root.sweep(experiment.name)
    if not (directory.path / "sweep.json").is_file():
        return asked
    recorded = {run["run_id"] for arm in directory.manifest["arms"] for run in arm["runs"]}
    return max(0, asked - sum(plan.root.run(run_id).state.state.is_finished for run_id in recorded))


def _speed_notes(found: Estimate) -> Iterator[str]:
    speeds, precision = found.speeds.values(), found.plan.experiment.run.precision
    if measured := [speed for speed in speeds if speed.runs]:
        kinds = {speed.image: speed for speed in measured}
        rates = sorted(1 / image for image in kinds)
        between = f"{rates[0]:,.3g}" if len(rates) == 1 else f"{rates[0]:,.3g} to {rates[-1]:,.3g}"
        count = sum(speed.runs for speed in kinds.values())
        runs = "run" if count == 1 else "runs"
        yield f"{len(measured)} of {len(speeds)} arms: as measured here on {count} {runs}, {between} images/s"
    if len(measured) < len(speeds):
        peak = found.device.peak(precision) / 1e12
        why = f" ({found.reason})" if found.reason else ""
        at = f"{UTILISATION:.0%} of {peak:,.3g} TFLOP/s {precision}".replace("%", " %")
        yield f"assuming {found.device.name} at {at}{why}; {PUBLISHED}"
    if any(not speed.is_evaluation_measured for speed in speeds):
        yield "evaluations are sampling and decoding by counted FLOPs; texts and the extractor are not counted"
    yield "memory: weights, gradients, AdamW and averages exact, activations rough; micro_batch auto taken as the whole batch"
