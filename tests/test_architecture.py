"""The house as DESIGN draws it: imports run from a floor to the floors below, never sideways and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "repa_lab"
FLOORS = {
    "settings": 0, "registry": 0, "files": 0,
    "align": 1, "metrics": 1, "data": 1, "runs": 1,
    "encoders": 2, "models": 2, "spec": 2, "tracking": 2,
    "training": 3, "report": 3, "bridge": 3,
    "orchestration": 4,
    "cli": 5,
    "plugins": 6, "__main__": 6,
}  # fmt: skip
TORCH_FREE = (
    "repa_lab", "repa_lab.runs", "repa_lab.spec", "repa_lab.models.families", "repa_lab.report", "repa_lab.bridge.importing",
    "repa_lab.settings", "repa_lab.registry", "repa_lab.files", "repa_lab.plugins", "repa_lab.align.settings", "repa_lab.training.needs",
)  # fmt: skip
MAX_LINES = 500


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of a module; None for what lies outside the rooms: other packages, and the package's own front door."""
    parts = module.split(".")
    return parts[1] if parts[0] == "repa_lab" and len(parts) > 1 else None


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = pytest.mark.parametrize("module", FILES)


def imports(module: str, for_types: bool = True) -> Iterator[str]:
    """The modules that a module imports, those inside functions included; ``TYPE_CHECKING`` blocks on demand."""
    file = FILES[module]
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not for_types:
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else source for name in names)


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    code = (
        "import torch.nn as nn, os\nfrom repa_lab.runs import files\nfrom repa_lab.spec import load_spec\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\n"
        "def f():\n    from .root import RunsRoot\n    class C:\n        import json\n"
    )
    (tmp_path / "x.py").write_text(code)
    monkeypatch.setitem(FILES, "repa_lab.runs.x", tmp_path / "x.py")
    found = {"torch.nn", "os", "repa_lab.runs.files", "repa_lab.spec", "typing", "json", "repa_lab.runs.root"}
    assert set(imports("repa_lab.runs.x", for_types=False)) == found
    assert set(imports("repa_lab.runs.x")) == found | {"pandas"}


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in FILES} - {None}
    assert rooms <= set(FLOORS), f"give {sorted(rooms - set(FLOORS))} a floor here and in DESIGN"


@MODULES
def test_imports_run_downwards(module):
    room = room_of(module)
    if room is None:
        return  # the front door hands names of all floors on, each on first use
    for imported in imports(module):
        other = room_of(imported)
        if other not in (None, room):
            assert FLOORS[other] < FLOORS[room], f"{module} ({FLOORS[room]}) imports {imported} ({FLOORS[other]})"


@MODULES
def test_no_room_imports_the_front_door(module):
    if room_of(module) is not None:
        assert "repa_lab" not in set(imports(module))


def test_there_are_no_circles():
    graph = {module: sorted({m for m in imports(module, for_types=False) if m in FILES} - {module}) for module in FILES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_regularizer_core_is_pure_torch_with_its_settings():
    found = {imported.split(".")[0] for module in FILES if room_of(module) == "align" for imported in imports(module)}
    assert found - set(sys.stdlib_module_names) == {"torch", "pydantic", "repa_lab"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_is_not_needed(module):
    if module not in FILES:
        pytest.skip(f"{module} is not there yet")
    code = f"import sys, {module}; print(*sorted({{'torch', 'diffusers', 'timm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("folder", ["repa_lab", "tests"])
def test_no_file_is_long(folder):
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_every_folder_of_code_is_a_package():
    bare = [
        folder for folder in {file.parent for file in PACKAGE.rglob("*.py")} if not (folder / "__init__.py").is_file()
    ]
    assert bare == []
