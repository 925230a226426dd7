"""What is left of a plan in FLOPs, GPU hours and bytes; and the refusal of a plan over its budget.

Seconds are those measured by runs of the same kind on this machine, or else those of a device at a stated utilisation.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from repa_lab.orchestration.plan import Plan, PlannedRun
from repa_lab.orchestration.search.space import Space
from repa_lab.runs import RunDirectory, RunStatus, State
from repa_lab.runs.checkpoints import Fork
from repa_lab.runs.directory import GPUS, gpu_models
from repa_lab.runs.files import Row
from repa_lab.spec import Arm, Experiment, Machine, ResolvedOptions, RunConfig, RunOptions, SpecError
from repa_lab.spec.identity import Run
from repa_lab.spec.options import cores_here
from repa_lab.training.costs import Cache, Cost, caches_of, cost_of, measurements
from repa_lab.training.resolve import needs_of

GIB = float(2**30)
UTILISATION = 0.35
PUBLISHED = "REPA's own XL/2 run reached 13.5 %"  # 5.4 steps/s on 8 H100s, by FLOPs as they are counted here
_HOUR = 3600.0
_NO_GPU = "there is no GPU here; run.device: cpu estimates for this CPU"
_MAX_RUNS, _MAX_OTHER_RUNS = 300, 500  # started runs, of this and of other sweeps, whose speeds are read
_RUNS_PER_KIND = 3
# Options that decide how fast a run is but not what it computes.
_SPEED_OPTIONS = (
    "device", "precision", "micro_batch", "gradient_checkpointing", "compile",
    "encoder_precision", "encoder_compile", "encoder_batch_size", "data_workers",
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A device, named with its article, by its peak TFLOP/s.

    Attributes:
        half: of dense bf16 or fp16 matrix products.
        single: of float32 without tensor cores, as torch computes float32 by default.
        precision: what `run.precision: auto` is on it.
    """

    name: str
    half: float
    single: float
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision of :class:`RunOptions`."""
        return (self.single if precision == "fp32" else self.half) * 1e12

    def resolve(self, options: RunOptions) -> ResolvedOptions:
        """Return what options that are `auto` become on the device; a trainer looks again at its own."""
        cores = options.slurm.cpus_per_task if options.executor == "slurm" else cores_here()
        cores = max(cores // (options.slots_per_gpu * options.gpus_per_run), 1)
        half = None if self.precision == "fp32" else self.precision
        return options.resolved(Machine(half, cores=cores, processes=options.gpus_per_run))


H100 = Device("an H100", 989, 67)
# By a word in the driver's name of the model; from the vendor's data sheets.
_DEVICES = {
    "H100 PCIe": Device("an H100 PCIe", 756, 51),
    "H100": H100,
    "H200": Device("an H200", 989, 67),
    "B200": Device("a B200", 2250, 80),
    "A100": Device("an A100", 312, 19.5),
    "L40S": Device("an L40S", 362, 91.6),
    "L4": Device("an L4", 121, 30.3),
    "A6000": Device("an RTX A6000", 155, 38.7),
    "4090": Device("an RTX 4090", 165, 82.6),
    "3090": Device("an RTX 3090", 71, 35.6),
    "V100": Device("a V100", 125, 15.7, "fp16"),
    "T4": Device("a T4", 65, 8.1, "fp16"),
}
_CPU_CORE = 0.05  # peak TFLOP/s of a core with AVX2; bf16 is not faster on most


@dataclass(frozen=True)
class Speed:
    """How fast runs of a kind go on one device.

    Attributes:
        image: seconds of training per image.
        evaluation: seconds of an evaluation by the usual protocol; if measured, with writing the checkpoint.
        runs: the number of runs that this was measured on; 0 if it is assumed.
        is_evaluation_measured: whether the seconds of an evaluation were measured too.
    """

    image: float
    evaluation: float
    runs: int = 0
    is_evaluation_measured: bool = False


@dataclass(frozen=True)
class Share:
    """What a run, an arm, or all of a sweep still takes.

    Attributes:
        runs: the number of runs left.
        steps: optimizer steps.
        images: images seen in training.
        flops: FLOPs of training and evaluations.
        gpu_hours: hours of one device; on a CPU, of a worker.
        disk_bytes: bytes of checkpoints that are not there yet.
        saved_hours: GPU hours of training that caches save; for a whole sweep, less those to fill the caches of which
            the number of images is known.
    """

    runs: int = 0
    steps: int = 0
    images: int = 0
    flops: float = 0.0
    gpu_hours: float = 0.0
    disk_bytes: float = 0.0
    saved_hours: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, count: int) -> Share:
        return Share(*(value * count for value in astuple(self)))


@dataclass(frozen=True)
class PlannedCache:
    """A cache of the sweep, as `plan --json` shows it.

    Attributes:
        what: a description for people.
        images: the number of images; None where it is not known.
        begun: whether a run that needs the cache has started, so that the cache is there.
        gpu_hours_left: hours to fill it; 0 where it is there or its images are not known.
        disk_bytes_left: bytes to fill it; likewise.
    """

    what: str
    images: int | None
    begun: bool
    flops_per_image: float
    bytes_per_image: float
    gpu_hours_left: float
    disk_bytes_left: float


@dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    Attributes:
        plan: the plan.
        costs: the cost of each arm, by label.
        speeds: the speed of each arm, by label.
        shares: what each run of the plan takes, by its id.
        left: what is left of each arm, by label: its runs, or the trials that a search has around it at most.
        trials: how many trials a search has at most around each arm in which the search changes something, by label.
        caches: the caches of all arms, each once.
        total: all runs, each once, with all caches; of a search, all trials that are left.
        device: the device whose speed is assumed where none was measured.
        reason: why this device.
        options: the options of the runs on this device.
    """

    plan: Plan
    costs: dict[str, Cost]
    speeds: dict[str, Speed]
    shares: dict[str, Share]
    left: dict[str, Share]
    trials: dict[str, int]
    caches: tuple[PlannedCache, ...]
    total: Share
    device: Device
    reason: str
    options: ResolvedOptions

    @property
    def notes(self) -> list[str]:
        """Warnings, and what the estimate rests on, a sentence each."""
        datasets = dict.fromkeys(arm.config.data for arm in self.plan.experiment.arms)
        notes = dict.fromkeys(note for data in datasets for note in self.plan.inventory.dataset(data).notes)
        rough = dict.fromkeys(note for cost in self.costs.values() for note in cost.rough)
        return [*self.plan.warnings, *notes, *_speed_notes(self), *_option_notes(self), *rough]


