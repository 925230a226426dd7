"""Every compared arm's difference to its baseline with its interval, side by side."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repa_lab.report.figures.style import GREY, INK, PALETTE, SOFT, canvas, styled
from repa_lab.report.results import Results
from repa_lab.report.statistics import Goal

_BETTER, _WORSE = PALETTE[2], PALETTE[1]
_ROW_INCHES = 0.36


def differences_frame(results: Results) -> pd.DataFrame:
    """What :func:`draw_differences` shows: the rows of the summary with a difference of the compared metric, in its
    order, and ``metric`` as :meth:`Results.names` has it."""
    compared = {arm: results.compared_metric(arm) for arm in results.baselines}
    rows = results.summary[results.summary["metric"] == results.summary["arm"].map(compared)]
    rows = rows[rows["n_pairs"] > 0].reset_index(drop=True)
    named = [results.names(metric)[arm] for arm, metric in zip(rows["arm"], rows["metric"], strict=True)]
    return rows.assign(metric=named)


@styled
def draw_differences(frame: pd.DataFrame, goal: Goal = "min") -> Figure:
    """A line per arm: the mean paired difference and its 95 % interval; coloured where it is resolved.

    Args:
        frame: from :func:`differences_frame`.
        goal: whether small or large values are good.
    """
    metrics = [str(metric) for metric in frame["metric"].unique()]
    most = int(frame.groupby("metric").size().max())
    figure, panels = canvas(len(metrics), 1, size=(6.2, 1.1 + _ROW_INCHES * most))
    for axes, metric in zip(panels, metrics, strict=True):
        rows = frame[frame["metric"] == metric]
        for place, (_, row) in enumerate(rows.iterrows()):
            _interval(axes, -place, row, goal)
        axes.axvline(0, color=INK, lw=1.0, linestyle=(0, (3.2, 1.6)), zorder=1)
        axes.set_yticks(
            [-place for place in range(len(rows))], [f"{row.arm}  (n = {row.n_pairs})" for row in rows.itertuples()]
        )
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.spines["left"].set_visible(False)
        better = "left" if goal == "min" else "right"
        axes.set_xlabel(f"{metric}\narm - baseline, paired by seed; {better} of 0 is better")
    return figure


def _interval(axes: Axes, place: float, row: pd.Series, goal: Goal) -> None:
    is_better = (row["diff"] < 0) == (goal == "min")
    color = (_BETTER if is_better else _WORSE) if row["verdict"] == "resolved" else GREY
    if pd.notna(row["diff_low"]):
        axes.plot([row["diff_low"], row["diff_high"]], [place, place], color=color, lw=2.6)
    axes.plot([row["diff"]], [place], color=color, marker="o", ms=8, mec="white")
    axes.text(1.015, place, row["verdict"], transform=axes.get_yaxis_transform(), fontsize=10, color=SOFT, va="center")
