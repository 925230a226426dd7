"""Randomness by name: every draw comes from (seed, stream, images seen).

Nothing has to be saved to resume, and neither world size nor micro-batch changes a draw. Arms with one seed are paired:
they see the same images in the same order with the same noise, times and dropped labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_BLOCK = 1024  # steps whose sizes are drawn together


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
        stream: the stream that the permutations are drawn from.
    """

    def __init__(self, index: torch.Tensor, seed: int, stream: str = "data") -> None:
        self._index, self._seed, self._stream = index, seed, stream
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
            order = torch.randperm(len(self._index), generator=generator(self._seed, self._stream, epoch))
            self._latest = (epoch, self._index[order])
        return self._latest[1]


class BatchOrder:
    """The images of every step, all of one size.

    Where there are several sizes, a step's is drawn with the odds of its share of the images, and the images of a size
    follow an :class:`Order` of their own: whatever the sizes, every image is seen equally often in the long run.

    Args:
        members: the images of each size, ``(n,)``.
        seed: the run's seed.
    """

    def __init__(self, members: Sequence[torch.Tensor], seed: int) -> None:
        streams = ["data"] if len(members) == 1 else [f"data/{number}" for number in range(len(members))]
        self._orders = [Order(index, seed, stream) for index, stream in zip(members, streams, strict=True)]
        self._shares = torch.tensor([float(len(index)) for index in members])
        self._seed = seed
        self._drawn: list[torch.Tensor] = []  # of each block of steps, which size every step has

    def take(self, step: int, size: int) -> torch.Tensor:
        """The images of a step, ``(size,)``."""
        if len(self._orders) == 1:
            return self._orders[0].take(step * size, size)
        block, offset = divmod(step, _BLOCK)
        while len(self._drawn) <= block:
            draw = generator(self._seed, "sizes", len(self._drawn))
            self._drawn.append(torch.multinomial(self._shares, _BLOCK, replacement=True, generator=draw))
        chosen = int(self._drawn[block][offset])
        before = torch.cat([*self._drawn[:block], self._drawn[block][:offset]])
        return self._orders[chosen].take(int((before == chosen).sum()) * size, size)
