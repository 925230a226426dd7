"""What is left of a plan in FLOPs, GPU hours and bytes, run by run and in all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from repa_lab.orchestration.plan import Plan, PlannedRun
from repa_lab.orchestration.search.reach import is_searched
from repa_lab.orchestration.speed import (
    PUBLISHED,
    UTILISATION,
    Device,
    Measured,
    Speed,
    assumed_device,
    assumed_speed,
    kind_of,
)
from repa_lab.runs import RunDirectory, RunsRoot, RunStatus
from repa_lab.runs.forks import Fork
from repa_lab.spec import Arm, RunConfig
from repa_lab.spec.identity import Run
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
        trials: of a search, what is left around each arm in which it changes something, by label and at most.
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
    trials: dict[str, Share]
    saved_hours: float
    device: Device
    reason: str

    @property
    def fixed(self) -> list[str]:
        """Labels of the arms in which a search changes nothing."""
        is_search = self.plan.experiment.search is not None
        return [arm.label for arm in self.plan.experiment.arms if is_search and arm.label not in self.trials]

    @property
    def notes(self) -> list[str]:
        """Warnings, and what the estimate rests on, a sentence each."""
        data = dict.fromkeys(arm.config.data for arm in self.plan.experiment.arms)
        told = dict.fromkeys(note for one in data for note in self.plan.inventory.dataset(one).notes)
        rough = dict.fromkeys(note for cost in self.costs.values() for note in cost.rough)
        return [*self.plan.warnings, *told, *_speed_notes(self), *rough]


def estimate(plan: Plan) -> Estimate:
    """Estimate what is left of a plan; reads run directories of the root for their speeds."""
    options, arms = plan.experiment.run, plan.experiment.arms
    costs = {arm.label: cost_of(arm.config, options) for arm in arms}
    device, reason = assumed_device(options)
    speeds = _speeds(plan, costs, device)
    forks = plan.sharing.forks
    shares = tuple(
        _share(entry, forks.get(entry.run.run_id), costs[entry.arm.label], speeds[entry.arm.label])
        for entry in plan.runs
    )
    caches = tuple(_caches(plan, speeds))
    once = {entry.run.run_id: (entry.arm.label, share) for entry, share in zip(plan.runs, shares, strict=True)}
    trials = _trials(plan, costs, speeds)
    left = _by_label(once.values()) | trials
    total = sum(left.values(), Share())
    filled = Share(gpu_hours=sum(one.gpu_hours for one in caches), disk_bytes=sum(one.disk_bytes for one in caches))
    spared = sum(share.images * _saved(costs[label], speeds[label]) for label, share in left.items())
    return Estimate(
        plan, costs, speeds, shares, caches, total + filled, trials, spared - filled.gpu_hours, device, reason
    )


def rounded(value: float) -> str:
    """A number below 1e15 in three digits, written out."""
    return f"{float(f'{value:.3g}'):,.15g}"


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
    is_begun = entry.step > 0
    left = _from(entry.step if is_begun or fork is None else fork.step, entry.run.config, cost, speed)
    return replace(left, disk_bytes=0.0) if is_begun else left


def _from(begun: int, config: RunConfig, cost: Cost, speed: Speed) -> Share:
    """What a run still takes after its first ``begun`` steps, with room for its checkpoints."""
    steps = config.train.steps - begun
    images = steps * config.train.batch_size
    measuring = cost.measuring(config, begun, config.train.steps)
    flops = images * cost.image_flops + measuring
    # A dear measurement takes as many times longer as it has more to compute.
    seconds = images * speed.image + measuring / cost.evaluation_flops * speed.evaluation
    return Share(1, steps, images, flops, seconds / _HOUR, cost.checkpoint_bytes)


def _by_label(shares: Iterable[tuple[str, Share]]) -> dict[str, Share]:
    left: dict[str, Share] = {}
    for label, share in shares:
        left[label] = left.get(label, Share()) + share
    return left


def _trials(plan: Plan, costs: dict[str, Cost], speeds: dict[str, Speed]) -> dict[str, Share]:
    """See :attr:`Estimate.trials`; an arm's own runs need not be among them."""
    experiment, search = plan.experiment, plan.experiment.search
    if search is None:
        return {}
    left, asked, recorded = {}, search.trials * len(experiment.seeds), _recorded(plan)
    for arm in (one for one in experiment.arms if is_searched(one, search.space)):
        ended = [plan.root.run(run_id).status().is_final for levels, run_id in recorded if levels == arm.levels]
        each = _from(0, arm.config, costs[arm.label], speeds[arm.label])
        left[arm.label] = each.times(max(0, asked - sum(ended)))
    return left


