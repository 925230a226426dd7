"""How fast runs go: as measured by runs of the same kind on this machine, or else as a device at a stated utilisation would."""

from __future__ import annotations

import os
import platform
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repa_lab.runs import RunDirectory, State
from repa_lab.runs.files import Row
from repa_lab.runs.provenance import GPUS, gpu_models
from repa_lab.spec import RunConfig, RunOptions
from repa_lab.training.costs import Cost, measurements

UTILISATION = 0.35
PUBLISHED = "REPA's own XL/2 run reached 13.5 %"  # 5.4 steps/s on 8 H100s, by FLOPs as they are counted here
_RUNS_PER_KIND = 3
# What decides how fast a run is but not what it computes.
_OPTIONS = (
    "device", "precision", "micro_batch", "gradient_checkpointing", "compile",
    "encoder_precision", "encoder_compile", "encoder_batch_size", "data_workers",
)  # fmt: skip
_ONE_PROCESS = 1


@dataclass(frozen=True)
class Device:
    """A device by its peaks in TFLOP/s: of dense bf16 or fp16 matrix products, and of float32 without tensor cores, as
    torch computes it by default."""

    name: str
    half: float
    single: float

    def peak(self, precision: str) -> float:
        """FLOP/s in a precision of :class:`RunOptions`."""
        return (self.single if precision == "fp32" else self.half) * 1e12


H100 = Device("an H100", 989, 67)
# By a word in the driver's name of the model; the vendor's data sheets.
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
    "V100": Device("a V100", 125, 15.7),
    "T4": Device("a T4", 65, 8.1),
}
_CORE = 0.05  # TFLOP/s of a CPU's core with AVX2; bf16 is not faster on most


@dataclass(frozen=True)
class Speed:
    """How fast runs of a kind go on one device.

    Attributes:
        flops: FLOP/s, as the FLOPs of :class:`Cost` are counted.
        image: seconds to train on an image.
        evaluation: seconds of an evaluation by the usual protocol; measured ones include writing the checkpoint.
        runs: how many runs this was measured on; 0 where it is assumed.
        is_evaluation_measured: whether the seconds of an evaluation were measured too.
    """

    flops: float
    image: float
    evaluation: float
    runs: int = 0
    is_evaluation_measured: bool = False


@dataclass(frozen=True)
class _Pause:
    """What a run spent beside training: seconds of one device, for so many measurements by the usual protocol and by
    that of milestones."""

    seconds: float
    usual: int
    milestones: int

    def each(self, rare: float) -> float:
        """Seconds of a measurement by the usual protocol, where one of a milestone takes ``rare`` times as long."""
        return self.seconds / (self.usual + self.milestones * rare)


def assumed_device(options: RunOptions, folder: Path = GPUS) -> tuple[Device, str]:
    """The device that runs are assumed to be on, and why: this machine's GPU, an H100 where there is none, or its CPU."""
    if options.device == "cpu":
        cores = os.cpu_count() or 1
        return Device(f"{cores} CPU cores", _CORE * cores, _CORE * cores), ""
    models = gpu_models(folder)
    known = next((device for word, device in _DEVICES.items() if models and word in models[0]), None)
    if known:
        return known, ""
    return (
        H100,
        f"{models[0]} is not known" if models else "there is no GPU here; run.device: cpu estimates for this CPU",
    )


def assumed_speed(cost: Cost, device: Device, precision: str) -> Speed:
    """The speed of a device at the assumed utilisation."""
    flops = device.peak(precision) * UTILISATION
    return Speed(flops, cost.image_flops / flops, cost.evaluation_flops / flops)


def kind_of(config: RunConfig, options: Mapping[str, Any], processes: int) -> Hashable:
    """What decides how many seconds a run takes an image: equal kinds are equally fast on one machine."""
    regularizer = config.regularizer
    data = (config.data.source, config.data.side, config.data.vae, config.data.buckets)
    aligned = (regularizer.type, regularizer.encoders, getattr(regularizer, "projector", None))
    how = tuple(options.get(name) for name in _OPTIONS)
    return (config.model, data, config.train.batch_size, aligned, how, processes)


class Measured:
    """Speeds of runs on this machine, a few of each kind.

    Args:
        runs: run directories with their settings, those that count most first.
        wanted: the kinds that are asked for.
    """

    def __init__(self, runs: Iterable[tuple[RunDirectory, RunConfig]], wanted: frozenset[Hashable]) -> None:
        self._wanted = wanted
        self._images: dict[Hashable, list[float]] = {}
        self._evaluations: dict[Hashable, list[_Pause]] = {}
        for directory, config in runs:
            self._take(directory, config)

    def speed(self, config: RunConfig, kind: Hashable, cost: Cost) -> Speed | None:
        """The speed of a kind of runs; what an evaluation takes is scaled from it where it was not measured."""
        if not (found := self._images.get(kind)):
            return None
        image = sum(found) / len(found)
        flops = cost.image_flops / image
        evaluated = self._evaluations.get((kind, _evaluated(config)))
        rare = cost.milestone_flops / cost.evaluation_flops
        each = [pause.each(rare) for pause in evaluated or ()]
        seconds = sum(each) / len(each) if each else cost.evaluation_flops / flops
        return Speed(flops, image, seconds, len(found), evaluated is not None)

    def _take(self, directory: RunDirectory, config: RunConfig) -> None:
        made = _provenance(directory)
        here = (platform.platform(), os.cpu_count(), gpu_models())
        if made is None or (made.get("platform"), made.get("cpus"), made.get("gpus", [])) != here:
            return
        processes = made.get("processes", _ONE_PROCESS)
        kind = kind_of(config, made.get("options", {}), processes)
        taken = self._images.setdefault(kind, [])
        if kind not in self._wanted or len(taken) >= _RUNS_PER_KIND:
            return
        rows = directory.rows()
        if (seconds := seconds_per_image(rows)) is not None:
            taken.append(seconds * processes)
        if (seconds := seconds_beside_training(directory, rows)) is not None:
            pause = _Pause(seconds * processes, *measurements(config, 0, config.train.steps))
            self._evaluations.setdefault((kind, _evaluated(config)), []).append(pause)


def seconds_per_image(rows: list[Row]) -> float | None:
    """Seconds of training an image takes all devices of a run together, the first logged steps left out where there are
    later ones: they begin with what is done once."""
    points = [(row["images"], row["seconds"]) for row in rows if row.get("images") and row.get("seconds") is not None]
    if not points:
        return None
    (first, begun), (last, ended) = points[0], points[-1]
    if last == first:
        first, begun = 0, 0.0
    return (ended - begun) / (last - first) if ended > begun else None


def seconds_beside_training(directory: RunDirectory, rows: list[Row]) -> float | None:
    """What a run that went through without a break spent beside training, with all its evaluations; None of others."""
    marks = [event for event in directory.events() if event["event"] in {state.value for state in State}]
    if [event["event"] for event in marks] != [State.RUNNING.value, State.DONE.value] or marks[0].get("step"):
        return None
    if all("loss/total" in row for row in rows):
        return None
    spent = float(marks[1]["time"] - marks[0]["time"] - max(row.get("seconds", 0.0) for row in rows))
    return spent if spent > 0 else None


def _evaluated(config: RunConfig) -> Hashable:
    return config.evaluate.model_copy(update={"every": 1}), config.alignment_encoder


def _provenance(directory: RunDirectory) -> dict[str, Any] | None:
    try:
        return directory.provenance
    except (OSError, ValueError):
        return None