def estimate(plan: Plan) -> Estimate:
    """Estimate what is left of a plan; reads run directories of the root for their speeds."""
    arms, options = plan.experiment.arms, plan.experiment.run
    device, reason = assumed_device(options)
    resolved = device.resolve(options)
    costs = {arm.label: cost_of(arm.config, resolved) for arm in arms}
    flops = device.peak(resolved.precision) * UTILISATION
    speeds = {label: Speed(cost.image_flops / flops, cost.evaluation_flops / flops) for label, cost in costs.items()}
    speeds |= _measured_speeds(plan, costs, (_cpu() if reason == _NO_GPU else device).resolve(options))
    shares, left, trials = dict[str, Share](), dict.fromkeys(costs, Share()), _most_trials(plan.experiment)
    for entry in plan.runs:
        label, run_id = entry.arm.label, entry.run.run_id
        if run_id not in shares:
            shares[run_id] = _run_left(entry, plan.forks.get(run_id), costs[label], speeds[label])
        left[label] += shares[run_id]
    for arm in arms:
        if arm.label in trials:
            runs = max(0, trials[arm.label] * len(plan.experiment.seeds) - _ended_trial_runs(plan, arm))
            left[arm.label] = _left_after(0, arm.config, costs[arm.label], speeds[arm.label]) * runs
    caches = tuple(_planned_caches(plan, resolved, costs, speeds))
    hours = sum(cache.gpu_hours_left for cache in caches)
    total = Share(gpu_hours=hours, disk_bytes=sum(cache.disk_bytes_left for cache in caches), saved_hours=-hours)
    fixed = dict.fromkeys(entry.run.run_id for entry in plan.runs if entry.arm.label not in trials)
    total = sum((*(shares[run_id] for run_id in fixed), *(left[label] for label in trials)), total)
    return Estimate(plan, costs, speeds, shares, left, trials, caches, total, device, reason, resolved)


