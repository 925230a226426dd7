"""Figures, data first: for each a function that returns the frame it shows, and one that draws that frame.

Figures are plain :class:`matplotlib.figure.Figure` objects: no window, no global state, safe without a display.
"""

from repa_lab.report.figures.alignment import draw_alignment, draw_quality
from repa_lab.report.figures.convergence import draw_convergence
from repa_lab.report.figures.curves import caption
from repa_lab.report.figures.differences import differences_frame, draw_differences
from repa_lab.report.figures.frames import ALIGNMENT, COLUMNS, alignment_frame, convergence_frame, panels, quality_frame
from repa_lab.report.figures.search import draw_pareto, draw_slices
from repa_lab.report.figures.style import save, to_svg

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
    "draw_quality",
    "draw_slices",
    "panels",
    "quality_frame",
    "save",
    "to_svg",
]
