"""The results of runs: tables, uncertainty, figures and the report. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa_lab.lazy import on_first_use

if TYPE_CHECKING:
    from repa_lab.report.figure_data import load_profile
    from repa_lab.report.figures import profile_figure
    from repa_lab.report.leaderboard import leaderboards
    from repa_lab.report.page import write_report
    from repa_lab.report.results import load_results
    from repa_lab.report.text import answer

__all__ = ["answer", "leaderboards", "load_profile", "load_results", "profile_figure", "write_report"]

__getattr__ = on_first_use(
    __name__,  # the tables do not wait for the drawing library
    {
        "report.figure_data": ("load_profile",),
        "report.figures": ("profile_figure",),
        "report.leaderboard": ("leaderboards",),
        "report.page": ("write_report",),
        "report.results": ("load_results",),
        "report.text": ("answer",),
    },
)
