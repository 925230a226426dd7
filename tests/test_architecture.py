"""The layers of DESIGN: a package imports from lower layers only, never sideways and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from repa_lab.runs import RunsRoot
from tests.benchmarks.many_runs import write_sweep

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "repa_lab"
# From the bottom to the top.
LAYERS = (
    ("errors", "files", "kernels", "lazy"),
    ("registry", "timm_models"),
    ("settings",),
    ("align", "metrics", "data", "runs"),
    ("encoders", "models", "spec", "tracking"),
    ("training", "report", "bridge"),
    ("orchestration",),
    ("cli",),
    ("plugins", "__main__"),
)
LAYER_OF = {package: number for number, layer in enumerate(LAYERS) for package in layer}
TORCH_FREE = (
    "repa_lab", "repa_lab.errors", "repa_lab.files", "repa_lab.registry", "repa_lab.timm_models", "repa_lab.settings", "repa_lab.plugins", "repa_lab.runs",
    "repa_lab.align.settings", "repa_lab.metrics", "repa_lab.metrics.protocol", "repa_lab.encoders.registry",
    "repa_lab.models.families", "repa_lab.spec", "repa_lab.bridge.importing", "repa_lab.training.resolve",
    "repa_lab.report",  # the last, for only it may import pandas
)  # fmt: skip
MAX_LINES = 500


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str | None:
    """Return the package, or the top-level module, of a module; None for other distributions and for ``repa_lab`` itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "repa_lab" and len(parts) > 1 else None


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, with_types: bool = True) -> Iterator[str]:
    """Yield the modules that a module imports, also inside functions.

    Args:
        module: the importing module.
        with_types: whether to include ``TYPE_CHECKING`` blocks.
    """
    file = FILES[module]
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not with_types:
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
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
        "import torch.nn as nn, os\nfrom repa_lab.runs import directory\nfrom repa_lab.spec import load_spec\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\n"
        "def f():\n    from .root import RunsRoot\n    class C:\n        import json\n"
    )
    (tmp_path / "x.py").write_text(code)
    for module in ("repa_lab.runs.x", "repa_lab.runs.directory"):
        monkeypatch.setitem(FILES, module, tmp_path / "x.py")
    found = {"torch.nn", "os", "repa_lab.runs.directory", "repa_lab.spec", "typing", "json", "repa_lab.runs.root"}
    assert set(imports("repa_lab.runs.x", with_types=False)) == found
    assert set(imports("repa_lab.runs.x")) == found | {"pandas"}


def test_every_package_has_a_layer():
    packages = {package_of(module) for module in FILES} - {None}
    assert packages <= set(LAYER_OF), f"give {sorted(packages - set(LAYER_OF))} a layer here and in DESIGN"


def test_imports_go_down():
    """`repa_lab/__init__.py` may import from every layer: it hands names on, each on first use. Nothing imports it."""
    wrong = []
    for module in FILES:
        package = package_of(module)
        for imported in imports(module) if package else ():
            other = package_of(imported)
            if imported == "repa_lab" or (other not in (None, package) and LAYER_OF[other] >= LAYER_OF[package]):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_there_are_no_circles():
    graph = {
        module: sorted({name for name in imports(module, with_types=False) if name in FILES} - {module})
        for module in FILES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_regularizers_need_torch_and_pydantic_alone():
    found = {name.split(".")[0] for module in FILES if package_of(module) == "align" for name in imports(module)}
    assert found - set(sys.stdlib_module_names) == {"torch", "pydantic", "repa_lab"}


def test_planning_and_reading_need_no_torch():
    """Each module is imported after the others in one process; the first that loads torch is named."""
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE}:\n"
        "    importlib.import_module(name)\n"
        "    slow = {'torch', 'diffusers', 'timm', 'transformers'} | ({'pandas'} if name != 'repa_lab.report' else set())\n"
        "    loaded = slow & set(sys.modules)\n"
        "    assert not loaded, f'{name} imports {sorted(loaded)}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_commands_that_only_read_load_no_torch(tmp_path):
    """Over a finished sweep; the first command that loads torch is named."""
    root, spec = ["--root", str(tmp_path)], "experiments/quickstart.yaml"
    runs = write_sweep(RunsRoot(tmp_path), 2, 1).manifest.run_ids
    commands = [
        ["--version"], ["--help"], ["families"], ["schema"], ["explain", spec], ["diff", spec, spec], ["diff", *runs, *root],
        ["new", str(tmp_path / "new.yaml")], ["import", "--model_type=lora", "--model_family=flux"], ["reproduce"], ["doctor", *root],
        ["plan", spec, *root], ["plan", "--json", spec, *root], ["plan", "experiments/quickstart_search.yaml", *root],
        ["status", *root], ["status", "many", *root], ["why", runs[0], *root], ["gc", *root], ["pin", runs[0], *root],
        ["retry", runs[0], "--from-scratch", *root], ["leaderboard", *root], ["report", "many", *root],
        ["export", runs[1], "--format", "simpletuner", *root],
    ]  # fmt: skip
    code = (
        "import sys, repa_lab\nfrom pathlib import Path\nfrom repa_lab.cli import app\n"
        "def require_nothing_slow(what):\n"
        "    loaded = {'torch', 'diffusers', 'timm', 'transformers'} & set(sys.modules)\n"
        "    assert not loaded, f'{what} imports {sorted(loaded)}'\n"
        f"results = repa_lab.load_results({str(tmp_path)!r})\n"
        "results.runs, results.curves, results.summary, results.samples, results.troubles\n"
        "require_nothing_slow('load_results')\n"
        f"repa_lab.plan({spec!r}, {str(tmp_path)!r}), repa_lab.load_spec({spec!r})\n"
        "require_nothing_slow('plan and load_spec')\n"
        f"for command in {commands}:\n"
        "    try:\n        app(command)\n    except SystemExit as ended:\n"
        "        assert not ended.code or command[:1] == ['diff'], command\n"
        "    require_nothing_slow(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["repa_lab", "tests"])
def test_no_file_is_long(folder):
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_every_folder_of_code_is_a_package():
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
