"""How many images go through the denoiser at a time."""

from __future__ import annotations

from typing import Literal

import torch

from repa_lab.training.device import DeviceError


class MicroBatch:
    """The size of a micro-batch: a number, all of a batch, or found out.

    Args:
        setting: a size, None for all of a batch, or ``auto``: all at first, and half as many each time that memory runs
            out.
        processes: how many share a run.

    Raises:
        DeviceError: several processes would have to find the same size.
    """

    def __init__(self, setting: int | Literal["auto"] | None, processes: int) -> None:
        if setting == "auto" and processes > 1:
            raise DeviceError(
                "micro_batch", "auto is for one process, for several would not find the same; give a number"
            )
        self._is_auto = setting == "auto"
        self.size = None if setting == "auto" else setting

    def shrink(self, batch: int, error: torch.OutOfMemoryError) -> None:
        """Memory ran out with this many images in a batch: try half of what was tried.

        Raises:
            OutOfMemoryError: the size was given, or a single image is too much.
        """
        tried = min(self.size or batch, batch)
        if not self._is_auto or tried == 1:
            raise error
        self.size = tried // 2
