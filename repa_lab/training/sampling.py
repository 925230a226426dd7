"""Draw samples from a denoiser; sample i depends on (seed, i) and the kind of device only, whatever the batch size."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repa_lab.data.latents import Autoencoder, Space, quantise
from repa_lab.models.family import pipeline_of
from repa_lab.models.pretrained import DiffusersDenoiser, sampling_pipeline
from repa_lab.spec import EvaluateConfig
from repa_lab.spec.evaluate import GuidanceConfig, Labelling, SamplerConfig
from repa_lab.training.batches import generator
from repa_lab.training.data import Captions, Condition, Labels
from repa_lab.training.device import computing_in

# The papers' code stops its stochastic steps at t = 0.04 and takes the rest in one deterministic step.
_SDE_LAST_TIME = 0.04
_PIXELS_AT_ONCE = 8 << 20  # eight images of 1024 px
# Return the velocity of a state at a time, given also the time at which the current solver step starts.
Velocity = Callable[[torch.Tensor, float, float], torch.Tensor]
Noise = Callable[[], torch.Tensor]


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
        space: decodes samples to pixels.
        shape: of one sample, ``(C, H, W)``.
        classes: number of classes; it is also the null label.
        config: sampler, guidance, labels, rounding.
        seed: the run's seed.
        device: where samples are drawn.
    """

    denoiser: nn.Module
    space: Space
    shape: tuple[int, int, int]
    classes: int
    config: EvaluateConfig
    seed: int
    device: torch.device

    def __call__(self, index: range) -> torch.Tensor | None:
        """Return the samples with these numbers as uint8 pixels ``(n, C, H, W)`` on the CPU.

        Return None if any pixel is not finite; clamping would turn NaN into a valid pixel.
        """
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
        null: the null label.
        guidance: scale and interval.
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


def integrate(velocity: Velocity, noise: Noise, sampler: SamplerConfig) -> torch.Tensor:
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


def euler_maruyama(velocity: Velocity, noise: Noise, steps: int) -> torch.Tensor:
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


@dataclass(frozen=True)
class PipelineSampler:
    """Draws with the family's own diffusers pipeline, from conditioning that was encoded ahead of time.

    Attributes:
        folder: of the pipeline.
        denoiser: the trained denoiser.
        vae: decodes latents.
        conditioning: captions or labels of samples.
        config: sampler steps, guidance, prompts, rounding.
        side: pixels along each side.
        frames: frames of a clip; 0 for images.
        seed: the run's seed.
        device: where samples are drawn.
        precision: of the denoiser; the scheduler and the autoencoder compute in float32.
    """

    folder: Path
    denoiser: DiffusersDenoiser
    vae: Autoencoder
    conditioning: Captions | Labels
    config: EvaluateConfig
    side: int
    frames: int
    seed: int
    device: torch.device
    precision: str

    def __call__(self, index: range) -> torch.Tensor | None:
        """Return samples as :meth:`FieldSampler.__call__` does; noise and captions depend on their numbers only.

        Clips are ``(n, C, frames, H, W)``.
        """
        images = []
        for part in shares(len(index), self.at_once):
            numbers = index[part.start : part.stop]
            kinds = kinds_of(numbers, self.conditioning.kinds, self.config.labels, self.seed)
            condition, null = (self.conditioning.of_samples(kinds, dropped) for dropped in (False, True))
            images.append(self._draw(condition, null, "sampling", numbers))
        return _joined(images)

    def shown(self) -> torch.Tensor | None:
        """Return samples of the spec's prompts, each always from the same noise, as uint8 pixels ``(n, C, H, W)``.

        Return None if there are no prompts or a pixel is not finite.
        """
        texts, conditioning = self.config.prompts, self.conditioning
        if not texts or not isinstance(conditioning, Captions):
            return None
        null = conditioning.of_texts([""])
        images = []
        for part in shares(len(texts), self.at_once):
            empty = {name: values.expand(len(part), *values.shape[1:]) for name, values in null.items()}
            images.append(self._draw(conditioning.of_texts(texts[part.start : part.stop]), empty, "prompts", part))
        return _joined(images)

    @property
    def at_once(self) -> int:
        """Images in one pass of the denoiser: an evaluation batch, or fewer if the images are large."""
        return min(self.config.batch_size, max(1, _PIXELS_AT_ONCE // (self.side**2 * max(self.frames, 1))))

    @torch.no_grad()
    def _draw(self, condition: Condition, null: Condition, stream: str, index: range) -> torch.Tensor | None:
        condition, null = ({name: part.to(self.device) for name, part in given.items()} for given in (condition, null))
        arguments = pipeline_of(self.denoiser.family).call(condition, null, self.config.guidance.scale)
        if "height" in inspect.signature(type(self._pipeline).__call__).parameters:  # class-conditional ones lack it
            arguments = {**arguments, "height": self.side, "width": self.side}
        if self.frames:
            arguments = {**arguments, "num_frames": self.frames}
        draws = [generator(self.seed, stream, i, device=self.device) for i in index]
        steps = self.config.sampler.steps
        with computing_in(self.denoiser.net, self.precision, self.device):
            (images, *_) = self._pipeline(
                **arguments, num_inference_steps=steps, output_type="np", return_dict=False, generator=draws
            )
        if not np.isfinite(images).all():
            return None
        return quantise(torch.from_numpy(images) * 255, self.config.rounding).movedim(-1, 1)

    @functools.cached_property
    def _pipeline(self) -> Any:
        self.vae.model.to(self.device)
        return sampling_pipeline(self.folder, self.denoiser, self.vae.model, self.side)


Sampler = FieldSampler | PipelineSampler


def _joined(images: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return all images in one tensor; None if a part is None."""
    finite = [part for part in images if part is not None]
    return torch.cat(finite) if len(finite) == len(images) else None
