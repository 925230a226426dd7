"""The linear path with velocity target of SiT and REPA: t = 0 is data, t = 1 is noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from repa_lab.align import Schedule
from repa_lab.encoders.targets import Reader
from repa_lab.spec import RunConfig
from repa_lab.training.images import Images
from repa_lab.training.streams import Order, generator


class Batch(NamedTuple):
    """All that one step is computed from, drawn on the CPU: images ``ids`` and labels ``y`` ``(B,)``, clean ``x``, ``noise``
    ``(B, C, H, W)``, times ``t`` ``(B,)``; dropped labels are already the null label. ``loaded`` holds what the targets of each
    encoder are made from, where a reader could load it ahead of time.
    """

    ids: torch.Tensor
    x: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor
    loaded: tuple[torch.Tensor | None, ...] = ()

    def split(self, size: int | None) -> list[Batch]:
        """Micro-batches of at most ``size`` images; None keeps it whole."""
        step = size or len(self.ids)
        return [self._part(slice(start, start + step)) for start in range(0, len(self.ids), step)]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; ids stay, and what is loaded goes where its targets want it."""
        x, noise, t, y = (part.to(device, non_blocking=True) for part in self[1:5])
        return Batch(self.ids, x, noise, t, y, self.loaded)

    def _part(self, rows: slice) -> Batch:
        ids, x, noise, t, y = (part[rows] for part in self[:5])
        return Batch(ids, x, noise, t, y, tuple(None if one is None else one[rows] for one in self.loaded))


class Steps(Dataset[Batch]):
    """The batch of every step, by its number; a function of (config, seed, step) and nothing else.

    Args:
        config: batch size, label dropout, distribution of times.
        seed: the run's seed.
        images: what is trained on.
        part: which of how many equal parts of a batch is this process's.
        readers: load what targets are made from; see :class:`repa_lab.encoders.targets.Targets`.
        weight: the regularizer's schedule: on steps where it is 0 nothing is loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        images: Images,
        part: tuple[int, int] = (0, 1),
        readers: Sequence[Reader | None] = (),
        weight: Schedule | None = None,
    ) -> None:
        self._train, self._seed, self._images = config.train, seed, images
        self._readers, self._weight = tuple(readers), weight
        self._order = Order(images.split.train, seed)
        number, parts = part
        size = config.train.batch_size // parts
        self._mine = slice(number * size, (number + 1) * size)

    def __len__(self) -> int:
        return self._train.steps

    def __getitem__(self, step: int) -> Batch:
        size, space, mine = self._train.batch_size, self._images.space, self._mine
        ids = self._seen(step)
        draw = generator(self._seed, "noise", step * size)
        t = sample_times(self._train.time, size, draw)
        dropped = torch.rand(size, generator=draw) < self._train.label_dropout
        # All of a batch's randomness is drawn by every process, so that how many there are does not change it.
        encoding = space.draw(size, draw)
        noise = torch.randn((size, space.channels, *space.size), generator=draw)
        x = space.encode(ids[mine].tolist(), None if encoding is None else encoding[mine])
        labels = self._images.source.labels[ids].masked_fill(dropped, self._images.source.num_classes)
        return Batch(ids[mine], x, noise[mine], t[mine], labels[mine], self._loaded(step, ids[mine]))

    def _loaded(self, step: int, ids: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if self._weight is None or self._weight(step) == 0:
            return ()
        return tuple(None if read is None else read(ids) for read in self._readers)

    def _seen(self, step: int) -> torch.Tensor:
        """The images of a step, mirrored ones by the number of their mirror image."""
        size = self._train.batch_size
        ids = self._order.take(step * size, size)
        if not self._images.flips:
            return ids
        mirrored = torch.rand(size, generator=generator(self._seed, "flips", step * size)) < 0.5
        return ids + self._images.base_count * mirrored


def sample_times(kind: str, count: int, draw: torch.Generator) -> torch.Tensor:
    """Times ``(count,)`` in [0, 1]: ``uniform``, or ``lognormal``, which is the sigmoid of a standard normal."""
    if kind == "lognormal":
        return torch.randn(count, generator=draw).sigmoid()
    return torch.rand(count, generator=draw)


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x_t = (1 - t) x + t noise`` and its velocity ``noise - x``, both ``(B, C, H, W)``; t is ``(B,)``."""
    time = t.view(-1, 1, 1, 1)
    return (1 - time) * x + time * noise, noise - x


def denoising_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in float32 over everything."""
    return (velocity.float() - target).square().mean()
