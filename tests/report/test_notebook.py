from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from repa_lab.runs import SweepDirectory

ANALYSIS = Path(__file__).parents[2] / "analysis"
NOTEBOOK = ANALYSIS / "compare_convergence.ipynb"


def test_it_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_it_runs_on_a_sweep(quickstart: SweepDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPA_LAB_SWEEP", str(quickstart.path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ANALYSIS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("n = 3 seeds" in output.get("text", "") for output in outputs)