def require_budget(plan: Plan) -> None:
    """Refuse a plan that takes more than the spec's budget.

    Raises:
        SpecError: at the limit that does not suffice, with both numbers.
    """
    limits = {name: limit for name, limit in plan.experiment.budget if limit is not None}
    total, problems = estimate(plan).total if limits else Share(), []
    needed = {"gpu_hours": (total.gpu_hours, "GPU hours"), "disk_gib": (total.disk_bytes / GIB, "GiB")}
    for name, limit in limits.items():
        value, unit = needed[name]
        if value > limit:
            nearest = float(f"{value:.2g}")
            enough = nearest if nearest >= value else float(f"{value * 1.1:.2g}")
            advice = f"allow it with --set budget.{name}={enough}, or ask for less; see `repa-lab plan`"
            message = f"what is left takes about {rounded(value)} {unit}, the budget is {limit:,.6g}: {advice}"
            problems.append(plan.experiment.problem(f"budget.{name}", message))
    if problems:
        raise SpecError(problems)


def rounded(value: float) -> str:
    """Return a number below 1e15 in three digits, written out."""
    return f"{float(f'{value:.3g}'):,.15g}"


def assumed_device(options: RunOptions, folder: Path = GPUS) -> tuple[Device, str]:
    """Return the device that runs are assumed to be on, and why: this machine's GPU, its CPU if set, else an H100."""
    if options.device == "cpu":
        return _cpu(), ""
    models = gpu_models(folder)
    if not models:
        return H100, _NO_GPU
    known = next((device for word, device in _DEVICES.items() if word in models[0]), None)
    return (known, "") if known else (H100, f"{models[0]} is not known")


def _cpu() -> Device:
    cores = os.cpu_count() or 1
    return Device(f"{cores} CPU cores", _CPU_CORE * cores, _CPU_CORE * cores, "fp32")


def seconds_per_image(rows: list[Row]) -> float | None:
    """Return the seconds of training per image of all devices of a run together; None if its rows do not tell.

    The first logged steps are left out where there are later ones: they include what is done once.
    """
    points = [(row["images"], row["seconds"]) for row in rows if row.get("images") and row.get("seconds") is not None]
    if not points:
        return None
    (first, begun), (last, ended) = points[0], points[-1]
    if last == first:
        first, begun = 0, 0.0
    return (ended - begun) / (last - first) if ended > begun else None


def _seconds_beside_training(directory: RunDirectory, rows: list[Row]) -> float | None:
    """Return the seconds that a run spent on all but training; None unless it ran through without a break."""
    marks = [event for event in directory.events() if event["event"] in {state.value for state in State}]
    if [event["event"] for event in marks] != [State.RUNNING.value, State.DONE.value] or marks[0].get("step"):
        return None
    if all("loss/total" in row for row in rows):
        return None
    spent = float(marks[1]["time"] - marks[0]["time"] - max(row.get("seconds", 0.0) for row in rows))
    return spent if spent > 0 else None


def _speed_key(config: RunConfig, options: Mapping[str, Any], processes: int) -> Hashable:
    """Return what decides how many seconds a run takes per image; equal for runs that are equally fast."""
    data = (config.data.source, config.data.side, config.data.vae, config.data.buckets)
    aligned = tuple(
        (one.type, one.encoders, getattr(one, "projector", None), needs.extra_passes)
        for one, needs in zip(config.regularizers, needs_of(config), strict=True)
    )
    chosen = tuple(options.get(name) for name in _SPEED_OPTIONS)
    return (config.model, data, config.train.batch_size, aligned, chosen, processes)


