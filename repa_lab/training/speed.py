"""How fast training steps are: images per second, waiting for data, FLOPs against the device's ceiling, peak memory."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from repa_lab.runs.files import Row
from repa_lab.spec import ResolvedOptions, RunConfig
from repa_lab.training.checkpoint import Progress
from repa_lab.training.costs import active_steps, cost_of
from repa_lab.training.device import PRECISION

T = TypeVar("T")
GIB = 1 << 30
_SIDE = {"cuda": 8192, "cpu": 1024}  # of square matrices that are large enough for the device to be at its fastest
_REPEATS = 5


@functools.lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on a device: the fastest of a few, measured once in a process."""
    side = _SIDE.get(device.type, _SIDE["cpu"])
    factor = torch.rand(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(_REPEATS):
        began = _now(device)
        factor @ factor
        seconds.append(_now(device) - began)
    return 2 * side**3 / min(seconds)


def peak_memory(device: torch.device) -> float:
    """Return the most memory, in bytes, that tensors had on a GPU, or that this process had on a CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SpeedMeter:
    """Measures the training steps of a run between one metric row and the next; never waits for the device.

    Args:
        progress: is told the seconds of training and of waiting for data.
        processes: number of processes that share the run.
    """

    def __init__(
        self, config: RunConfig, options: ResolvedOptions, progress: Progress, device: torch.device, processes: int
    ) -> None:
        self._config, self._progress, self._device = config, progress, device
        # Activations that are computed again are not the model's FLOPs.
        self._cost = cost_of(config, options.model_copy(update={"gradient_checkpointing": False}))
        self._ceiling = processes * matmul_ceiling(device, PRECISION[options.precision])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # forget the matrices
        self.start()

    def start(self) -> None:
        """Begin to measure, at the first step or after a measurement or a checkpoint."""
        self._began, self._first_step, self._waited = time.perf_counter(), self._progress.step, 0.0

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, and measure how long each is waited for."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def row(self) -> Row:
        """Return the entries of a metric row and add the seconds to the progress; call once the steps have finished.

        Seconds are totals of the run; images per second and the share of the ceiling are those since the last row.
        """
        seconds, first, progress = time.perf_counter() - self._began, self._first_step, self._progress
        progress.seconds += seconds
        progress.data_seconds += self._waited
        steps, batch = progress.step - first, self._config.train.batch_size
        flops = batch * steps * self._cost.denoiser_flops
        for settings, added in zip(self._config.regularizers, self._cost.regularizers, strict=True):
            active = active_steps(settings, progress.step) - active_steps(settings, first)
            flops += batch * active * (added.projector_flops + added.teacher_flops)
        self.start()
        return {
            "cost/images_per_second": _rounded(steps * batch / seconds),
            "cost/data_seconds": round(progress.data_seconds, 3),
            "cost/encoder_seconds": round(progress.encoder_seconds, 3),
            "cost/flops_utilisation": _rounded(flops / seconds / self._ceiling),
            "cost/peak_memory_gib": _rounded(peak_memory(self._device) / GIB),
        }


def _now(device: torch.device) -> float:
    """Return the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rounded(value: float) -> float:
    """Return a number with four significant digits; a run may have 100,000 rows."""
    return float(f"{value:.4g}")
