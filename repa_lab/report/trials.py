"""A search, trial by trial: the frame, and a figure of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repa_lab.report.results import Results
from repa_lab.report.statistics import Goal

_COLORS = {"complete": "#0b6fb8", "pruned": "#d1570a"}
_GREY = "#7d848c"
_COLUMNS = ["trial", "arm", "state", "value", "best"]


def trials_frame(results: Results) -> pd.DataFrame:
    """The trials of one sweep's search in the order in which they were begun.

    Columns: ``trial`` from 0, ``arm``, ``state``, ``value`` of the objective (the first of several; NaN without one), ``best``
    of the completed trials up to there, and what was searched under dotted paths (NaN or None where a trial left it alone).
    """
    search = results.sweep.get("search") or {"goal": "min", "trials": []}
    records = [
        {"trial": number, "arm": one["arm"], "state": one["state"], "value": one["value"], **one["params"]}
        for number, one in enumerate(search["trials"])
    ]
    frame = pd.DataFrame(records, columns=None if records else _COLUMNS)
    frame["value"] = frame["value"].astype(float)
    complete = frame["value"].where(frame["state"] == "complete")
    frame["best"] = (complete.cummax() if search["goal"] == "max" else complete.cummin()).ffill()
    return frame[[*_COLUMNS, *(name for name in frame.columns if name not in _COLUMNS)]]


def draw_trials(frame: pd.DataFrame, metric: str, goal: Goal = "min") -> Figure:
    """The value of every trial in their order with the best so far, and over each searched field.

    Args:
        frame: from :func:`trials_frame`.
        metric: the objective's name.
        goal: whether small or large values are good.
    """
    fields = [name for name in frame.columns if name not in _COLUMNS]
    figure = Figure(figsize=(4.2 * (1 + len(fields)), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(fields), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, ["trial", *fields], strict=True):
        _scatter(axes, frame.dropna(subset=["value", name]), name)
    panels[0].step(frame["trial"], frame["best"], where="post", color=_GREY, lw=1.4, label="best so far")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(f"{metric}\n({'lower' if goal == 'min' else 'higher'} is better)")
    if not frame.empty:
        panels[0].legend(frameon=False)
    return figure


def _scatter(axes: Axes, frame: pd.DataFrame, name: str) -> None:
    for state, rows in frame.groupby("state", sort=False):
        values = rows[name] if pd.api.types.is_numeric_dtype(frame[name]) else rows[name].map(str)
        axes.scatter(values, rows["value"], color=_COLORS.get(str(state), _GREY), label=str(state), zorder=3)
    if _spans_decades(frame[name].tolist()):
        axes.set_xscale("log")
    axes.set_xlabel(name)
    axes.grid(color="#e6e8eb")


def _spans_decades(values: Sequence[object]) -> bool:
    numbers = [value for value in values if isinstance(value, float)]
    return len(numbers) == len(values) > 0 and min(numbers) > 0 and math.log10(max(numbers) / min(numbers)) > 1
