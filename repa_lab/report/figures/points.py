"""Points with their spread: differences to the baseline, and the trials of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repa_lab.report.figure_data import FAINT, GREY, INK, PALETTE, SOFT, unique
from repa_lab.report.figures.style import canvas, legend, log_scale, short_labels, styled
from repa_lab.report.search import is_wide
from repa_lab.report.statistics import Goal

_POINT, _BEST, _BETTER = PALETTE[:3]
_WORSE = PALETTE[1]
_ROW_INCHES, _CHARACTER_INCHES = 0.36, 0.085
_WIDE_LABEL = 8  # characters


@styled
def draw_differences(frame: pd.DataFrame, goal: Goal = "min") -> Figure:
    """Draw a line per arm: the mean paired difference and its 95 % interval; coloured where it is resolved.

    Args:
        frame: from :func:`repa_lab.report.figures.differences_frame`.
        goal: whether small or large values are good.
    """
    metrics, names = unique(frame, "metric"), short_labels(unique(frame, "arm"))
    most = int(frame.groupby("metric").size().max())
    # Labels take room beside the panel, whose own width must hold the label of its axis.
    width = 6.2 + _CHARACTER_INCHES * max(0, max(map(len, names.values())) - _WIDE_LABEL)
    figure, panels = canvas(len(metrics), 1, size=(width, 1.1 + _ROW_INCHES * most))
    for axes, metric in zip(panels, metrics, strict=True):
        rows = frame[frame["metric"] == metric]
        for place, (_, row) in enumerate(rows.iterrows()):
            is_better = (row["diff"] < 0) == (goal == "min")
            color = (_BETTER if is_better else _WORSE) if row["verdict"] == "resolved" else GREY
            if pd.notna(row["diff_low"]):
                axes.plot([row["diff_low"], row["diff_high"]], [-place, -place], color=color, lw=2.6)
            axes.plot([row["diff"]], [-place], color=color, marker="o", ms=8, mec="white")
            right = axes.get_yaxis_transform()
            axes.text(1.015, -place, row["verdict"], transform=right, fontsize=10, color=SOFT, va="center")
        axes.axvline(0, color=INK, lw=1.0, linestyle=(0, (3.2, 1.6)), zorder=1)
        labels = [f"{names[row.arm]}  (n = {row.n_pairs})" for row in rows.itertuples()]
        axes.set_yticks([-place for place in range(len(rows))], labels)
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.spines["left"].set_visible(False)
        better = "left" if goal == "min" else "right"
        axes.set_xlabel(f"{metric}\narm - baseline, paired by seed; {better} of 0 is better")
    return figure


@styled
def draw_slices(frame: pd.DataFrame, goals: Mapping[str, str]) -> Figure:
    """Draw every objective over the trials and along every searched setting: a point per trial, the best one marked.

    Args:
        frame: from :func:`repa_lab.report.search.search_frame`.
        goals: ``min`` or ``max``, by objective.
    """
    values, names = _columns(frame, "value/"), ["trial", *_columns(frame, "param/")]
    columns = min(len(names), 3)
    rows_each = math.ceil(len(names) / columns)
    figure, panels = canvas(len(values) * rows_each, columns, size=(6.2, 4.2) if columns == 1 else (4.4, 3.6))
    blanks = [""] * (rows_each * columns - len(names))
    cells = [(value, name) for value in values for name in (*names, *blanks)]
    for axes, (value, name) in zip(panels, cells, strict=True):
        if name:
            _draw_slice(axes, frame, value, name, goals[value.removeprefix("value/")])
        else:
            axes.remove()
    return figure


def _draw_slice(axes: Axes, frame: pd.DataFrame, value: str, name: str, goal: str) -> None:
    known = frame.dropna(subset=[value, name])
    done = known[known["state"] == "complete"]
    places = known[name]
    is_number = pd.api.types.is_numeric_dtype(frame[name])
    if not is_number:
        choices = short_labels(list(map(str, places)))
        places = places.astype(str).map({choice: place for place, choice in enumerate(choices)})
        axes.set_xticks(range(len(choices)), list(choices.values()))
        axes.margins(x=0.15)
    axes.scatter(places, known[value], color=FAINT, s=26)
    axes.scatter(places[done.index], done[value], color=_POINT, s=34, alpha=0.85)
    if len(done):
        best = done[value].idxmin() if goal == "min" else done[value].idxmax()
        star = axes.scatter([places[best]], [done[value][best]], color=_BEST, s=110, marker="*", zorder=4)
        legend(axes, [(star, "best")], "best")
    if name == "trial":
        begun = done.sort_values(name)
        best_so_far = begun[value].cummin() if goal == "min" else begun[value].cummax()
        axes.step(begun[name], best_so_far, where="post", color=GREY, lw=1.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif is_number and is_wide(frame[name]):
        log_scale(axes, "x")
    if is_wide(known[value]):
        log_scale(axes, "y")
    axes.set_xlabel(name.removeprefix("param/"))
    axes.set_ylabel(value.removeprefix("value/"), fontsize=min(11.0, 330 / len(value)))


@styled
def draw_pareto(frame: pd.DataFrame) -> Figure:
    """Draw every pair of objectives against each other, with the Pareto front joined.

    Args:
        frame: from :func:`repa_lab.report.search.search_frame`.
    """
    pairs = list(combinations(_columns(frame, "value/"), 2))
    figure, panels = canvas(1, len(pairs), size=(6.0 if len(pairs) == 1 else 4.6, 4.3))
    for axes, (first, second) in zip(panels, pairs, strict=True):
        known = frame.dropna(subset=[first, second])
        front = known[known["on_front"].astype(bool)].sort_values(first)
        rest = known.drop(front.index)
        dots: Artist = axes.scatter(rest[first], rest[second], color=GREY, s=28)
        line = axes.plot(front[first], front[second], color=_BEST, marker="o", ms=7, lw=1.4)
        axes.set(xlabel=first.removeprefix("value/"), ylabel=second.removeprefix("value/"))
        if is_wide(known[first]):
            log_scale(axes, "x")
        if is_wide(known[second]):
            log_scale(axes, "y")
        legend(axes, [(line[0], "Pareto front"), (dots, "dominated")], "best")
    return figure


def _columns(frame: pd.DataFrame, prefix: str) -> list[str]:
    return [name for name in frame.columns if name.startswith(prefix)]
