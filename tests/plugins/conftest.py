from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.mine import forget


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Where runs are trained, so that one cache serves them all."""
    return tmp_path_factory.mktemp("home")
