"""How fast training steps are: in a run's rows, and, measured in turns, against other ways to take them."""

from __future__ import annotations

import functools
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repa_lab.align import REPA, UREPA, alignment_loss, manifold_loss
from repa_lab.align.settings import NoSettings, REPASettings, ScheduleSettings
from repa_lab.kernels import kernels
from repa_lab.runs.files import Row
from repa_lab.spec import ResolvedOptions, RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Batch
from repa_lab.training.checkpoint import Progress
from repa_lab.training.costs import active_steps, cost_of
from repa_lab.training.device import PRECISION, computing_in, measuring_precision
from repa_lab.training.diffusion import denoising_loss
from repa_lab.training.trainer import Trainer

GIB = 1 << 30
_SIDE = {"cuda": 8192, "cpu": 1024}  # of square matrices that are large enough for the device to be at its fastest
_REPEATS = 5
# What is measured without a spec: a minute on two CPU cores.
TINY: dict[str, Any] = {
    "name": "bench",
    "model": {"family": "sit", "size": "nano/2"},
    "regularizer": {
        "type": "repa",
        "encoder": {"name": "efficientnet_lite0", "image_size": 64},
        "projector": {"width": 96},
    },
    "data": {"source": "digits"},
    "train": {"batch_size": 32, "steps": 1},
    "evaluate": {"samples": 250, "sampler": {"steps": 10}, "extractor": {"name": "efficientnet_lite0"}},
}
_STEPS = 10**6  # more than are taken


@functools.lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on a device: the fastest of a few, measured once in a process."""
    side = _SIDE.get(device.type, _SIDE["cpu"])
    factor = torch.rand(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(_REPEATS):
        began = _finished(device)
        factor @ factor
        seconds.append(_finished(device) - began)
    return 2 * side**3 / min(seconds)


def _finished(device: torch.device) -> float:
    """Return the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Return the most memory, in bytes, that tensors had on a GPU, or that this process had on a CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SpeedMeter:
    """Measures a run's training steps between two metric rows, for its progress too; never waits for the device."""

    def __init__(
        self, config: RunConfig, options: ResolvedOptions, progress: Progress, device: torch.device, processes: int
    ) -> None:
        self._config, self._progress, self._device = config, progress, device
        # Activations that are computed again are not the model's FLOPs.
        self._cost = cost_of(config, options.model_copy(update={"gradient_checkpointing": False}))
        self._ceiling = processes * matmul_ceiling(device, PRECISION[options.precision])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # forget the matrices
        self.start()

    def start(self) -> None:
        """Begin to measure, at the first step or after a measurement or a checkpoint."""
        self._began, self._first_step, self._waited = time.perf_counter(), self._progress.step, 0.0

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, and measure how long each is waited for."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def row(self) -> Row:
        """Return the entries of a metric row and add the seconds to the progress; call once the steps have finished.

        Seconds are totals of the run; images per second and the share of the ceiling are those since the last row.
        """
        seconds, first, progress = time.perf_counter() - self._began, self._first_step, self._progress
        progress.seconds += seconds
        progress.data_seconds += self._waited
        steps, batch = progress.step - first, self._config.train.batch_size
        flops = batch * steps * self._cost.denoiser_flops
        for settings, added in zip(self._config.regularizers, self._cost.regularizers, strict=True):
            active = active_steps(settings, progress.step) - active_steps(settings, first)
            flops += batch * active * (added.projector_flops + added.teacher_flops)
        self.start()
        return {
            "cost/images_per_second": _rounded(steps * batch / seconds),
            "cost/data_seconds": round(progress.data_seconds, 3),
            "cost/encoder_seconds": round(progress.encoder_seconds, 3),
            "cost/flops_utilisation": _rounded(flops / seconds / self._ceiling),
            "cost/peak_memory_gib": _rounded(peak_memory(self._device) / GIB),
        }


def _rounded(value: float) -> float:
    """Return a number with four significant digits; a run may have 100,000 rows."""
    return float(f"{value:.4g}")


