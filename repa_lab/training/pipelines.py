"""Samples through the family's own pipeline of diffusers, around the denoiser in training."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repa_lab.data.autoencoder import Autoencoder, quantise
from repa_lab.models.family import pipeline_of
from repa_lab.models.pretrained import DiffusersDenoiser, sampling_pipeline
from repa_lab.spec import EvaluateConfig
from repa_lab.training.conditioning import Captions, Condition, Labels
from repa_lab.training.device import computing_in
from repa_lab.training.sampling import kinds_of, shares
from repa_lab.training.streams import generator

_PIXELS_AT_ONCE = 8 << 20  # eight images of 1024 px


@dataclass(frozen=True)
class PipelineSampler:
    """Draws with a pipeline's own scheduler, from conditioning that was encoded ahead of time; see :class:`Sampler`.

    Attributes:
        folder: of the pipeline.
        denoiser: what is trained.
        vae: decodes.
        conditioning: of samples.
        config: steps, guidance, prompts, rounding.
        side: pixels along each side.
        seed: the run's seed.
        device: where to run.
        precision: of the denoiser; the scheduler's state and the autoencoder are float32.
    """

    folder: Path
    denoiser: DiffusersDenoiser
    vae: Autoencoder
    conditioning: Captions | Labels
    config: EvaluateConfig
    side: int
    seed: int
    device: torch.device
    precision: str

    def __call__(self, index: range) -> torch.Tensor | None:
        """See :class:`Sampler`: sample i has the noise of (seed, i), and its class or caption by :func:`kinds_of`."""
        parts = []
        for part in shares(len(index), self.at_once):
            numbers = index[part.start : part.stop]
            kinds = kinds_of(numbers, self.conditioning.kinds, self.config.labels, self.seed)
            condition, null = (self.conditioning.of_samples(kinds, dropped) for dropped in (False, True))
            parts.append(self._draw(condition, null, "sampling", numbers))
        return _joined(parts)

    def shown(self) -> torch.Tensor | None:
        """See :class:`Sampler`: the prompts of the spec, each always from the same noise."""
        texts, conditioning = self.config.prompts, self.conditioning
        if not texts or not isinstance(conditioning, Captions):
            return None
        null = conditioning.of_texts([""])
        parts = []
        for part in shares(len(texts), self.at_once):
            empty = {name: values.expand(len(part), *values.shape[1:]) for name, values in null.items()}
            parts.append(self._draw(conditioning.of_texts(texts[part.start : part.stop]), empty, "prompts", part))
        return _joined(parts)

    @property
    def at_once(self) -> int:
        """Images that go through the denoiser at a time: a batch of the evaluation, or as many as memory is likely to hold."""
        return min(self.config.batch_size, max(1, _PIXELS_AT_ONCE // self.side**2))

    @torch.no_grad()
    def _draw(self, condition: Condition, null: Condition, stream: str, index: range) -> torch.Tensor | None:
        condition, null = _on(condition, self.device), _on(null, self.device)
        draws = [generator(self.seed, stream, i) for i in index]
        prompts = pipeline_of(self.denoiser.family).call(condition, null, self.config.guidance.scale)
        with computing_in(self.denoiser.net, self.precision, self.device):
            (images, *_) = self._pipeline(**prompts, **self._how, generator=draws)
        if not np.isfinite(images).all():
            return None
        return quantise(torch.from_numpy(images) * 255, self.config.rounding).permute(0, 3, 1, 2)

    @functools.cached_property
    def _pipeline(self) -> Any:
        self.vae.model.to(self.device)
        return sampling_pipeline(self.folder, self.denoiser, self.vae.model, self.side)

    @property
    def _how(self) -> dict[str, Any]:
        how = {"num_inference_steps": self.config.sampler.steps, "output_type": "np", "return_dict": False}
        takes = inspect.signature(type(self._pipeline).__call__).parameters
        # A class-conditional pipeline cannot be told the size: it draws what its model was built for.
        return {**how, **({"height": self.side, "width": self.side} if "height" in takes else {})}


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None


def _on(condition: Condition, device: torch.device) -> Condition:
    return {name: values.to(device) for name, values in condition.items()}
