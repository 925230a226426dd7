"""repa-lab: does representation alignment help diffusion training? Matched arms, with error bars."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_lab.orchestration.api import plan, sweep
    from repa_lab.report.results import load_results
    from repa_lab.spec import load_spec

__version__ = "0.1.0"
__all__ = ["__version__", "load_results", "load_spec", "plan", "sweep"]

_MODULE_OF = {
    "load_results": "repa_lab.report.results",
    "load_spec": "repa_lab.spec",
    "plan": "repa_lab.orchestration.api",
    "sweep": "repa_lab.orchestration.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import repa_lab.align` costs torch and nothing else."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'repa_lab' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
