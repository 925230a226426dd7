"""Where the training loop puts what it finds: into the run directory, or, in all processes but the first, nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from repa_lab.runs import RunDirectory, checkpoints
from repa_lab.runs.files import Row
from repa_lab.tracking import Journal
from repa_lab.training.evaluate import write_grid

_ALL = 1 << 30


class Record(Protocol):
    """Takes rows, samples and checkpoints."""

    def row(self, row: Row) -> None:
        """Take a metric row."""
        ...

    def samples(self, step: int, pixels: torch.Tensor) -> None:
        """Take samples ``(n, C, H, W)``, uint8."""
        ...

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Take a checkpoint; ``save`` fills an empty folder."""
        ...

    def fork(self, step: int, save: Callable[[Path], None]) -> None:
        """Take a checkpoint that other runs begin from."""
        ...


class Kept:
    """Keeps everything in the run directory."""

    def __init__(self, directory: RunDirectory, journal: Journal) -> None:
        self._directory, self._journal = directory, journal

    def row(self, row: Row) -> None:
        """See :class:`Record`."""
        self._journal.row(row)

    def samples(self, step: int, pixels: torch.Tensor) -> None:
        """See :class:`Record`."""
        path = self._directory.samples / f"step-{step:08d}.png"
        write_grid(pixels, path)
        self._journal.image(step, path)

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """See :class:`Record`."""
        checkpoints.commit(self._directory.checkpoints, step, save)

    def fork(self, step: int, save: Callable[[Path], None]) -> None:
        """See :class:`Record`."""
        checkpoints.commit(self._directory.forks, step, save, keep=_ALL)


class Dropped:
    """Keeps nothing: a run has one writer, its first process."""

    def row(self, row: Row) -> None:
        """See :class:`Record`."""

    def samples(self, step: int, pixels: torch.Tensor) -> None:
        """See :class:`Record`."""

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """See :class:`Record`."""

    def fork(self, step: int, save: Callable[[Path], None]) -> None:
        """See :class:`Record`."""
