"""Samples from a trained denoiser; sample i depends on (seed, i) alone, whatever the batch size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from repa_lab.data.space import Space
from repa_lab.spec.evaluate import GuidanceConfig, Labelling, Rounding, SamplerConfig
from repa_lab.training.streams import generator

# The papers' code stops its stochastic steps at t = 0.04 and takes the rest in one deterministic step.
_SDE_LAST_TIME = 0.04
# The velocity of a state at a time, and the time at which the step that asks for it starts.
Velocity = Callable[[torch.Tensor, float, float], torch.Tensor]
Noise = Callable[[], torch.Tensor]


class Sampler(Protocol):
    """Draws samples with a run's denoiser, with the weights it has at the moment."""

    def __call__(self, index: range) -> torch.Tensor | None:
        """Samples by their number as uint8 pixels ``(n, C, H, W)`` on the CPU; None if one of them is not finite, for
        as pixels it would pass for an image."""
        ...

    def shown(self) -> torch.Tensor | None:
        """What is shown to people, as uint8 pixels ``(n, C, H, W)``; None if that is the first samples, or is not finite."""
        ...


class FieldSampler:
    """Integrates the velocity field of a denoiser that the lab built.

    Args:
        sampling: what is sampled and how.
        denoiser: with ``forward(x, t, y) -> velocity``.
        space: makes pixels of what is drawn.
        device: where to run.
        rounding: to 8 bits.
    """

    def __init__(
        self,
        sampling: Sampling,
        denoiser: nn.Module,
        space: Space,
        device: torch.device,
        rounding: Rounding = "nearest",
    ) -> None:
        self._sampling, self._denoiser, self._space, self._device = sampling, denoiser, space, device
        self._rounding: Rounding = rounding

    def __call__(self, index: range) -> torch.Tensor | None:
        """See :class:`Sampler`."""
        pixels = self._space.decode(self._sampling.batch(self._denoiser, index, self._device), self._rounding)
        return None if pixels is None else pixels.cpu()

    def shown(self) -> torch.Tensor | None:
        """See :class:`Sampler`."""
        return None


def shares(count: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[range]:
    """The batches of ``count`` samples that process ``part[0]`` of ``part[1]`` draws; their number and size stay the same."""
    number, parts = part
    for start in range(number * batch_size, count, parts * batch_size):
        yield range(start, min(start + batch_size, count))


def kinds_of(index: range, kinds: int, labels: Labelling, seed: int) -> list[int]:
    """The class, or the caption, of samples by their number: every one of ``kinds`` in turn, or each drawn at random."""
    if labels == "balanced":
        return [i % kinds for i in index]
    return [int(torch.randint(kinds, (1,), generator=generator(seed, "sampled labels", i))) for i in index]


@dataclass(frozen=True)
class Sampling:
    """What is sampled and how: arrays of ``shape`` ``(C, H, W)`` of ``labels``; see :func:`kinds_of`."""

    shape: tuple[int, int, int]
    num_classes: int
    sampler: SamplerConfig
    guidance: GuidanceConfig
    seed: int
    labels: Labelling = "balanced"

    @torch.no_grad()
    def batch(self, denoiser: nn.Module, index: range, device: torch.device) -> torch.Tensor:
        """The samples of these numbers ``(b, C, H, W)``, float32 on ``device``."""
        draws = [generator(self.seed, "sampling", i) for i in index]

        def noise() -> torch.Tensor:
            drawn = torch.stack([torch.randn(self.shape, generator=draw) for draw in draws])
            return drawn.to(device=device, dtype=torch.float64)

        labels = torch.tensor(kinds_of(index, self.num_classes, self.labels, self.seed), device=device)
        velocity = guided(denoiser, labels, self.num_classes, self.guidance)
        return integrate(velocity, noise, self.sampler).float()


def guided(denoiser: nn.Module, labels: torch.Tensor, null: int, guidance: GuidanceConfig) -> Velocity:
    """The velocity field, with classifier-free guidance in steps that start in [low, high] if the scale is not 1.

    REPA's code decides by the start of the step, so Heun's second evaluation is guided exactly where its first one is.
    """

    def velocity(x: torch.Tensor, t: float, start: float) -> torch.Tensor:
        def at(y: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = denoiser(x.float(), torch.full((len(x),), t, device=x.device), y)
            return out.to(x.dtype)

        conditional = at(labels)
        if guidance.scale == 1 or not guidance.low <= start <= guidance.high:
            return conditional
        unconditional = at(torch.full_like(labels, null))
        return unconditional + guidance.scale * (conditional - unconditional)

    return velocity


def integrate(velocity: Velocity, noise: Noise, sampler: SamplerConfig) -> torch.Tensor:
    """From noise at t = 1 to data at t = 0, ``(b, C, H, W)`` each, with the state in float64."""
    if sampler.type == "sde":
        return euler_maruyama(velocity, noise, sampler.steps)
    step = {"euler": _euler, "heun": _heun}[sampler.solver]
    x = noise()
    times = torch.linspace(1, 0, sampler.steps + 1, dtype=torch.float64).tolist()
    for now, after in itertools.pairwise(times):
        x = step(velocity, x, now, after)
    return x


def euler_maruyama(velocity: Velocity, noise: Noise, steps: int) -> torch.Tensor:
    """The papers' SDE sampler: ``dx = (v - t s) dt + sqrt(2 t) dW`` with the score ``s = -(x + (1 - t) v) / t``.

    ``steps - 1`` stochastic steps on ``linspace(1, 0.04, steps)``, then a deterministic one to 0, so ``steps``
    evaluations.
    """
    x = noise()
    times = [*torch.linspace(1, _SDE_LAST_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    for now, after in itertools.pairwise(times):
        v = velocity(x, now, now)
        score = -(x + (1 - now) * v) / now
        x = x + (v - now * score) * (after - now)
        if after > 0:
            x = x + (2 * now * (now - after)) ** 0.5 * noise()
    return x


def _euler(velocity: Velocity, x: torch.Tensor, now: float, after: float) -> torch.Tensor:
    return x + velocity(x, now, now) * (after - now)


def _heun(velocity: Velocity, x: torch.Tensor, now: float, after: float) -> torch.Tensor:
    slope = velocity(x, now, now)
    ahead = x + slope * (after - now)
    if after == 0:
        return ahead
    return x + (slope + velocity(ahead, after, now)) / 2 * (after - now)
