"""repa-lab: does representation alignment help diffusion training? Matched arms, with error bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa_lab.files import open_standard_streams
from repa_lab.lazy import on_first_use

if TYPE_CHECKING:
    from repa_lab.orchestration.api import plan, sweep
    from repa_lab.report.results import load_results
    from repa_lab.spec import load_spec

__version__ = "0.1.0"
__all__ = ["__version__", "load_results", "load_spec", "plan", "sweep"]

__getattr__ = on_first_use(
    __name__,  # so that `import repa_lab.align` costs torch and nothing else
    {"orchestration.api": ("plan", "sweep"), "report.results": ("load_results",), "spec": ("load_spec",)},
)

open_standard_streams()
