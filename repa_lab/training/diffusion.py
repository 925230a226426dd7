"""The diffusion process: noisy images, targets, times and loss in training, and integration to samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from repa_lab.data.latents import Space
from repa_lab.models.released import PretrainedError, is_flow, noise_problem
from repa_lab.spec import EvaluateConfig
from repa_lab.spec.evaluate import GuidanceConfig, Labelling, SamplerConfig
from repa_lab.spec.train import TimeSettings
from repa_lab.training.batches import generator

UNIFORM, LOGIT_NORMAL = TimeSettings(type="uniform"), TimeSettings(type="logit_normal")
_STEPS = 1000  # denoisers are given the step number divided by this
# The papers' code stops its stochastic steps at t = 0.04 and takes the rest in one deterministic step.
_SDE_LAST_TIME = 0.04
# Return the velocity of a state at a time, given also the time at which the current solver step starts.
Velocity = Callable[[torch.Tensor, float, float], torch.Tensor]


@dataclass(frozen=True)
class Flow:
    """The linear path of SiT, REPA and flow matching; the target is the velocity, noise minus data.

    Attributes:
        shift: moves times toward noise by ``shift * t / (1 + (shift - 1) * t)`` (SD3, Eq. 23).
        default: the distribution of times before the shift; released flow models use the logit-normal one (SD3, 3.1).
    """

    shift: float = 1.0
    default: TimeSettings = UNIFORM

    def times(self, settings: TimeSettings | None, count: int, draw: torch.Generator) -> torch.Tensor:
        """Draw training times ``(count,)`` on the generator's device, float32; None takes the default."""
        t = _unit_times(settings or self.default, count, draw)
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def corrupt(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noisy images ``(1 - t) x + t noise`` and the targets ``noise - x``, like ``x`` ``(B, C, H, W)``.

        Times are ``(B,)``, or of pixels ``(B, 1, H, W)``.
        """
        time = _for_pixels(t, x.ndim)
        return (1 - time) * x + time * noise, noise - x

    def min_snr(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the Min-SNR weight (2303.09556) of the squared error at times ``(B,)`` or ``(B, 1, H, W)``.

        Min-SNR weights the error of the clean image by ``min(SNR, gamma)``; this is the equal weight for the velocity,
        whose error times ``t`` is the image's. SNR is ``((1 - t) / t)^2``. The weight is ``(B, 1, 1, 1)`` or
        ``(B, 1, H, W)``.
        """
        time = _for_pixels(t)
        return torch.minimum((1 - time).square(), gamma * time.square())


class Diffusion:
    """The discrete path of DDPM: ``sqrt(a) x + sqrt(1 - a) noise``.

    Times are step numbers divided by 1,000, because denoisers are given the step number: with 1,000 steps the last
    time is 0.999, with Kolors' 1,100 steps 1.099.

    Args:
        alphas: the cumulative product ``a`` at every step, ``(steps,)``.
        prediction: ``epsilon`` (noise), ``v_prediction`` (``sqrt(a) noise - sqrt(1 - a) x``) or ``sample`` (image).
    """

    def __init__(self, alphas: torch.Tensor, prediction: str) -> None:
        if prediction not in _TARGETS:
            raise PretrainedError(f"prediction_type '{prediction}' is not known; known: {', '.join(_TARGETS)}")
        self._signal, self._noise = alphas.double().sqrt().float(), (1 - alphas.double()).clamp_min(0).sqrt().float()
        self._prediction = prediction

    def times(self, settings: TimeSettings | None, count: int, draw: torch.Generator) -> torch.Tensor:
        """Draw training times ``(count,)``, uniform over the steps by default; logit-normal times are rounded down."""
        steps = len(self._signal)
        if settings is None or settings.type == "uniform":
            return torch.randint(steps, (count,), generator=draw, device=draw.device) / _STEPS
        return (_unit_times(settings, count, draw) * steps).floor().clamp_max(steps - 1) / _STEPS

    def corrupt(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noisy images and the targets, ``(B, C, H, W)``; other times are rounded to the nearest step."""
        signal, scale = self._at(t, x.ndim)
        return signal * x + scale * noise, _TARGETS[self._prediction](x, noise, signal, scale)

    def min_snr(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the Min-SNR weight with SNR ``a / (1 - a)``; see :meth:`Flow.min_snr`."""
        signal, scale = self._at(t)
        return _MIN_SNR[self._prediction](signal.square(), scale.square(), gamma)

    def _at(self, t: torch.Tensor, ndim: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scales of image and noise at times ``t``, ``(B, 1, 1, 1)`` or ``(B, 1, H, W)`` each."""
        step = (_for_pixels(t, ndim) * _STEPS).round().long().clamp_max(len(self._signal) - 1)
        if self._signal.device != t.device:  # once: a copy to a GPU in every step would wait for it
            self._signal, self._noise = self._signal.to(t.device), self._noise.to(t.device)
        signal, scale = (values[step] for values in (self._signal, self._noise))
        return signal, scale


_TARGETS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "epsilon": lambda x, noise, signal, scale: noise,
    "v_prediction": lambda x, noise, signal, scale: signal * noise - scale * x,
    "sample": lambda x, noise, signal, scale: x,
}
# By the powers of signal and noise: the image's error is the noise's over SNR, and (1 - a) times that of v.
_MIN_SNR: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "epsilon": lambda signal, noise, gamma: (gamma * noise / signal).clamp_max(1),
    "v_prediction": lambda signal, noise, gamma: torch.minimum(signal, gamma * noise),
    "sample": lambda signal, noise, gamma: (signal / noise).clamp_max(gamma),
}


Process = Flow | Diffusion


def process_of(scheduler: Mapping[str, Any]) -> Process:
    """Return the noise process that a released model was trained with, by its ``scheduler_config.json``.

    A shift that depends on the image size is left out: it is used for sampling only, as in diffusers' training scripts.

    Raises:
        PretrainedError: the noise or the prediction is not known.
    """
    if is_flow(scheduler):
        is_static = not scheduler.get("use_dynamic_shifting", False)
        shift = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
        return Flow(float(shift) if is_static else 1.0, LOGIT_NORMAL)
    if message := noise_problem(scheduler):
        raise PretrainedError(message)
    from diffusers import DDPMScheduler

    alphas = DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod
    return Diffusion(alphas, scheduler.get("prediction_type", "epsilon"))


def over_pixels(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return times of tokens ``(B, 1, h, w)`` as times of the pixels of ``x`` ``(B, 1, H, W)``; ``(B,)`` unchanged."""
    return t if t.ndim == 1 else functional.interpolate(t, x.shape[-2:], mode="nearest")


def _for_pixels(t: torch.Tensor, ndim: int = 4) -> torch.Tensor:
    """Return times ``(B,)`` with as many dimensions as the images, or clips; those of pixels unchanged."""
    return t.view(-1, *(1,) * (ndim - 1)) if t.ndim == 1 else t


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared error of a prediction ``(B, C, H, W)``, a float32 scalar.

    Args:
        weight: of each sample ``(B, 1, 1, 1)``, or of each pixel ``(B, 1, H, W)``; None weights all samples equally.
    """
    error = (prediction.float() - target).square()
    if weight is None:
        return error.mean()
    return (weight.view(*weight.shape, *(1,) * (error.ndim - weight.ndim)) * error).mean()


def _unit_times(settings: TimeSettings, count: int, draw: torch.Generator) -> torch.Tensor:
    """Draw times ``(count,)`` between 0 and 1."""
    if settings.type == "uniform":
        return torch.rand(count, generator=draw, device=draw.device)
    return (settings.mean + settings.std * torch.randn(count, generator=draw, device=draw.device)).sigmoid()


def shares(count: int, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[range]:
    """Yield the batches of ``count`` samples that process ``part[0]`` of ``part[1]`` draws."""
    number, parts = part
    for start in range(number * batch_size, count, parts * batch_size):
        yield range(start, min(start + batch_size, count))


def kinds_of(index: range, kinds: int, labels: Labelling, seed: int) -> list[int]:
    """Return the class, or the number of the caption, of each sample: in turn if `balanced`, else drawn at random."""
    if labels == "balanced":
        return [i % kinds for i in index]
    return [int(torch.randint(kinds, (1,), generator=generator(seed, "sampled labels", i))) for i in index]


@dataclass(frozen=True)
class FieldSampler:
    """Integrates the velocity field of a denoiser from scratch.

    Attributes:
        denoiser: with ``forward(x, t, y) -> velocity``.
        classes: number of classes; it is also the null label.
    """

    denoiser: nn.Module
    space: Space
    shape: tuple[int, int, int]  # of a sample
    classes: int
    config: EvaluateConfig
    seed: int
    device: torch.device

    def __call__(self, index: range) -> torch.Tensor | None:
        """Return the samples with these numbers as uint8 pixels ``(n, C, H, W)``; None if a pixel is not finite."""
        pixels = self.space.decode(self.draw(index), self.config.rounding)
        return None if pixels is None else pixels.cpu()

    def shown(self) -> torch.Tensor | None:
        """Return None: a denoiser from scratch has no prompts."""
        return None

    @torch.no_grad()
    def draw(self, index: range) -> torch.Tensor:
        """Return the samples with these numbers before decoding, ``(b, C, H, W)``, float32 on the device."""
        draws = [generator(self.seed, "sampling", i, device=self.device) for i in index]

        def noise() -> torch.Tensor:
            return torch.stack([torch.randn(self.shape, generator=draw, device=self.device) for draw in draws]).double()

        labels = torch.tensor(kinds_of(index, self.classes, self.config.labels, self.seed), device=self.device)
        # On a CPU a pass of twice the batch is no faster and, for some batch sizes, rounds differently.
        is_one_pass = self.device.type != "cpu"
        velocity = guided(self.denoiser, labels, self.classes, self.config.guidance, is_one_pass)
        return integrate(velocity, noise, self.config.sampler).float()


def guided(
    denoiser: nn.Module, labels: torch.Tensor, null: int, guidance: GuidanceConfig, is_one_pass: bool
) -> Velocity:
    """Return the velocity field with classifier-free guidance in solver steps that start within [low, high].

    As in REPA's code the start of the step decides, so Heun's second evaluation is guided if the first one is.

    Args:
        denoiser: with ``forward(x, t, y) -> velocity``.
        labels: of the samples, ``(b,)``.
        is_one_pass: whether the conditional and the unconditional velocity are computed as one batch of ``2 b``.
    """
    null_labels = torch.full_like(labels, null)

    def velocity(x: torch.Tensor, t: float, start: float) -> torch.Tensor:
        def at(*conditions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, states = torch.cat(conditions), torch.cat([x.float()] * len(conditions))
            out: torch.Tensor = denoiser(states, torch.full((len(y),), t, device=x.device), y)
            return out.to(x.dtype).chunk(len(conditions))

        if guidance.scale == 1 or not guidance.low <= start <= guidance.high:
            return at(labels)[0]
        both = at(labels, null_labels) if is_one_pass else (*at(labels), *at(null_labels))
        conditional, unconditional = both
        return unconditional + guidance.scale * (conditional - unconditional)

    return velocity


def integrate(velocity: Velocity, noise: Callable[[], torch.Tensor], sampler: SamplerConfig) -> torch.Tensor:
    """Integrate from noise at t = 1 to data at t = 0, ``(b, C, H, W)``, with the state in float64."""
    if sampler.type == "sde":
        return euler_maruyama(velocity, noise, sampler.steps)
    x = noise()
    times = torch.linspace(1, 0, sampler.steps + 1, dtype=torch.float64).tolist()
    for now, after in itertools.pairwise(times):
        slope = velocity(x, now, now)
        ahead = x + slope * (after - now)
        if sampler.solver == "heun" and after > 0:
            ahead = x + (slope + velocity(ahead, after, now)) / 2 * (after - now)
        x = ahead
    return x


def euler_maruyama(velocity: Velocity, noise: Callable[[], torch.Tensor], steps: int) -> torch.Tensor:
    """Integrate the papers' SDE: ``dx = (v - t s) dt + sqrt(2 t) dW`` with the score ``s = -(x + (1 - t) v) / t``.

    There are ``steps - 1`` stochastic steps on ``linspace(1, 0.04, steps)`` and a deterministic one to 0, so ``steps``
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
