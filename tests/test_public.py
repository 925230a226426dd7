"""The public API: the names that `repa_lab` and its `align`, `metrics` and `plugins` export, and how each is called.

After an intended change write the list anew: `python -m tests.test_public`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

MODULES = ("repa_lab", "repa_lab.align", "repa_lab.metrics", "repa_lab.plugins")
FILE = Path(__file__).with_name("public_api.txt")


def call(value: Any) -> str:
    """Return the signature of a function, method or class."""
    return re.sub(r" at 0x[0-9a-f]+|'|ForwardRef\((.*?)\)", r"\1", str(inspect.signature(value)))


def describe(path: str, value: Any) -> Iterator[str]:
    """Yield a line for a function, or for a class and each of its public members."""
    if isinstance(value, str):
        yield path
    elif not isinstance(value, type):
        yield f"{path}{call(value)}"
    elif issubclass(value, BaseModel):
        fields = ", ".join(
            f"{name}={info.get_default(call_default_factory=True)!r}" for name, info in value.model_fields.items()
        )
        yield f"{path}({fields})"
        yield from members(path, value)
    else:
        yield f"{path}{call(value)}"
        yield from members(path, value)


def members(path: str, value: type) -> Iterator[str]:
    """Yield a line for every public method and property that this package defines on a class."""
    classes = [base for base in reversed(value.__mro__) if base.__module__.startswith("repa_lab")]
    names = dict.fromkeys(name for base in classes for name in vars(base) if not name.startswith("_"))
    for name in names:
        member = inspect.getattr_static(value, name)
        if isinstance(member, property):
            yield f"{path}.{name}"
        elif isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member):
            yield f"{path}.{name}{call(getattr(value, name))}"


def api() -> str:
    """Return the public API, a line for each name; a name that two modules export is described once."""
    lines: list[str] = []
    known: dict[int, str] = {}
    for module in map(importlib.import_module, MODULES):
        for name in sorted(module.__all__):
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            if id(value) in known:
                lines.append(f"{path} is {known[id(value)]}")
            else:
                lines += describe(path, value)
                known[id(value)] = path
    return "\n".join(lines) + "\n"


def test_the_public_api_is_the_recorded_one():
    """If the change is meant: `python -m tests.test_public`."""
    assert api().splitlines() == FILE.read_text(encoding="utf-8").splitlines()


def test_a_name_that_is_not_exported_is_no_attribute():
    for module in map(importlib.import_module, MODULES):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nonsense'"):
            module.nonsense  # noqa: B018


def test_names_of_submodules_that_users_import():
    from repa_lab.metrics import cka, frechet_distance
    from repa_lab.models.sit import SiT

    assert all(map(callable, (cka, frechet_distance, SiT)))


if __name__ == "__main__":
    FILE.write_text(api(), encoding="utf-8")