def _evaluation_key(config: RunConfig) -> Hashable:
    return config.evaluate.model_copy(update={"every": 1}), config.alignment_encoder


def _measured_speeds(plan: Plan, costs: Mapping[str, Cost], options: ResolvedOptions) -> dict[str, Speed]:
    """Return the speeds of the arms of which this machine has trained runs of the same kind, by label.

    A few runs of each kind are read. The seconds of an evaluation are scaled from training if none was measured.
    """
    made_here, chosen = (platform.platform(), os.cpu_count(), gpu_models()), options.model_dump(mode="json")
    kinds = {arm.label: _speed_key(arm.config, chosen, options.gpus_per_run) for arm in plan.experiment.arms}
    images: dict[Hashable, list[float]] = {kind: [] for kind in kinds.values()}
    # Seconds of one device beside training, and the numbers of usual measurements and of those at milestones.
    evaluations: dict[Hashable, list[tuple[float, int, int]]] = {}
    for directory, config in _started_runs(plan):
        try:
            made = directory.provenance
        except (OSError, ValueError):
            continue
        processes = made.get("processes", 1)
        kind = _speed_key(config, made.get("options", {}), processes)
        is_made_here = (made.get("platform"), made.get("cpus"), made.get("gpus", [])) == made_here
        if not is_made_here or kind not in images or len(images[kind]) >= _RUNS_PER_KIND:
            continue
        rows = directory.rows()
        if (seconds := seconds_per_image(rows)) is not None:
            images[kind].append(seconds * processes)
        if (seconds := _seconds_beside_training(directory, rows)) is not None:
            counts = measurements(config, 0, config.train.steps)
            evaluations.setdefault((kind, _evaluation_key(config)), []).append((seconds * processes, *counts))
    speeds = {}
    for arm in plan.experiment.arms:
        cost, kind = costs[arm.label], kinds[arm.label]
        if measured := images[kind]:
            image, milestone = sum(measured) / len(measured), cost.milestone_flops / cost.evaluation_flops
            told = evaluations.get((kind, _evaluation_key(arm.config)), [])
            each = [seconds / (usual + rare * milestone) for seconds, usual, rare in told]
            evaluation = sum(each) / len(each) if each else cost.evaluation_flops / cost.image_flops * image
            speeds[arm.label] = Speed(image, evaluation, len(measured), bool(each))
    return speeds


def _started_runs(plan: Plan) -> Iterator[tuple[RunDirectory, RunConfig]]:
    """Yield the runs of the plan that have started, finished ones first, and then other runs of the root."""
    started = [entry for entry in plan.runs if entry.status is not RunStatus.NEW]
    for entry in sorted(started, key=lambda entry: not entry.status.is_final)[:_MAX_RUNS]:
        yield plan.root.run(entry.run.run_id), entry.run.config
    planned = {entry.run.run_id for entry in plan.runs}
    for directory in [run for run in plan.root.runs() if run.run_id not in planned][-_MAX_OTHER_RUNS:]:
        with suppress(OSError, ValueError):  # of another version of repa-lab, or damaged
            yield directory, Run.read(directory).config


def _run_left(entry: PlannedRun, fork: Fork | None, cost: Cost, speed: Speed) -> Share:
    """Return what is left of a run, which begins after the steps that another run shares with it."""
    if entry.status.is_over:
        return Share()
    left = _left_after(entry.step or (fork.step if fork else 0), entry.run.config, cost, speed)
    return replace(left, disk_bytes=0.0) if entry.step else left


def _left_after(step: int, config: RunConfig, cost: Cost, speed: Speed) -> Share:
    """Return what a run still takes after its first ``step`` steps, with room for its checkpoints."""
    steps = config.train.steps - step
    images = steps * config.train.batch_size
    measuring = cost.measuring(config, step, config.train.steps)
    # A measurement at a milestone takes as many times longer as it has more FLOPs.
    seconds = images * speed.image + measuring / cost.evaluation_flops * speed.evaluation
    saved = images * speed.image * cost.saved_flops / cost.image_flops
    flops = images * cost.image_flops + measuring
    return Share(1, steps, images, flops, seconds / _HOUR, cost.checkpoint_bytes, saved / _HOUR)