def _recorded(plan: Plan) -> list[tuple[dict[str, str], str]]:
    """The runs of all trials until now, each with the levels of the arm that was searched around."""
    directory = plan.root.sweep(plan.experiment.name)
    if not (directory.path / "sweep.json").is_file():
        return []
    return [(arm["levels"], run["run_id"]) for arm in directory.manifest["arms"] for run in arm["runs"]]


def _saved(cost: Cost, speed: Speed) -> float:
    """Hours that caches save of an image."""
    return cost.saved_flops / speed.flops / _HOUR


def _caches(plan: Plan, speeds: dict[str, Speed]) -> Iterator[PlannedCache]:
    options = plan.experiment.run
    begun = {entry.arm.label for entry in plan.runs if entry.status is not RunStatus.NEW}
    found: dict[Cache, list[str]] = {}
    for arm in plan.experiment.arms:
        for cache in caches_of(arm.config, options):
            found.setdefault(cache, []).append(arm.label)
    for cache, labels in found.items():
        images, is_begun = (
            images_of(cache.data, plan.inventory.dataset(cache.data).images),
            not begun.isdisjoint(labels),
        )
        left = 0 if is_begun else images or 0
        hours = left * cache.image_flops / speeds[labels[0]].flops / _HOUR
        yield PlannedCache(cache, images, is_begun, hours, left * cache.image_bytes)


def _begun(plan: Plan) -> Iterator[tuple[RunDirectory, RunConfig]]:
    """Runs of the plan that have started, finished ones first, and then others of the root."""
    started = [entry for entry in plan.runs if entry.status is not RunStatus.NEW]
    for entry in sorted(started, key=lambda entry: not entry.status.is_final)[:_OWN]:
        yield plan.root.run(entry.run.run_id), entry.run.config
    yield from _others(plan.root, {entry.run.run_id for entry in plan.runs})


def _others(root: RunsRoot, known: set[str]) -> Iterator[tuple[RunDirectory, RunConfig]]:
    for directory in [run for run in root.runs() if run.run_id not in known][-_OTHERS:]:
        try:
            yield directory, Run.from_json(directory.run_id, directory.spec).config
        except (OSError, ValueError):  # of an older or a newer lab, or damaged
            continue


def _speed_notes(found: Estimate) -> Iterator[str]:
    speeds, precision = found.speeds.values(), found.plan.experiment.run.precision
    if measured := [speed for speed in speeds if speed.runs]:
        kinds = {speed.image: speed for speed in measured}
        rates = sorted(1 / image for image in kinds)
        between = rounded(rates[0]) if len(rates) == 1 else f"{rounded(rates[0])} to {rounded(rates[-1])}"
        count = sum(speed.runs for speed in kinds.values())
        runs = "run" if count == 1 else "runs"
        yield f"{len(measured)} of {len(speeds)} arms: as measured here on {count} {runs}, {between} images/s"
    if len(measured) < len(speeds):
        peak = found.device.peak(precision) / 1e12
        why = f" ({found.reason})" if found.reason else ""
        at = f"{UTILISATION:.0%} of {rounded(peak)} TFLOP/s {precision}".replace("%", " %")
        yield f"assuming {found.device.name} at {at}{why}; {PUBLISHED}"
    if any(not speed.is_evaluation_measured for speed in speeds):
        yield "evaluations are sampling and decoding by counted FLOPs; texts and the extractor are not counted"
    exact = "weights, gradients, AdamW and averages exact for the weights that were counted"
    yield f"memory: {exact}, activations rough; micro_batch auto taken as the whole batch"
