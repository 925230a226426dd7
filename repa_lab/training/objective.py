"""The linear path with velocity target of SiT and REPA: t = 0 is data, t = 1 is noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from repa_lab.data.space import Space
from repa_lab.spec import RunConfig
from repa_lab.training.streams import Order, generator


class Batch(NamedTuple):
    """All that one step is computed from, drawn on the CPU: images ``ids`` and labels ``y`` ``(B,)``, clean ``x``, ``noise``
    ``(B, C, H, W)``, times ``t`` ``(B,)``; dropped labels are already the null label.
    """

    ids: torch.Tensor
    x: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor


class Steps(Dataset[Batch]):
    """The batch of every step, by its number; a function of (config, seed, step) and nothing else.

    Args:
        config: batch size, label dropout, distribution of times.
        seed: the run's seed.
        space: where diffusion takes place.
        labels: class of every image of the source, ``(n,)``.
        num_classes: the null label.
        train: the images to train on.
    """

    def __init__(
        self, config: RunConfig, seed: int, space: Space, labels: torch.Tensor, num_classes: int, train: torch.Tensor
    ) -> None:
        self._train, self._seed, self._space = config.train, seed, space
        self._labels, self._null, self._order = labels, num_classes, Order(train, seed)

    def __len__(self) -> int:
        return self._train.steps

    def __getitem__(self, step: int) -> Batch:
        size = self._train.batch_size
        ids = self._order.take(step * size, size)
        draw = generator(self._seed, "noise", step * size)
        t = sample_times(self._train.time, size, draw)
        dropped = torch.rand(size, generator=draw) < self._train.label_dropout
        x = self._space.encode(ids.tolist(), draw)
        noise = torch.randn(x.shape, generator=draw)
        return Batch(ids, x, noise, t, self._labels[ids].masked_fill(dropped, self._null))


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
