"""The noise that a denoiser is trained against: what a noisy image is, what is to be predicted, and at which times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from repa_lab.models.released import is_flow, noise_problem

TimeSampling = Literal["auto", "uniform", "lognormal"]
_STEPS = 1000  # of the clock that denoisers are told the time by


class ProcessError(ValueError):
    """A scheduler whose noise is not known."""


class Process(Protocol):
    """A path from data at time 0 to noise at time 1."""

    def times(self, kind: TimeSampling, count: int, draw: torch.Generator) -> torch.Tensor:
        """Times ``(count,)`` to train at, float32."""
        ...

    def corrupt(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy images and what is to be predicted of them, both ``(B, C, H, W)``; ``t`` is ``(B,)``."""
        ...

    def min_snr(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the weight of each sample's squared error of the prediction, ``(B, 1, 1, 1)``, at times ``t``
        ``(B,)``.

        Min-SNR (2303.09556) weights the error of the clean image by ``min(SNR, gamma)``; here that is written for the
        error of what is predicted.
        """
        ...


@dataclass(frozen=True)
class Flow:
    """The linear path of SiT, REPA and flow matching; predicted is its velocity, noise minus data.

    Attributes:
        shift: how much later the times are drawn than they would be: ``shift * t / (1 + (shift - 1) * t)`` (SD3, Eq.
            23).
        auto: the distribution that ``auto`` means; released flow models are trained with the log-normal one (SD3,
            section 3.1).
    """

    shift: float = 1.0
    auto: Literal["uniform", "lognormal"] = "uniform"

    def times(self, kind: TimeSampling, count: int, draw: torch.Generator) -> torch.Tensor:
        """See :class:`Process`; ``lognormal`` is the sigmoid of a standard normal."""
        known = self.auto if kind == "auto" else kind
        t = torch.randn(count, generator=draw).sigmoid() if known == "lognormal" else torch.rand(count, generator=draw)
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def corrupt(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Process`: ``(1 - t) x + t noise``, and ``noise - x``."""
        time = t.view(-1, 1, 1, 1)
        return (1 - time) * x + time * noise, noise - x

    def min_snr(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """See :class:`Process`: the velocity's error is the image's over ``t``, and SNR is ``((1 - t) / t)^2``."""
        time = t.view(-1, 1, 1, 1)
        return torch.minimum((1 - time).square(), gamma * time.square())


class Diffusion:
    """The discrete path of DDPM: ``sqrt(a) x + sqrt(1 - a) noise``.

    Times are step numbers in thousandths, for denoisers are told the number of the step: of 1,000 steps the last is at
    0.999, of Kolors' 1,100 at 1.099.

    Args:
        alphas: the cumulated product ``a`` at every step, ``(steps,)``.
        prediction: ``epsilon`` (the noise), ``v_prediction`` (``sqrt(a) noise - sqrt(1 - a) x``) or ``sample`` (the
            image).
    """

    def __init__(self, alphas: torch.Tensor, prediction: str) -> None:
        if prediction not in _TARGETS:
            raise ProcessError(f"prediction_type '{prediction}' is not known; known: {', '.join(_TARGETS)}")
        self._signal, self._noise = alphas.double().sqrt().float(), (1 - alphas.double()).clamp_min(0).sqrt().float()
        self._prediction = prediction

    def times(self, kind: TimeSampling, count: int, draw: torch.Generator) -> torch.Tensor:
        """See :class:`Process`; ``auto`` is uniform over the steps, and ``lognormal`` falls on the nearest lower one."""
        steps = len(self._signal)
        if kind == "lognormal":
            return (torch.randn(count, generator=draw).sigmoid() * steps).floor().clamp_max(steps - 1) / _STEPS
        return torch.randint(steps, (count,), generator=draw) / _STEPS

    def corrupt(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Process`; a time between two steps is the nearest one's."""
        signal, scale = self._at(t)
        return signal * x + scale * noise, _TARGETS[self._prediction](x, noise, signal, scale)

    def min_snr(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """See :class:`Process`: SNR is ``a / (1 - a)``."""
        signal, scale = self._at(t)
        return _MIN_SNR[self._prediction](signal.square(), scale.square(), gamma)

    def _at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = (t * _STEPS).round().long().clamp_max(len(self._signal) - 1)
        signal, scale = (part.to(t.device)[step].view(-1, 1, 1, 1) for part in (self._signal, self._noise))
        return signal, scale


_Target = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_TARGETS: dict[str, _Target] = {
    "epsilon": lambda x, noise, signal, scale: noise,
    "v_prediction": lambda x, noise, signal, scale: signal * noise - scale * x,
    "sample": lambda x, noise, signal, scale: x,
}
# From the powers of signal and noise: the image's error is the noise's over SNR, and (1 - a) times that of v.
_MIN_SNR: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "epsilon": lambda signal, noise, gamma: (gamma * noise / signal).clamp_max(1),
    "v_prediction": lambda signal, noise, gamma: torch.minimum(signal, gamma * noise),
    "sample": lambda signal, noise, gamma: (signal / noise).clamp_max(gamma),
}


def process_of(scheduler: Mapping[str, Any]) -> Process:
    """The process that a released model was trained with, by its scheduler's ``scheduler_config.json``.

    Of a shift that depends on the image's size nothing is applied: it is one of sampling, and diffusers' own training
    scripts leave it out too.

    Raises:
        ProcessError: its noise, or what it predicts, is not known.
    """
    if is_flow(scheduler):
        static = not scheduler.get("use_dynamic_shifting", False)
        shift = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
        return Flow(float(shift) if static else 1.0, "lognormal")
    if message := noise_problem(scheduler):
        raise ProcessError(message)
    from diffusers import DDPMScheduler

    return Diffusion(
        DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod, scheduler.get("prediction_type", "epsilon")
    )
