"""Convergence curves of the compared metric."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repa_lab.report.figures.curves import caption, draw_curves, legend, looks
from repa_lab.report.figures.frames import cells, means, paired
from repa_lab.report.figures.style import INK, SOFT, canvas, styled
from repa_lab.report.progress import STEPS, Axis
from repa_lab.report.statistics import MIN_SEEDS, Goal, Speedup, speedup, steps_to_reach

_NAMES = {"frechet": "Fr\u00e9chet distance", "fid": "FID"}


@styled
def draw_convergence(frame: pd.DataFrame, goal: Goal = "min", axis: Axis = STEPS, captioned: bool = True) -> Figure:
    """Convergence curves, a panel per group of arms that share a baseline.

    Lines are means over seeds, bands their 95 % intervals; with fewer than three seeds, or seeds that stopped early,
    every seed has a thin line. With more than three arms, bars at the last step stand for the bands. Where one arm
    stands against one baseline and its speed-up is resolved, an arrow shows it.

    Args:
        frame: from :func:`convergence_frame`.
        goal: whether small or large values are good.
        axis: the measure of progress that the frame was made for.
        captioned: whether to say below what lines and bands are.
    """
    places = cells(frame)
    columns = min(len(places), 3)
    figure, panels = canvas(math.ceil(len(places) / columns), columns, size=(5.2 if columns > 1 else 6.2, 4.5))
    for axes, (group, metric) in zip(panels, places, strict=False):
        rows = frame[(frame["group"] == group) & (frame["metric"] == metric)]
        draw_curves(axes, rows, looks(frame, group), axis)
        axes.set_ylabel(_metric_label(metric, goal), fontsize=min(11.0, 400 / len(metric)))
        legend(axes, "upper right" if goal == "min" else "lower right")
        _mark_speedup(axes, rows, goal, axis)
    for axes in panels[len(places) :]:
        axes.remove()
    return with_caption(figure, frame) if captioned else figure


def with_caption(figure: Figure, frame: pd.DataFrame) -> Figure:
    """Say below a figure what its lines and bands are."""
    text = caption(frame)
    text = text if figure.get_figwidth() > 10 else text.replace(". ", ".\n", 1)
    figure.supxlabel(text, x=0.012, ha="left", multialignment="left", fontsize=9, color="#6e7781")
    return figure


def _mark_speedup(axes: Axes, rows: pd.DataFrame, goal: Goal, axis: Axis) -> None:
    """An arrow from where the baseline gets to its final value to where the arm got there, if that is resolved."""
    baseline, arm = rows[rows["is_baseline"].astype(bool)], rows[~rows["is_baseline"].astype(bool)]
    if baseline.empty or arm["arm"].nunique() != 1 or not arm["resolved"].all():
        return
    found = _resolved_speedup(arm, baseline, goal)
    own, other = (dict(zip(mean["place"], mean["mean"], strict=True)) for mean in (means(arm), means(baseline)))
    if found is None or not own or not other:
        return
    level, factor = other[max(other)], axis.scale(float(rows["progress"].max()))[0]
    ends = [steps for curve in (own, other) if (steps := steps_to_reach(curve, level, goal)) is not None]
    if len(ends) == 2:
        _arrow(axes, [end * factor for end in ends], level)
        _note(axes, found, goal)


def _resolved_speedup(arm: pd.DataFrame, baseline: pd.DataFrame, goal: Goal) -> Speedup | None:
    """The speed-up if every seed has one and its interval excludes 1."""
    found = speedup(*paired(arm, baseline), goal)
    if found is None or found.reached < found.n or found.n < MIN_SEEDS or found.ratio.low <= 1:
        return None
    return found


def _arrow(axes: Axes, ends: list[float], level: float) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (ends[0], level), (ends[1], level), arrowprops=style, zorder=5)


def _note(axes: Axes, found: Speedup, goal: Goal) -> None:
    """In the corner that convergence curves leave empty."""
    ratio, corner = found.ratio, (0.05 if goal == "min" else 0.85)
    detail = f"to the baseline\u2019s final value\n95 % interval {ratio.low:.2f} to {ratio.high:.2f}, n = {ratio.n}"
    axes.text(0.04, corner, detail, transform=axes.transAxes, fontsize=9.5, color=SOFT)
    heading = f"{ratio.mean:.2f}\u00d7 sooner"
    axes.text(0.04, corner + 0.115, heading, transform=axes.transAxes, fontsize=12, weight="bold")


def _metric_label(metric: str, goal: Goal) -> str:
    kind = metric.partition(":")[0]
    return f"{_NAMES.get(kind, kind)} ({'lower' if goal == 'min' else 'higher'} is better)\n{metric}"
