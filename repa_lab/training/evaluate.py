"""Measurements of a run at a checkpoint, on averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn
from torchvision.utils import make_grid

from repa_lab.align import Tokens
from repa_lab.align.regularizer import Pair
from repa_lab.data.fingerprint import DataError, digest, file_digest
from repa_lab.encoders.extractor import Extractor
from repa_lab.encoders.targets import Targets
from repa_lab.metrics import Statistics, cka, cosine_gap, frechet_distance, statistics
from repa_lab.models.tap import Tap
from repa_lab.runs import files
from repa_lab.runs.files import Row
from repa_lab.spec import EvaluateConfig, ExtractorConfig
from repa_lab.training.images import Images
from repa_lab.training.objective import interpolate
from repa_lab.training.protocol import metric_name
from repa_lab.training.sampling import Sampling
from repa_lab.training.streams import generator

Match = Callable[[Tokens, Tokens], Pair]

_GRID_SAMPLES = 40
_GRID_COLUMNS = 10
_GRID_MIN_PIXELS = 32
# Held-out images are measured under the same noise in every run, whatever its seed.
_MEASURING_SEED = 0
_REFERENCE_BATCH = 512
_MIN_HELD_OUT = 4


class DivergedError(RuntimeError):
    """The loss, or what the denoiser draws, is no longer a finite number."""


class _Drawn(NamedTuple):
    """A batch of samples: the number of the first, those to show, and features, or None where a sample is not finite."""

    start: int
    shown: torch.Tensor
    features: NDArray[np.float64] | None


class Evaluator:
    """Measures a denoiser with the weights it has at the moment.

    Args:
        config: what to measure and how.
        images: the data; its training images are the Frechet distance's reference.
        seed: the run's seed, from which its samples are drawn.
        targets: encoder tokens, or None if alignment is not measured.
        cache: where reference statistics are kept.
        device: where to run.
        part: which of how many processes this is: they share the sampling, and every one of them learns the result.

    Raises:
        EncoderError: the extractor's weights are missing.
        DataError: too few images are held out to measure alignment on.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        images: Images,
        seed: int,
        targets: Targets | None,
        cache: Path,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if targets is not None and len(images.split.held_out) < _MIN_HELD_OUT:
            raise DataError("holdout", f"alignment is measured on held-out images: hold out {_MIN_HELD_OUT} or more")
        self._config, self._images, self._targets, self._device, self._part = config, images, targets, device, part
        self._extractor = Extractor(config.extractor.name, config.extractor.weights, device)
        self._reference = reference_statistics(config.extractor, self._extractor, images, cache)
        space, classes = images.space, images.source.num_classes
        shape = (space.channels, *space.size)
        self._sampling = Sampling(shape, classes, config.sampler, config.guidance, seed)

    def quality(self, denoiser: nn.Module) -> tuple[Row, torch.Tensor]:
        """The Frechet distance by its full name, and the first samples as uint8 pixels ``(n, C, H, W)``.

        Raises:
            DivergedError: the samples are not finite; as pixels they would pass for images.
        """
        config = self._config
        batches = self._sampling.batches(denoiser, config.samples, config.batch_size, self._device, self._part)
        drawn = sorted(gather_object([self._judge(start, batch) for start, batch in batches]), key=lambda one: one.start)
        if any(one.features is None for one in drawn):
            raise DivergedError("the denoiser draws samples that are not finite")
        found = statistics(np.concatenate([one.features for one in drawn]))
        reference = self._reference
        distance = frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
        return {metric_name(config): distance}, torch.cat([one.shown for one in drawn])

    def _judge(self, start: int, batch: torch.Tensor) -> _Drawn:
        if not batch.isfinite().all():
            return _Drawn(start, torch.empty(0), None)
        pixels = self._images.space.decode(batch).cpu()
        return _Drawn(start, pixels[: max(0, _GRID_SAMPLES - start)].clone(), self._extractor(pixels))

    @torch.no_grad()
    def alignment(self, denoiser: nn.Module, tap: Tap, match: Match | None) -> Row:
        """Agreement of the tap with the encoder on held-out images: linear CKA of image means, and the projector's cosine.

        Args:
            denoiser: runs on the held-out images at the measuring time, under the null label.
            tap: set on the denoiser.
            match: projects the tap for this very encoder and matches the two token by token; None measures no cosine.
        """
        if self._targets is None:
            return {}
        student, teacher = self._held_out_tokens(denoiser, tap, self._targets)
        row: Row = {"heldout/cka": cka(_image_means(student), _image_means(teacher))}
        if match is not None:
            pairs = [
                match(Tokens(s.to(self._device), student.grid), Tokens(t.to(self._device), teacher.grid))
                for s, t in zip(student.values.split(256), teacher.values.split(256), strict=True)
            ]
            ours, theirs = (torch.cat([side.float().cpu() for side in sides]).numpy() for sides in zip(*pairs, strict=True))
            row["heldout/cosine"], row["heldout/gap"] = cosine_gap(ours, theirs)
        return row

    def _held_out_tokens(self, denoiser: nn.Module, tap: Tap, targets: Targets) -> tuple[Tokens, Tokens]:
        """Tap and encoder tokens of all held-out images at the measuring time under the null label, on the CPU."""
        students, teachers = [], []
        for index in self._images.split.held_out.split(self._config.batch_size):
            draw = generator(_MEASURING_SEED, "held-out", int(index[0]))
            x = self._images.space.encode(index.tolist(), self._images.space.draw(len(index), draw))
            noise = torch.randn(x.shape, generator=draw)
            t = torch.full((len(x),), self._config.timestep)
            x_t, _ = interpolate(x, noise, t)
            null = torch.full((len(x),), self._images.source.num_classes)
            denoiser(x_t.to(self._device), t.to(self._device), null.to(self._device))
            students.append(tap.take())
            teachers.append(targets(index, self._device))
        return _gather(students), _gather(teachers)


def reference_statistics(config: ExtractorConfig, extractor: Extractor, images: Images, cache: Path) -> Statistics:
    """Mean and covariance of the training images' features, computed once for all runs that share them."""
    source, train = images.source, images.split.train
    weights = file_digest(Path(config.weights)) if config.weights else None
    identity = {"data": source.fingerprint, "extractor": config.name, "weights": weights, "images": train.tolist()}
    path = cache / "reference" / f"{digest(identity)[:16]}.npz"
    if path.exists():
        stored = np.load(path)
        return Statistics(stored["mu"], stored["sigma"], int(stored["count"]))
    parts = [extractor(source.read(index.tolist())) for index in train.split(_REFERENCE_BATCH)]
    found = statistics(np.concatenate(parts))
    files.replace_atomically(path, lambda temporary: _save(temporary, found))
    return found


def write_grid(pixels: torch.Tensor, path: Path) -> None:
    """Samples ``(n, C, H, W)`` uint8 as one PNG, ten to a row; tiny images are enlarged without smoothing."""
    from PIL import Image

    scale = max(1, _GRID_MIN_PIXELS // pixels.shape[-1])
    enlarged = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(enlarged, nrow=_GRID_COLUMNS, padding=2, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    files.replace_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def _save(path: Path, found: Statistics) -> None:
    with path.open("wb") as file:
        np.savez(file, mu=found.mu, sigma=found.sigma, count=found.count)


def _image_means(tokens: Tokens) -> NDArray[np.float32]:
    means: NDArray[np.float32] = tokens.values.mean(dim=1).numpy()
    return means


def _gather(parts: list[Tokens]) -> Tokens:
    return Tokens(torch.cat([part.values.float().cpu() for part in parts]), parts[0].grid)
