"""Measurements of a run at a checkpoint, on averaged weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid

from repa_lab.align import Tokens
from repa_lab.align.regularizer import Pair
from repa_lab.align.tokens import Grid
from repa_lab.data.errors import DataError
from repa_lab.encoders.targets import Targets
from repa_lab.files import digest, replace_atomically
from repa_lab.metrics import CosineSums, cka
from repa_lab.models.family import BlockIndex
from repa_lab.models.tap import Tap
from repa_lab.runs.files import Row
from repa_lab.spec import EvaluateConfig, RunConfig
from repa_lab.training.fingerprints import described
from repa_lab.training.heldout import held_out_batches, image_means, noise_protocol, show
from repa_lab.training.images import Images
from repa_lab.training.model import Model
from repa_lab.training.protocol import MIN_HELD_OUT
from repa_lab.training.quality import Quality, versions

Match = Callable[[Tokens, Tokens], Pair]

_GRID_COLUMNS = 10
_GRID_MIN_PIXELS = 32
_GRID_MAX_WIDTH = 2560
_ALIGNMENT = {
    "heldout/cka": "linear CKA, unbiased, of image means",
    "heldout/cosine": "mean cosine of projected tokens",
    "heldout/gap": "mean cosine of projected tokens, less that of other images",
}


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
        if targets is not None and len(images.split.held_out) < MIN_HELD_OUT:
            raise DataError("holdout", f"alignment is measured on held-out images: hold out {MIN_HELD_OUT} or more")
        self._config, self._model, self._images, self._targets, self._device = (
            config.evaluate,
            model,
            images,
            targets,
            device,
        )
        self._encoder = config.alignment_encoder
        self._quality = Quality(config, images, model, cache, device, part)

    def quality(self, tier: EvaluateConfig) -> tuple[Row, torch.Tensor]:
        """What a protocol measures of samples, and what is shown of them; see :class:`repa_lab.training.quality.Quality`."""
        return self._quality(tier)

    def protocols(self, seed: int, block: BlockIndex) -> dict[str, dict[str, Any]]:
        """What each number depends on, by its name.

        Args:
            seed: the run's.
            block: where alignment is measured.
        """
        found = self._quality.protocols(seed)
        if self._targets is None or self._encoder is None:
            return found
        held_out = {"data": self._images.base.fingerprint, "images": self._images.split.held_out.tolist()}
        given = {
            "encoder": described(self._encoder),
            "block": block,
            "timestep": self._config.timestep,
            "held_out": digest(held_out),
            "images": len(self._images.split.held_out),
            **noise_protocol(self._config, len(self._images.split.held_out)),
            "versions": versions(),
        }
        return found | {name: {"metric": metric, **given} for name, metric in _ALIGNMENT.items()}

    @torch.no_grad()
    def alignment(self, tap: Tap, match: Match | None) -> Row:
        """Agreement of the tap with the encoder on held-out images: linear CKA of image means, and the projector's
        cosine.

        Args:
            tap: set on the denoiser, which runs on the held-out images at the measuring time, told nothing of them.
            match: projects the tap for this very encoder and matches the two token by token; None measures no cosine.
        """
        if self._targets is None:
            return {}
        ours, theirs, sums = [], [], defaultdict[tuple[Grid, Grid], CosineSums](CosineSums)
        for student, teacher in self._held_out_pairs(tap, self._targets):
            ours.append(image_means(student.values))
            theirs.append(image_means(teacher.values))
            if match is not None:
                sums[student.grid, teacher.grid].add(*match(student, teacher))
        return {"heldout/cka": cka(torch.cat(ours), torch.cat(theirs)), **_agreement(list(sums.values()))}

    def _held_out_pairs(self, tap: Tap, targets: Targets) -> Iterator[tuple[Tokens, Tokens]]:
        """Tap and encoder tokens of the held-out images at the measuring time, batch by batch."""
        for index in held_out_batches(self._images, self._images.split.held_out, self._model.at_once):
            show(self._model, self._images, index, self._config.timestep, self._device)
            student, teacher = tap.take(), targets(index, self._device)
            yield Tokens(student.values.float(), student.grid), Tokens(teacher.values.float(), teacher.grid)


def _agreement(sums: Sequence[CosineSums]) -> Row:
    """The mean cosine over images, and how far it lies above that of mismatched images of the same grids."""
    row: Row = {}
    if sums:
        row["heldout/cosine"] = float(np.average([one.cosine for one in sums], weights=[one.images for one in sums]))
    if several := [one for one in sums if one.images > 1]:  # a lone image of its grid has none to be mismatched with
        row["heldout/gap"] = float(np.average([one.gap for one in several], weights=[one.images for one in several]))
    return row


def write_grid(pixels: torch.Tensor, path: Path) -> None:
    """Samples ``(n, C, H, W)`` uint8 as one PNG, ten to a row at most; tiny images are enlarged without smoothing, and
    large ones shrunk until a row is as wide as a screen."""
    from PIL import Image

    columns, side = min(len(pixels), _GRID_COLUMNS), pixels.shape[-1]
    scale = max(1, _GRID_MIN_PIXELS // side)
    sized = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    if columns * side > _GRID_MAX_WIDTH:
        sized = resize(pixels, [_GRID_MAX_WIDTH // columns], antialias=True)
    grid = make_grid(sized, nrow=_GRID_COLUMNS, padding=2, pad_value=255)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    replace_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
