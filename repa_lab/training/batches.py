"""What a step is computed from, and the loss against noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from repa_lab.data.sources import groups
from repa_lab.encoders.targets import Reader
from repa_lab.spec import RunConfig
from repa_lab.training.conditioning import Condition, Conditioning
from repa_lab.training.diffusion import Process
from repa_lab.training.images import Images
from repa_lab.training.streams import BatchOrder, generator


class Batch(NamedTuple):
    """All that one step is computed from, drawn on the CPU: images ``ids`` ``(B,)``, clean ``x``, ``noise``
    ``(B, C, H, W)``, times ``t`` ``(B,)``, and the ``condition``, where some is already dropped. ``loaded`` holds what
    the targets of each encoder are made from, where a reader could load it ahead of time.
    """

    ids: torch.Tensor
    x: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    condition: Condition
    loaded: tuple[torch.Tensor | None, ...] = ()

    def split(self, size: int | None) -> list[Batch]:
        """Micro-batches of at most ``size`` images; None keeps it whole."""
        step = size or len(self.ids)
        return [self._part(slice(start, start + step)) for start in range(0, len(self.ids), step)]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; ids stay, and what is loaded goes where its targets want it."""
        x, noise, t = (part.to(device, non_blocking=True) for part in (self.x, self.noise, self.t))
        condition = {name: value.to(device, non_blocking=True) for name, value in self.condition.items()}
        return Batch(self.ids, x, noise, t, condition, self.loaded)

    def _part(self, rows: slice) -> Batch:
        ids, x, noise, t = (part[rows] for part in (self.ids, self.x, self.noise, self.t))
        condition = {name: value[rows] for name, value in self.condition.items()}
        return Batch(ids, x, noise, t, condition, tuple(None if one is None else one[rows] for one in self.loaded))


class Steps(Dataset[Batch]):
    """The batch of every step, by its number; a function of (config, seed, step) and nothing else.

    Args:
        config: batch size, label dropout, distribution of times.
        seed: the run's seed.
        images: what is trained on.
        process: how times are drawn.
        conditioning: what the denoiser is told of the images.
        part: which of how many equal parts of a batch is this process's.
        readers: load what targets are made from; see :class:`repa_lab.encoders.targets.Targets`.
        weight: the regularizer's by step, as far as it is known ahead: where it is 0 nothing is loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        images: Images,
        process: Process,
        conditioning: Conditioning,
        part: tuple[int, int] = (0, 1),
        readers: Sequence[Reader | None] = (),
        weight: Callable[[int], float] | None = None,
    ) -> None:
        self._train, self._seed, self._images = config.train, seed, images
        self._process, self._conditioning = process, conditioning
        self._readers, self._weight = tuple(readers), weight
        train = images.split.train
        self._order = BatchOrder([train[group] for group in groups(images.source.sizes[train])], seed)
        number, parts = part
        size = config.train.batch_size // parts
        self._mine = slice(number * size, (number + 1) * size)

    def __len__(self) -> int:
        return self._train.steps

    def __getitem__(self, step: int) -> Batch:
        size, space, mine = self._train.batch_size, self._images.space, self._mine
        ids = self._seen(step)
        draw = generator(self._seed, "noise", step * size)
        t = self._process.times(self._train.time, size, draw)
        dropped = torch.rand(size, generator=draw) < self._train.label_dropout
        # All of a batch's randomness is drawn by every process, so that how many there are does not change it.
        encoding = space.draw(ids, draw)
        noise = torch.randn((size, *space.shape(ids)), generator=draw)
        x = space.encode(ids[mine], None if encoding is None else encoding[mine])
        condition = self._conditioning(ids[mine], dropped[mine])
        return Batch(ids[mine], x, noise[mine], t[mine], condition, self._loaded(step, ids[mine]))

    def _loaded(self, step: int, ids: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if self._weight is None or self._weight(step) == 0:
            return ()
        return tuple(None if read is None else read(ids) for read in self._readers)

    def _seen(self, step: int) -> torch.Tensor:
        """The images of a step, mirrored ones by the number of their mirror image."""
        size = self._train.batch_size
        ids = self._order.take(step, size)
        if not self._images.flips:
            return ids
        mirrored = torch.rand(size, generator=generator(self._seed, "flips", step * size)) < 0.5
        return ids + self._images.base_count * mirrored


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared error of two ``(B, C, H, W)`` over everything, a float32 scalar.

    Args:
        prediction: the denoiser's output.
        target: what it should be.
        weight: of each sample, ``(B, 1, 1, 1)``; None weights all alike.
    """
    error = (prediction.float() - target).square()
    return error.mean() if weight is None else (weight * error).mean()
