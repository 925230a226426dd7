"""What a training step costs against other ways to take it, measured in turns in one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from repa_lab.align import REPA, UREPA, alignment_loss, manifold_loss
from repa_lab.align.regularizer import Pair
from repa_lab.align.settings import EncoderSettings, NoSettings, REPASettings, ScheduleSettings
from repa_lab.kernels import kernels
from repa_lab.spec import RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Batch
from repa_lab.training.checkpoint import trainable
from repa_lab.training.costs import cost_of
from repa_lab.training.device import PRECISION, computing_in, measuring_precision
from repa_lab.training.diffusion import denoising_loss
from repa_lab.training.speed import GIB, matmul_ceiling, peak_memory
from repa_lab.training.trainer import Trainer

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


class ReferenceLoop:
    """Training steps as the papers' code takes them.

    The encoder runs in every step, the alignment loss is summed image by image, the averages are updated parameter by
    parameter, and the host reads the losses in every step. Nothing is compiled.

    Args:
        trainer: of an arm with an online encoder; its state is trained.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, state = trainer, trainer.state
        modules = {"denoiser": state.denoiser, "regularizer": state.regularizer}
        live = ((f"{name}.", trainable(module)) for name, module in modules.items() if module is not None)
        self._live = {prefix + name: parameter for prefix, held in live for name, parameter in held.items()}

    def step(self, batch: Batch) -> tuple[float, float]:
        """Take an optimizer step and return the denoising loss and the alignment loss."""
        with kernels(tf32=self._trainer.options.precision != "fp32"):
            return self._step(batch)

    def _step(self, batch: Batch) -> tuple[float, float]:
        trainer, state, step = self._trainer, self._trainer.state, self._trainer.progress.step
        aligner = trainer.aligner
        assert aligner is not None
        regularizer = aligner.module
        assert isinstance(regularizer, REPA)
        x_t, target = trainer.model.process.corrupt(batch.x, batch.noise, batch.t)
        denoise = denoising_loss(state.denoiser(x_t, batch.t, **batch.condition), target)
        (tap,) = aligner.taps.values()
        student = tap.take()
        losses = []
        for number, targets in enumerate(aligner.targets.values()):
            teacher = targets(batch.ids, trainer.device, batch.loaded[number] if batch.loaded else None)
            pairs = regularizer.match(student, teacher, number)
            images = zip(pairs.student.split(1), pairs.teacher.split(1), strict=True)
            losses.append(torch.stack([_loss(regularizer, Pair(*image), step) for image in images]).mean())
        aligned = torch.stack(losses).mean()
        trainer.accelerator.backward(denoise + regularizer.weight_at(step) * aligned)
        if limit := trainer.config.train.grad_clip:
            trainer.accelerator.clip_grad_norm_(list(self._live.values()), limit)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        decay = trainer.config.train.averaging.decay_at(step)
        with torch.no_grad():
            for name, average in state.ema.average.items():
                average.mul_(decay).add_(self._live[name], alpha=1 - decay)
        trainer.progress.step += 1
        return denoise.item(), aligned.item()


def _loss(regularizer: REPA, pair: Pair, step: int) -> torch.Tensor:
    """Return the alignment loss of one image, and the manifold loss where the regularizer has one."""
    value = alignment_loss(*pair)
    if isinstance(regularizer, UREPA):
        value = value + regularizer.settings.manifold_weight * manifold_loss(*pair, regularizer.settings.manifold, step)
    return value


@dataclass
class _Way:
    """One of the things that are measured in turns.

    Attributes:
        name: for people.
        turn: does some of it and returns the number of images and of steps.
        image_flops: FLOPs of one image; None if they are not counted.
        seconds: of each turn, by the clock of :func:`_clock`.
        wall: elapsed seconds of each turn.
        images, steps: of one turn.
    """

    name: str
    turn: Callable[[], tuple[int, int]]
    image_flops: float | None = None
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    images: int = 0
    steps: int = 0