def _most_trials(experiment: Experiment) -> dict[str, int]:
    """Return how many trials a search has at most around each arm in which it changes something, by label."""
    trials, search = {}, experiment.search
    for arm in experiment.arms if search else ():
        if search and (space := Space(arm, search.space)).is_searched:
            settings = space.listed()
            trials[arm.label] = search.trials if settings is None else min(search.trials, len(settings))
    return trials


def _ended_trial_runs(plan: Plan, arm: Arm) -> int:
    """Count the runs of a search's trials around an arm that have ended; the arm's own runs need not be trials."""
    directory = plan.root.sweep(plan.experiment.name)
    recorded = directory.manifest.arms if directory.is_recorded else ()
    runs = [run.run_id for trial in recorded if trial.levels == arm.levels for run in trial.runs]
    return sum(plan.root.run(run_id).status().is_final for run_id in runs)


def _planned_caches(
    plan: Plan, options: ResolvedOptions, costs: Mapping[str, Cost], speeds: Mapping[str, Speed]
) -> Iterator[PlannedCache]:
    begun = {entry.arm.label for entry in plan.runs if entry.status is not RunStatus.NEW}
    labels: dict[Cache, list[str]] = {}
    for arm in plan.experiment.arms:
        for cache in caches_of(arm.config, options):
            labels.setdefault(cache, []).append(arm.label)
    for cache, users in labels.items():
        files, is_begun = plan.inventory.dataset(cache.data).images, bool(begun & {*users})
        images = None if files is None else files * (1 + int(cache.data.flip))  # mirrored ones included
        left, flops, size = 0 if is_begun else images or 0, cache.image_flops, cache.image_bytes
        cost, speed = costs[users[0]], speeds[users[0]]
        hours = left * flops / cost.image_flops * speed.image / _HOUR
        yield PlannedCache(cache.what, images, is_begun, flops, size, hours, left * size)


def _speed_notes(estimate: Estimate) -> Iterator[str]:
    speeds, precision = estimate.speeds.values(), estimate.options.precision
    if measured := [speed for speed in speeds if speed.runs]:
        kinds = {speed.image: speed for speed in measured}
        rates = sorted(1 / image for image in kinds)
        between = rounded(rates[0]) if len(rates) == 1 else f"{rounded(rates[0])} to {rounded(rates[-1])}"
        count = sum(speed.runs for speed in kinds.values())
        runs = "run" if count == 1 else "runs"
        yield f"{len(measured)} of {len(speeds)} arms: as measured here on {count} {runs}, {between} images/s"
    if len(measured) < len(speeds):
        peak = estimate.device.peak(precision) / 1e12
        reason = f" ({estimate.reason})" if estimate.reason else ""
        share = f"{UTILISATION:.0%} of {rounded(peak)} TFLOP/s {precision}".replace("%", " %")
        yield f"assuming {estimate.device.name} at {share}{reason}; {PUBLISHED}"
    if any(not speed.is_evaluation_measured for speed in speeds):
        yield "evaluations are sampling and decoding by counted FLOPs; texts and the extractor are not counted"
    exact = "weights, gradients, AdamW and averages exact for the weights that were counted"
    yield f"memory: {exact}, activations rough; micro_batch auto taken as the whole batch"


def _option_notes(estimate: Estimate) -> Iterator[str]:
    """Yield what the options that are `auto` become."""
    options = estimate.plan.experiment.run
    devices = [(estimate.device, f"on {estimate.device.name}")]
    if estimate.reason == _NO_GPU:
        devices.append((_cpu(), "on this CPU"))
    for device, where in devices if options.automatic else ():
        resolved = device.resolve(options).model_dump(mode="json", include=set(options.automatic))
        values = (f"{name} {str(value).lower()}" for name, value in resolved.items())
        yield f"run options that are auto, {where}: {', '.join(values)}"
