"""Figures, data first: for each a function that returns its frame, and one that draws the frame.

Figures are plain :class:`matplotlib.figure.Figure` objects: no window, no global state, safe without a display.
"""

from repa_lab.report.figure_data import (
    ALIGNMENT,
    COLUMNS,
    alignment_frame,
    caption,
    convergence_frame,
    differences_frame,
    panels,
    quality_frame,
)
from repa_lab.report.figures.curves import draw_alignment, draw_convergence, draw_quality
from repa_lab.report.figures.heatmaps import draw_profiles, profile_figure
from repa_lab.report.figures.points import draw_differences, draw_pareto, draw_slices
from repa_lab.report.figures.style import save, svg

__all__ = [
    "ALIGNMENT",
    "COLUMNS",
    "alignment_frame",
    "caption",
    "convergence_frame",
    "differences_frame",
    "draw_alignment",
    "draw_convergence",
    "draw_differences",
    "draw_pareto",
    "draw_profiles",
    "draw_quality",
    "draw_slices",
    "panels",
    "profile_figure",
    "quality_frame",
    "save",
    "svg",
]
