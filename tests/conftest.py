"""What every test starts from: one core, so that tests may share a machine, and a known state of torch's randomness."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: threads that wait for each other starve on busy cores


@pytest.fixture(autouse=True)
def known_randomness() -> Iterator[None]:
    """Seed torch's default generator and give back its state, so that no test depends on the one before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
