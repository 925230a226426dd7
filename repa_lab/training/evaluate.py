"""Measurements of a run at a checkpoint, on averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid

from repa_lab.align import Tokens
from repa_lab.align.regularizer import Pair
from repa_lab.align.tokens import Grid
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import digest, file_digest
from repa_lab.data.sources import groups
from repa_lab.encoders.extractor import Extractor
from repa_lab.encoders.targets import Targets
from repa_lab.metrics import Statistics, cka, cosine, cosine_gap, frechet_distance, statistics
from repa_lab.models.tap import Tap
from repa_lab.runs import files
from repa_lab.runs.files import Row
from repa_lab.spec import ExtractorConfig, RunConfig
from repa_lab.training.images import Images
from repa_lab.training.model import Model
from repa_lab.training.protocol import metric_name
from repa_lab.training.sampling import shares
from repa_lab.training.streams import generator

Match = Callable[[Tokens, Tokens], Pair]

_GRID_SAMPLES = 40
_GRID_COLUMNS = 10
_GRID_MIN_PIXELS = 32
_GRID_MAX_WIDTH = 2560
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
        config: the run's settings.
        images: the data; its training images are the Frechet distance's reference.
        model: what is measured.
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
        config: RunConfig,
        images: Images,
        model: Model,
        targets: Targets | None,
        cache: Path,
        device: torch.device,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if targets is not None and len(images.split.held_out) < _MIN_HELD_OUT:
            raise DataError("holdout", f"alignment is measured on held-out images: hold out {_MIN_HELD_OUT} or more")
        self._config, self._metric, self._model = config.evaluate, metric_name(config), model
        self._images, self._targets, self._device, self._part = images, targets, device, part
        extractor = config.evaluate.extractor
        self._extractor = Extractor(extractor.name, extractor.weights, device)
        self._reference = reference_statistics(extractor, self._extractor, images, cache)

    def quality(self) -> tuple[Row, torch.Tensor]:
        """The Frechet distance by its full name, and what is shown of the samples as uint8 pixels ``(n, C, H, W)``.

        Raises:
            DivergedError: the samples are not finite.
        """
        config, sampler = self._config, self._model.sampler
        mine = [self._judge(index) for index in shares(config.samples, config.batch_size, self._part)]
        drawn = sorted(gather_object(mine), key=lambda one: one.start)
        if any(one.features is None for one in drawn):
            raise DivergedError("the denoiser draws samples that are not finite")
        found = statistics(np.concatenate([one.features for one in drawn]))
        reference = self._reference
        distance = frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
        shown = sampler.shown() if self._part[0] == 0 else None
        return {self._metric: distance}, torch.cat([one.shown for one in drawn]) if shown is None else shown

    def _judge(self, index: range) -> _Drawn:
        pixels = self._model.sampler(index)
        if pixels is None:
            return _Drawn(index.start, torch.empty(0), None)
        return _Drawn(index.start, pixels[: max(0, _GRID_SAMPLES - index.start)].clone(), self._extractor(pixels))

    @torch.no_grad()
    def alignment(self, tap: Tap, match: Match | None) -> Row:
        """Agreement of the tap with the encoder on held-out images: linear CKA of image means, and the projector's cosine.

        Args:
            tap: set on the denoiser, which runs on the held-out images at the measuring time, told nothing of them.
            match: projects the tap for this very encoder and matches the two token by token; None measures no cosine.
        """
        if self._targets is None:
            return {}
        pairs = list(self._held_out_pairs(tap, self._targets))
        ours, theirs = (np.concatenate([_image_means(one) for one in side]) for side in zip(*pairs, strict=True))
        row: Row = {"heldout/cka": cka(ours, theirs)}
        if match is not None:
            row |= self._agreement(pairs, match)
        return row

    def _agreement(self, pairs: list[tuple[Tokens, Tokens]], match: Match) -> Row:
        """The mean cosine over images, and how far it lies above that of mismatched images of the same grids."""
        alike: dict[tuple[Grid, Grid], list[Pair]] = {}
        for student, teacher in pairs:
            sides = (Tokens(one.values.to(self._device), one.grid) for one in (student, teacher))
            alike.setdefault((student.grid, teacher.grid), []).append(match(*sides))
        counts, cosines, gaps = [], [], []
        for matched in alike.values():
            ours, theirs = (torch.cat([one.float().cpu() for one in side]).numpy() for side in zip(*matched, strict=True))
            counts.append(len(ours))
            cosines.append(cosine(ours, theirs))
            gaps.append(cosine_gap(ours, theirs)[1] if len(ours) > 1 else None)
        row: Row = {"heldout/cosine": float(np.average(cosines, weights=counts))}
        several = [(gap, count) for gap, count in zip(gaps, counts, strict=True) if gap is not None]
        if several:  # a lone image of its grid has none to be mismatched with
            row["heldout/gap"] = float(np.average([gap for gap, _ in several], weights=[count for _, count in several]))
        return row

    def _held_out_pairs(self, tap: Tap, targets: Targets) -> Iterator[tuple[Tokens, Tokens]]:
        """Tap and encoder tokens of the held-out images at the measuring time, on the CPU."""
        model, space, held_out = self._model, self._images.space, self._images.split.held_out
        members = [held_out[group] for group in groups(self._images.source.sizes[held_out])]
        for index in (part for group in members for part in group.split(model.at_once)):
            draw = generator(_MEASURING_SEED, "held-out", int(index[0]))
            x = space.encode(index, space.draw(index, draw))
            noise = torch.randn(x.shape, generator=draw)
            t = torch.full((len(x),), self._config.timestep)
            x_t, _ = model.process.corrupt(x, noise, t)
            nothing = model.conditioning(index, torch.ones(len(index), dtype=torch.bool))
            condition = {name: value.to(self._device) for name, value in nothing.items()}
            model.denoiser(x_t.to(self._device), t.to(self._device), **condition)
            yield _on_cpu(tap.take()), _on_cpu(targets(index, self._device))


def reference_statistics(config: ExtractorConfig, extractor: Extractor, images: Images, cache: Path) -> Statistics:
    """Mean and covariance of the training images' features, computed once for all runs that share them."""
    source, train = images.source, images.split.train
    weights = file_digest(Path(config.weights)) if config.weights else None
    identity = {"data": source.fingerprint, "extractor": config.name, "weights": weights, "images": train.tolist()}
    path = cache / "reference" / f"{digest(identity)[:16]}.npz"
    if path.exists():
        stored = np.load(path)
        return Statistics(stored["mu"], stored["sigma"], int(stored["count"]))
    members = [train[group] for group in groups(source.sizes[train])]
    parts = [extractor(source.read(index.tolist())) for group in members for index in group.split(_REFERENCE_BATCH)]
    found = statistics(np.concatenate(parts))
    files.replace_atomically(path, lambda temporary: _save(temporary, found))
    return found


def write_grid(pixels: torch.Tensor, path: Path) -> None:
    """Samples ``(n, C, H, W)`` uint8 as one PNG, ten to a row at most; tiny images are enlarged without smoothing, and large
    ones shrunk until a row is as wide as a screen."""
    from PIL import Image

    columns, side = min(len(pixels), _GRID_COLUMNS), pixels.shape[-1]
    scale = max(1, _GRID_MIN_PIXELS // side)
    sized = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    if columns * side > _GRID_MAX_WIDTH:
        sized = resize(pixels, [_GRID_MAX_WIDTH // columns], antialias=True)
    grid = make_grid(sized, nrow=_GRID_COLUMNS, padding=2, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    files.replace_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def _save(path: Path, found: Statistics) -> None:
    with path.open("wb") as file:
        np.savez(file, mu=found.mu, sigma=found.sigma, count=found.count)


def _image_means(tokens: Tokens) -> NDArray[np.float32]:
    means: NDArray[np.float32] = tokens.values.mean(dim=1).numpy()
    return means


def _on_cpu(tokens: Tokens) -> Tokens:
    return Tokens(tokens.values.float().cpu(), tokens.grid)
