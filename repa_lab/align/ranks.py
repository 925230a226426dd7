"""What the processes of one training must agree on."""

from __future__ import annotations

import torch
from torch import distributed


def world_size() -> int:
    """The number of processes that train together; 1 where torch.distributed is not in use."""
    in_use = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if in_use else 1


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a detached scalar over all processes, the same on each of them."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


def gather(values: torch.Tensor) -> torch.Tensor:
    """The rows ``(n, ...)`` of all processes, ``(n * world size, ...)``, in the order of their ranks.

    Gradients flow to this process's own rows, times the world size: DistributedDataParallel takes the mean of what
    every process finds for its rows, where a loss over all rows asks for the sum.
    """
    world = world_size()
    if world == 1:
        return values
    kept = values.detach().contiguous()
    parts = [torch.empty_like(kept) for _ in range(world)]
    distributed.all_gather(parts, kept)
    parts[distributed.get_rank()] = kept + world * (values - kept)
    return torch.cat(parts)
