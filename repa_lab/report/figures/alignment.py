"""Alignment on held-out images over training, and beside the quality of samples."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repa_lab.report.figures.convergence import with_caption
from repa_lab.report.figures.curves import Look, draw_curves, legend, looks, title
from repa_lab.report.figures.frames import ALIGNMENT, unique
from repa_lab.report.figures.style import canvas, styled
from repa_lab.report.protocols import bare

_COLUMNS = 3


@styled
def draw_alignment(frame: pd.DataFrame, captioned: bool = True) -> Figure:
    """Held-out alignment over steps: rows for each group of arms, a panel per measure.

    Args:
        frame: from :func:`alignment_frame`.
        captioned: whether to say below what lines and bands are.
    """
    shown = {group: unique(frame[frame["group"] == group], "metric") for group in unique(frame, "group")}
    columns = min(max(map(len, shown.values())), _COLUMNS)
    # Every group begins a row of its own.
    padded = {group: [*names, *[""] * (-len(names) % columns)] for group, names in shown.items()}
    places = [(group, metric) for group, names in padded.items() for metric in names]
    figure, panels = canvas(len(places) // columns, columns, size=(4.4, 3.4) if columns > 1 else (5.4, 3.9))
    for axes, (group, metric) in zip(panels, places, strict=True):
        rows = frame[(frame["group"] == group) & (frame["metric"] == metric)]
        if rows.empty:
            axes.remove()
            continue
        draw_curves(axes, rows, looks(frame, group))
        axes.set_ylabel(_label(metric))
        legend(axes, "best")
    return with_caption(figure, frame) if captioned else figure


@styled
def draw_quality(frame: pd.DataFrame) -> Figure:
    """Quality against alignment: a point per run and evaluation, joined in training order, the last one larger.

    Args:
        frame: from :func:`quality_frame`.
    """
    # A panel has one protocol along either axis.
    places = frame.groupby(["group", "metric", "alignment_metric"], sort=False)
    figure, panels = canvas(1, len(places), size=(5.1, 4.3))
    for axes, ((group, metric, _), rows) in zip(panels, places, strict=True):
        for look in looks(frame, group):
            _trails(axes, rows[rows["arm"] == look.arm], look)
        axes.set(title=title(rows), xlabel=_label(rows["alignment_metric"].iloc[0]), ylabel=metric)
        legend(axes, "best")
    return figure


def _label(metric: str) -> str:
    return f"{ALIGNMENT[bare(metric)]}\n{metric}" if bare(metric) in ALIGNMENT else metric


def _trails(axes: Axes, rows: pd.DataFrame, look: Look) -> None:
    for index, (_, run) in enumerate(rows.sort_values("step").groupby("seed")):
        label = look.name if index == 0 and not look.is_faint else None
        axes.plot(run["alignment"], run["quality"], color=look.color, lw=1, alpha=0.7, marker="o", ms=3.5, label=label)
        axes.plot(run["alignment"].iloc[-1:], run["quality"].iloc[-1:], color=look.color, marker="o", ms=8, mec="white")