def bench(run: Run, options: RunOptions, cache: Path, rounds: int = 5, steps: int = 5) -> dict[str, Any]:
    """Measure the steps of a run, the data path and the evaluation, each in turn.

    The ways are a plain step; for ``repa`` and ``urepa`` one with cached features, one with an online encoder, and the
    papers' way (:class:`ReferenceLoop`); and for other regularizers the run's own step. All of them are in memory at
    the same time.

    Args:
        run: the run.
        cache: the folder of all caches, filled for this run.
        rounds: turns of each way that count; one before them does not.
        steps: steps of a turn.

    Returns:
        JSON: the machine, and for each way images per second and its time over that of a plain step: the median of the
        rounds, the lowest and the highest. On a CPU the ratios are of CPU time, which other programs do not add to.
    """
    trainers = {name: Trainer(Run(name, config, run.seed), options, cache) for name, config in variants(run.config)}
    ways = [_repeated(name, trainer, steps, trainer.step) for name, trainer in trainers.items()]
    if online := trainers.get("online encoder"):
        uncompiled = options.model_copy(update={"compile": False, "encoder_compile": False})
        reference = trainers["the papers' way"] = Trainer(Run("reference", online.config, run.seed), uncompiled, cache)
        ways.append(_repeated("the papers' way", reference, steps, ReferenceLoop(reference).step))
    for way, trainer in zip(ways, trainers.values(), strict=True):
        way.image_flops = cost_of(trainer.config, trainer.options).image_flops
    lab = trainers.get("cached features") or list(trainers.values())[-1]
    device = lab.device
    ways += [_repeated("data path alone", lab, steps, lambda batch: None), _sampling(lab)]
    for number in range(rounds + 1):
        for way in ways:
            began, wall = _clock(device), time.perf_counter()
            way.images, way.steps = way.turn()
            if number:
                way.seconds.append(_clock(device) - began)
                way.wall.append(time.perf_counter() - wall)
    ceiling = matmul_ceiling(device, PRECISION[lab.options.precision])
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clock": "elapsed time" if device.type == "cuda" else "CPU time of the process",
        "batch_size": run.config.train.batch_size,
        "options": lab.options.model_dump(mode="json", include={"precision", "compile", "encoder_precision"}),
        "matmul_flops": ceiling,
        "peak_memory_gib": peak_memory(device) / GIB,
        "ways": [_measured(way, ways[0], ceiling) for way in ways],
    }


def variants(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield the settings of the plain step, and of those with the run's regularizer, by name."""
    regularizer = config.regularizer
    evaluate = config.evaluate.model_copy(update={"encoder": None, "full": None})
    train = config.train.model_copy(update={"steps": _STEPS})

    def variant(changed: Any) -> RunConfig:
        return config.model_copy(update={"regularizer": changed, "evaluate": evaluate, "train": train})

    def cached(encoder: EncoderSettings, is_cached: bool) -> EncoderSettings:
        return encoder.model_copy(update={"cache": is_cached, "standardize": False})

    yield "plain step", variant(NoSettings())
    if not isinstance(regularizer, REPASettings):
        if config.regularizers:
            yield "regularized step", variant(regularizer)
        return
    for name, is_cached in (("cached features", True), ("online encoder", False)):
        encoders = tuple(cached(encoder, is_cached) for encoder in regularizer.encoders)
        encoder = encoders if isinstance(regularizer.encoder, tuple) else encoders[0]
        yield name, variant(regularizer.model_copy(update={"encoder": encoder, "schedule": ScheduleSettings()}))


def _repeated(name: str, trainer: Trainer, steps: int, take: Callable[[Batch], object]) -> _Way:
    """Return the way whose turn reads ``steps`` batches and does ``take`` with each."""
    batches = trainer.batches()

    def turn() -> tuple[int, int]:
        for _ in range(steps):
            take(next(batches))
        return steps * trainer.config.train.batch_size, steps

    return _Way(name, turn)


def _sampling(trainer: Trainer) -> _Way:
    """Return a batch of samples, with their features."""
    protocol = trainer.config.evaluate.model_copy(update={"samples": trainer.config.evaluate.batch_size})
    image_flops = cost_of(trainer.config, trainer.options).evaluation_flops / trainer.config.evaluate.samples
    denoiser, precision = trainer.state.denoiser, measuring_precision(protocol, trainer.options.precision)

    def turn() -> tuple[int, int]:
        denoiser.eval()
        with trainer.state.ema.applied(), computing_in(denoiser, precision, trainer.device):
            trainer.evaluator.draw(protocol)
        denoiser.train()
        return protocol.samples, 1

    return _Way("evaluation", turn, image_flops)


def _measured(way: _Way, plain: _Way, ceiling: float) -> dict[str, Any]:
    """Return what is printed of a way."""
    share = plain.images / way.images
    ratios = [share * seconds / other for seconds, other in zip(way.seconds, plain.seconds, strict=True)]
    wall = statistics.median(way.wall)
    row: dict[str, Any] = {
        "name": way.name,
        "images_per_second": way.images / wall,
        "ms_per_step": 1000 * wall / way.steps,
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }
    if way.image_flops is not None:
        assert plain.image_flops is not None
        row["flops_ratio"] = way.image_flops / plain.image_flops
        row["flops_utilisation"] = way.image_flops * way.images / wall / ceiling
    return row


def _clock(device: torch.device) -> float:
    """Return elapsed seconds once a GPU has finished its work, or seconds of CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
