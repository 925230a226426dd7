"""Randomness by name: every draw comes from (seed, stream, images seen).

Nothing has to be saved to resume, and neither world size nor micro-batch changes a draw. Arms with one seed are paired:
they see the same images in the same order with the same noise, times and dropped labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed for a named stream at given counters."""
    text = f"{seed}/{stream}/" + "/".join(map(str, counters))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """A CPU generator for a named stream at given counters; draws are made on the CPU so that devices agree."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, *counters))


@contextmanager
def seeded(seed: int, stream: str) -> Iterator[None]:
    """Torch's global generator seeded for a stream, and put back after; for initialisation, which draws from it."""
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, stream))
        yield


class Order:
    """The order in which images are seen: a new permutation of all of them every epoch, without end.

    Args:
        index: the images to train on, ``(n,)``.
        seed: the run's seed.
    """

    def __init__(self, index: torch.Tensor, seed: int) -> None:
        self._index, self._seed = index, seed
        self._latest = (-1, index)

    def take(self, start: int, count: int) -> torch.Tensor:
        """The images seen ``start``-th to ``start + count - 1``-th since the run began, ``(count,)``."""
        size = len(self._index)
        parts = []
        while count:
            epoch, offset = divmod(start, size)
            part = self._permuted(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _permuted(self, epoch: int) -> torch.Tensor:
        if self._latest[0] != epoch:
            order = torch.randperm(len(self._index), generator=generator(self._seed, "data", epoch))
            self._latest = (epoch, self._index[order])
        return self._latest[1]