class ReferenceLoop:
    """Training steps as the papers' code takes them, of an arm with an online encoder, whose trainer is trained.

    The encoder runs in every step, the alignment loss is summed image by image, the averages are updated parameter by
    parameter, and the host reads the losses in every step. Nothing is compiled.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def step(self, batch: Batch) -> tuple[float, float]:
        """Take an optimizer step and return the denoising loss and the alignment loss."""
        with kernels(tf32=self._trainer.options.precision != "fp32"):
            return self._step(batch)

    def _step(self, batch: Batch) -> tuple[float, float]:
        trainer, state, step = self._trainer, self._trainer.state, self._trainer.progress.step
        aligner, regularizer = trainer.aligner, trainer.aligner.module
        assert isinstance(regularizer, REPA)
        x_t, target = trainer.model.process.corrupt(batch.x, batch.noise, batch.t)
        denoise = denoising_loss(state.denoiser(x_t, batch.t, **batch.condition), target)
        (tap,) = aligner.taps.values()
        student = tap.take()
        losses = []
        for number, targets in enumerate(aligner.targets.values()):
            teacher = targets(batch.ids, trainer.device, batch.loaded[number] if batch.loaded else None)
            pairs = regularizer.match(student, teacher, number)
            for image in zip(pairs.student.split(1), pairs.teacher.split(1), strict=True):
                losses.append(alignment_loss(*image))
                if isinstance(regularizer, UREPA):
                    settings = regularizer.settings
                    losses[-1] = losses[-1] + settings.manifold_weight * manifold_loss(*image, settings.manifold, step)
        aligned = torch.stack(losses).mean()
        trainer.accelerator.backward(denoise + regularizer.weight_at(step) * aligned)
        if limit := trainer.config.train.grad_clip:
            trainer.accelerator.clip_grad_norm_(state.ema.live.values(), limit)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        decay = trainer.config.train.averaging.decay_at(step)
        with torch.no_grad():
            for name, average in state.ema.average.items():
                average.mul_(decay).add_(state.ema.live[name], alpha=1 - decay)
        trainer.progress.step += 1
        return denoise.item(), aligned.item()


@dataclass
class _Way:
    """What is measured in turns: each has so many images and steps, and takes seconds on a GPU, or of CPU time."""

    turn: Callable[[], object]
    images: int
    steps: int
    image_flops: float | None = None
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def take(self, device: torch.device) -> None:
        """Take a turn and note its seconds."""
        wall, began = _finished(device), time.process_time()
        self.turn()
        self.wall.append(_finished(device) - wall)
        self.seconds.append(time.process_time() - began if device.type == "cpu" else self.wall[-1])

    def measured(self, plain: _Way, ceiling: float) -> dict[str, Any]:
        """Return what is printed of all turns but the first, given the plain step and the FLOP/s of the device."""
        share = plain.images / self.images
        ratios = [share * ours / theirs for ours, theirs in zip(self.seconds[1:], plain.seconds[1:], strict=True)]
        wall = statistics.median(self.wall[1:])
        row: dict[str, Any] = {
            "images_per_second": self.images / wall,
            "ms_per_step": 1000 * wall / self.steps,
            "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        }
        if self.image_flops is not None and plain.image_flops is not None:
            row["flops_ratio"] = self.image_flops / plain.image_flops
            row["flops_utilisation"] = self.image_flops * self.images / wall / ceiling
        return row


def bench(run: Run, options: RunOptions, cache: Path, rounds: int = 5, steps: int = 5) -> dict[str, Any]:
    """Measure the steps of a run, the data path and the evaluation, each in turn.

    The ways are a plain step; for ``repa`` and ``urepa`` one with cached features, one with an online encoder, and the
    papers' way (:class:`ReferenceLoop`); and for other regularizers the run's own step. All of them are in memory at
    the same time.

    Args:
        rounds: turns of each way that count; one before them does not.
        steps: steps of a turn.

    Returns:
        JSON: the machine, and for each way images per second and its time over that of a plain step: the median of the
        rounds, the lowest and the highest. On a CPU the ratios are of CPU time, which other programs do not add to.
    """
    trainers = {name: Trainer(Run(name, config, run.seed), options, cache) for name, config in variants(run.config)}
    takes: dict[str, Callable[[Batch], object]] = {name: trainer.step for name, trainer in trainers.items()}
    if online := trainers.get("online encoder"):
        uncompiled = options.model_copy(update={"compile": False, "encoder_compile": False})
        reference = trainers["the papers' way"] = Trainer(Run("reference", online.config, run.seed), uncompiled, cache)
        takes["the papers' way"] = ReferenceLoop(reference).step
    ways = {
        name: _stepping(trainer, takes[name], steps, cost_of(trainer.config, trainer.options).image_flops)
        for name, trainer in trainers.items()
    }
    lab = trainers.get("cached features") or list(trainers.values())[-1]
    ways["data path alone"] = _stepping(lab, lambda batch: None, steps)
    ways["evaluation"] = _sampling(lab)
    for _ in range(rounds + 1):
        for way in ways.values():
            way.take(lab.device)
    is_gpu, ceiling = lab.device.type == "cuda", matmul_ceiling(lab.device, PRECISION[lab.options.precision])
    return {
        "device": torch.cuda.get_device_name(lab.device) if is_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clock": "elapsed time" if is_gpu else "CPU time of the process",
        "batch_size": run.config.train.batch_size,
        "options": lab.options.model_dump(mode="json", include={"precision", "compile", "encoder_precision"}),
        "matmul_flops": ceiling,
        "peak_memory_gib": peak_memory(lab.device) / GIB,
        "ways": [{"name": name, **way.measured(ways["plain step"], ceiling)} for name, way in ways.items()],
    }


def variants(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield the settings of the plain step, and of those with the run's regularizer, by name."""
    regularizer = config.regularizer
    evaluate = config.evaluate.model_copy(update={"encoder": None, "full": None})
    train = config.train.model_copy(update={"steps": _STEPS})

    def variant(changed: Any) -> RunConfig:
        return config.model_copy(update={"regularizer": changed, "evaluate": evaluate, "train": train})

    yield "plain step", variant(NoSettings())
    if not isinstance(regularizer, REPASettings):
        if config.regularizers:
            yield "regularized step", variant(regularizer)
        return
    for name, is_cached in (("cached features", True), ("online encoder", False)):
        changed = {"cache": is_cached, "standardize": False}
        encoders = tuple(encoder.model_copy(update=changed) for encoder in regularizer.encoders)
        encoder = encoders if isinstance(regularizer.encoder, tuple) else encoders[0]
        yield name, variant(regularizer.model_copy(update={"encoder": encoder, "schedule": ScheduleSettings()}))


def _stepping(trainer: Trainer, take: Callable[[Batch], object], steps: int, flops: float | None = None) -> _Way:
    """Return the way whose turn reads ``steps`` batches and does ``take`` with each."""
    batches = trainer.batches()

    def turn() -> None:
        for _ in range(steps):
            take(next(batches))

    return _Way(turn, steps * trainer.config.train.batch_size, steps, flops)


def _sampling(trainer: Trainer) -> _Way:
    """Return the way whose turn draws a batch of samples, with their features."""
    protocol = trainer.config.evaluate.model_copy(update={"samples": trainer.config.evaluate.batch_size})
    image_flops = cost_of(trainer.config, trainer.options).evaluation_flops / trainer.config.evaluate.samples
    denoiser, precision = trainer.state.denoiser, measuring_precision(protocol, trainer.options.precision)

    def turn() -> None:
        denoiser.eval()
        with trainer.state.ema.applied(), computing_in(denoiser, precision, trainer.device):
            trainer.evaluator.draw(protocol)
        denoiser.train()

    return _Way(turn, protocol.samples, 1, image_flops)
