"""Arrays of images that are not all of one size: a store for each size, read as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repa_lab.data.sources import ImageSource, groups
from repa_lab.data.store import ArrayStore, Compute, Progress, open_or_build


class SizedStores:
    """One tensor per image of a source; those of images of one size have one shape.

    Args:
        sizes: every image's height and width ``(n, 2)``.
        stores: of each size, in the order of :func:`groups`.
    """

    def __init__(self, sizes: torch.Tensor, stores: list[ArrayStore]) -> None:
        self.stores = stores
        self._store, self._row = torch.empty(len(sizes), dtype=torch.long), torch.empty(len(sizes), dtype=torch.long)
        for number, members in enumerate(groups(sizes)):
            self._store[members], self._row[members] = number, torch.arange(len(members))

    @property
    def shapes(self) -> list[torch.Size]:
        """One tensor's shape, of each size."""
        return [store.shape for store in self.stores]

    def shape(self, index: torch.Tensor) -> torch.Size:
        """The shape of one tensor of the images ``index``, which are of one size."""
        return self._of(index).shape

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The tensors ``(n, *shape)`` of images ``index`` ``(n,)`` of one size, as they are stored.

        Raises:
            DataError: a shard is damaged.
        """
        return self._of(index)[self._row[index]]

    def _of(self, index: torch.Tensor) -> ArrayStore:
        return self.stores[int(self._store[index[0]])]


def open_sized(
    root: Path,
    identity: Mapping[str, Any],
    source: ImageSource,
    compute: Compute,
    batch_size: int = 128,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> SizedStores:
    """The stores of a source; see :func:`repa_lab.data.store.open_or_build`. ``compute`` is asked for images of one size."""
    members, stores, done = groups(source.sizes), list[ArrayStore](), 0
    for group in members:
        named = identity if len(members) == 1 else {**identity, "size": source.sizes[group[0]].tolist()}
        of_group = _compute_of(group, compute)
        heard = _heard(progress, done, len(source))
        stores.append(open_or_build(root, named, len(group), of_group, batch_size, heard, dtype, about))
        done += len(group)
    return SizedStores(source.sizes, stores)


def _compute_of(group: torch.Tensor, compute: Compute) -> Compute:
    return lambda rows: compute(group[rows])


def _heard(progress: Progress | None, before: int, total: int) -> Progress | None:
    return progress and (lambda done, count: progress(before + done, total))
