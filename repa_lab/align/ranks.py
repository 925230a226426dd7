"""What the processes of one training exchange, and how a process reads a number from its device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed


def world_size() -> int:
    """Return the number of processes that train together; 1 without torch.distributed."""
    in_use = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if in_use else 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, detached, the same in each of them."""
    if world_size() == 1:
        return values.detach()
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes, detached, the same in each of them."""
    return sum_over_ranks(values) / world_size()


def gather(values: torch.Tensor) -> torch.Tensor:
    """Return the rows ``(n, ...)`` of all processes as ``(n * world size, ...)``, in the order of their ranks.

    Gradients reach this process's own rows, multiplied by the world size: DistributedDataParallel averages the
    gradients of the processes, but a loss over all rows needs their sum.
    """
    world = world_size()
    if world == 1:
        return values
    detached = values.detach().contiguous()
    rows = [torch.empty_like(detached) for _ in range(world)]
    distributed.all_gather(rows, detached)
    rows[distributed.get_rank()] = detached + world * (values - detached)
    return torch.cat(rows)


def start_reading(value: torch.Tensor) -> Callable[[], float]:
    """Start copying a scalar from its device, and return a function that waits for this copy and returns the number.

    The function waits for nothing that the device was given after the copy, while ``item()`` would wait for all of it.
    """
    host = value.detach().to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if value.is_cuda else None
    if copied:
        copied.record()

    def read() -> float:
        if copied:
            copied.synchronize()
        return host.item()

    return read
