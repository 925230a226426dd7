"""What every test starts from: one core, so that tests may share a machine, and a known state of torch's randomness."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_randomness() -> Iterator[None]:
    """Seed torch's default generator and give back its state, so that no test depends on the one before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
