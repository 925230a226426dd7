"""What a search tried: its objective along every setting, and several objectives against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repa_lab.report.figures.style import FAINT, GREY, PALETTE, canvas, styled
from repa_lab.report.search import is_wide

_BEST, _OTHER = PALETTE[1], PALETTE[0]


@styled
def draw_slices(frame: pd.DataFrame, goals: Mapping[str, str]) -> Figure:
    """Every objective over the trials in their order, with the best so far, and along every searched setting: a point
    for each trial with a value, the best completed one marked.

    Args:
        frame: from :func:`repa_lab.report.search.search_frame`.
        goals: ``min`` or ``max``, by objective.
    """
    aims, names = _columns(frame, "value/"), ["trial", *_columns(frame, "param/")]
    columns = min(len(names), 3)
    rows_each = math.ceil(len(names) / columns)
    figure, panels = canvas(len(aims) * rows_each, columns, size=(6.2, 4.2) if columns == 1 else (4.4, 3.6))
    blanks = [""] * (rows_each * columns - len(names))
    places = [(aim, name) for aim in aims for name in (*names, *blanks)]
    for axes, (aim, name) in zip(panels, places, strict=True):
        if name:
            _slice(axes, frame, (aim, name), goals[aim.removeprefix("value/")])
        else:
            axes.remove()
    return figure


@styled
def draw_pareto(frame: pd.DataFrame) -> Figure:
    """Every pair of objectives against each other; the trials that none is better than in every objective are joined.

    Args:
        frame: from :func:`repa_lab.report.search.search_frame`.
    """
    pairs = list(combinations(_columns(frame, "value/"), 2))
    figure, panels = canvas(1, len(pairs), size=(6.0 if len(pairs) == 1 else 4.6, 4.3))
    for axes, (one, other) in zip(panels, pairs, strict=True):
        known = frame.dropna(subset=[one, other])
        front = known[known["on_front"].astype(bool)].sort_values(one)
        rest = known.drop(front.index)
        axes.scatter(rest[one], rest[other], color=GREY, s=28, label="dominated")
        axes.plot(front[one], front[other], color=_BEST, marker="o", ms=7, lw=1.4, label="none is better in all")
        axes.set(xlabel=one.removeprefix("value/"), ylabel=other.removeprefix("value/"))
        for label, column in ((axes.set_xscale, one), (axes.set_yscale, other)):
            label("log" if is_wide(known[column]) else "linear")
        axes.legend(loc="best")
    return figure


def _slice(axes: Axes, frame: pd.DataFrame, cell: tuple[str, str], goal: str) -> None:
    aim, name = cell
    known = frame.dropna(subset=[aim, name])
    is_number = pd.api.types.is_numeric_dtype(frame[name])
    places, done = known[name] if is_number else known[name].astype(str), known[known["state"] == "complete"]
    axes.scatter(places, known[aim], color=FAINT, s=26)
    axes.scatter(places[done.index], done[aim], color=_OTHER, s=34, alpha=0.85)
    if len(done):
        best = done[aim].idxmin() if goal == "min" else done[aim].idxmax()
        axes.scatter([places[best]], [done[aim][best]], color=_BEST, s=110, marker="*", zorder=4, label="best")
        axes.legend(loc="best")
    if name == "trial":
        running = done.sort_values(name)
        best_so_far = running[aim].cummin() if goal == "min" else running[aim].cummax()
        axes.step(running[name], best_so_far, where="post", color=GREY, lw=1.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif is_number and is_wide(frame[name]):
        axes.set_xscale("log")
    if is_wide(known[aim]):
        axes.set_yscale("log")
    axes.set_xlabel(name.removeprefix("param/"))
    axes.set_ylabel(aim.removeprefix("value/"), fontsize=min(11.0, 330 / len(aim)))


def _columns(frame: pd.DataFrame, kind: str) -> list[str]:
    return [name for name in frame.columns if name.startswith(kind)]
