"""The results of runs: tables, uncertainty, figures and the report. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repa_lab.report.figures import profile_figure
    from repa_lab.report.leaderboard import leaderboards
    from repa_lab.report.page import ReportPaths, write_report
    from repa_lab.report.profile import load_profile
    from repa_lab.report.results import Results, ResultsError, load_results
    from repa_lab.report.text import answer

__all__ = [
    "ReportPaths",
    "Results",
    "ResultsError",
    "answer",
    "leaderboards",
    "load_profile",
    "load_results",
    "profile_figure",
    "write_report",
]

_MODULES = {
    "ReportPaths": "page",
    "write_report": "page",
    "leaderboards": "leaderboard",
    "load_profile": "profile",
    "profile_figure": "figures",
    "Results": "results",
    "ResultsError": "results",
    "load_results": "results",
    "answer": "text",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: the tables do not wait for the drawing library."""
    if name not in _MODULES:
        raise AttributeError(f"module 'repa_lab.report' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"repa_lab.report.{_MODULES[name]}"), name)
