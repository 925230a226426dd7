"""What every test starts from: one core, so that tests may share a machine, and a known state of torch's randomness."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# Threads that wait for each other starve on busy cores. NumPy and torch read this when they are imported, here and in
# the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("OPTUNA_STORAGE", None)  # searches would be kept in the developer's own database

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Hide pytest's note of the present test, for a fork server serves sweeps with one environment."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    """As above, for the test itself."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)


@pytest.fixture(autouse=True)
def known_randomness() -> Iterator[None]:
    """Seed torch's default generator and give back its state, so that no test depends on the one before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


_open: list[tuple[str, list[tuple[object, ...]]]] = []


def _note(event: str, arguments: tuple[object, ...]) -> None:
    for wanted, found in _open:
        if event == wanted:
            found.append(arguments)


@pytest.fixture
def audited() -> Callable[[str], AbstractContextManager[list[tuple[object, ...]]]]:
    """What this process does of one kind meanwhile, by the name that Python's audit events give it."""

    @contextmanager
    def listen(event: str) -> Iterator[list[tuple[object, ...]]]:
        found: list[tuple[object, ...]] = []
        _open.append((event, found))
        try:
            yield found
        finally:
            _open.remove((event, found))

    return listen


@pytest.fixture(autouse=True, scope="session")
def _hook() -> None:
    sys.addaudithook(_note)  # it cannot be taken out again
