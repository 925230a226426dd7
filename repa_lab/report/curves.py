"""Figures of curves over training: convergence, alignment on held-out images, quality against alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from repa_lab.report.figure_data import (
    ALIGNMENT,
    FAINT,
    GREY,
    INK,
    MAX_BANDS,
    PALETTE,
    SOFT,
    means,
    needs_seeds,
    panels,
    shared_parts,
    unique,
)
from repa_lab.report.figures import DASHED, canvas, legend, log_scale, short_labels, shorten, styled
from repa_lab.report.results import STEPS, Axis
from repa_lab.report.statistics import MIN_SEEDS, Goal, steps_to_reach
from repa_lab.report.summary import bare_name

_MAX_TITLE = 60
_MAX_COLUMNS = 3
_LARGE = 1e7
_NAMES = {"frechet": "Fr\u00e9chet distance", "fid": "FID"}
Entries = list[tuple[Artist, str]]  # of a legend


@styled
def draw_convergence(frame: pd.DataFrame, goal: Goal = "min", axis: Axis = STEPS) -> Figure:
    """Draw a :func:`repa_lab.report.figure_data.convergence_frame` over its axis, a panel per group of arms.

    Lines are means over seeds, bands their 95 % intervals; with two seeds, or seeds that stopped early, every seed has
    a thin line. With more than three arms, bars at the last step replace the bands. If a panel has one arm and its
    baseline and the speed-up is resolved, an arrow shows it.
    """
    better = "lower" if goal == "min" else "higher"

    def label(metric: str) -> str:
        kind = metric.partition(":")[0]
        return f"{_NAMES.get(kind, kind)} ({better} is better)\n{metric}"

    figure = _draw_panels(frame, axis, (5.6, 4.5), label, "upper right" if goal == "min" else "lower right")
    for axes, rows in zip(figure.axes, panels(frame), strict=True):
        _mark_speedup(axes, rows, goal, axis)
    return figure


@styled
def draw_alignment(frame: pd.DataFrame) -> Figure:
    """Draw an :func:`repa_lab.report.figure_data.alignment_frame`, a panel for each group of arms and measure."""
    return _draw_panels(frame, STEPS, (4.6, 3.6), _alignment_label, "best")


@styled
def draw_quality(frame: pd.DataFrame) -> Figure:
    """Draw a :func:`repa_lab.report.figure_data.quality_frame`: a point per run and evaluation.

    The points of a run are joined in the order of training, and the last one is larger.
    """
    # A panel has one protocol along either axis.
    cells = list(frame.groupby(["group", "metric", "alignment_metric"], sort=False))
    figure, places = canvas(cells, len(cells), size=(5.1, 4.3))
    for axes, ((group, metric, alignment), rows) in places:
        entries: Entries = []
        for style in arm_styles(frame, group):
            for seed_place, (_, run) in enumerate(rows[rows["arm"] == style.arm].sort_values("step").groupby("seed")):
                color, alignments, values = style.color, run["alignment"], run["quality"]
                line = axes.plot(alignments, values, color=color, lw=1, alpha=0.7, marker="o", ms=3.5)
                axes.plot(alignments.iloc[-1:], values.iloc[-1:], color=color, marker="o", ms=8, mec="white")
                if seed_place == 0 and not style.is_faint:
                    entries.append((line[0], style.name))
        axes.set(title=_title(rows), xlabel=_alignment_label(alignment), ylabel=metric)
        legend(axes, entries, "best")
    return figure


def _alignment_label(metric: str) -> str:
    name = ALIGNMENT.get(bare_name(metric))
    return f"{name}\n{metric}" if name else metric


def _title(rows: pd.DataFrame) -> str:
    """Return what the arms of a panel share with the baseline that names the group and may not be among them."""
    labels = dict.fromkeys([*unique(rows, "group"), *unique(rows, "arm")])
    return shorten(", ".join(shared_parts([label for label in labels if label])), _MAX_TITLE)


class ArmStyle(NamedTuple):
    """The name and colour of an arm, the same in every figure; ``is_faint`` for arms beyond the six colours."""

    arm: str
    name: str
    color: str
    is_baseline: bool
    is_faint: bool


def arm_styles(frame: pd.DataFrame, group: str) -> list[ArmStyle]:
    """Return the arms of a group in the order of drawing: the baseline, then from the worst to the best.

    An arm that stands alone against its baseline has the hue of its group, and the baseline is a greyed version of that
    hue. Beyond six arms the worse ones are faint: six hues are as many as can be told apart.
    """
    arms = frame[frame["group"] == group].drop_duplicates("arm").sort_values("rank", ascending=False, kind="stable")
    others = arms[arms["rank"] >= 0]
    single = PALETTE[others["hue"].iloc[0] % len(PALETTE)] if len(others) == 1 else None
    names = short_labels(unique(arms, "name"))
    styles = []
    for row in arms.itertuples():
        is_faint = single is None and row.rank >= len(PALETTE)
        color = FAINT if is_faint else single or PALETTE[row.hue % len(PALETTE)]
        if row.rank < 0:
            mixed = 0.7 * np.array(to_rgb(GREY)) + 0.3 * np.array(to_rgb(single or GREY))
            color = to_hex(tuple(mixed.tolist()))
        styles.append(ArmStyle(row.arm, names[str(row.name)], color, row.rank < 0, is_faint))
    return sorted(styles, key=lambda style: not style.is_baseline)


def _draw_panels(
    frame: pd.DataFrame, axis: Axis, size: tuple[float, float], label: Callable[[str], str], place: str
) -> Figure:
    figure, places = canvas(list(panels(frame)), _MAX_COLUMNS, size)
    for axes, rows in places:
        metric = str(rows["metric"].iloc[0])
        entries = _draw_panel(axes, rows, arm_styles(frame, str(rows["group"].iloc[0])), axis)
        axes.set_ylabel(label(metric), fontsize=min(11.0, 400 / len(metric)))
        legend(axes, entries, place)
    return figure


def _draw_panel(axes: Axes, rows: pd.DataFrame, styles: list[ArmStyle], axis: Axis) -> Entries:
    """Draw the curves of one group and metric, and return the entries of the legend."""
    factor, progress_label = axis.scale(float(rows["progress"].max()))
    rows = rows.assign(progress=rows["progress"] * factor, place=rows["place"] * factor)
    shown = [style for style in styles if style.arm in set(rows["arm"])]
    faint = [style for style in shown if style.is_faint]
    entries: Entries = []
    for style in faint:
        mean = means(rows[rows["arm"] == style.arm])
        label = f"{len(faint)} other arms"
        line = axes.plot(mean["place"], mean["mean"], color=style.color, lw=1.0, zorder=1.5, label=label)
        entries = entries or [(line[0], label)]
    for place, style in enumerate((style for style in shown if not style.is_faint), start=1):
        arm = rows[rows["arm"] == style.arm].sort_values("step")
        mean, color, n = means(arm), style.color, int(arm["n"].max())
        dashes: Any = DASHED if style.is_baseline else "solid"
        label = f"{style.name} (n = {n})"
        line = axes.plot(mean["place"], mean["mean"], color=color, lw=2.3, linestyle=dashes, label=label)
        line[0].set(marker="o", markersize=4.8, markeredgecolor="white", markeredgewidth=0.9)
        entries.append((line[0], label))
        if len(shown) <= MAX_BANDS:
            alpha = 0.15 if n >= MIN_SEEDS else 0.07
            axes.fill_between(mean["place"], mean["low"], mean["high"], color=color, alpha=alpha, lw=0)
            for _, run in arm.groupby("seed") if needs_seeds(arm) else ():
                axes.plot(run["progress"], run["value"], color=color, lw=0.9, alpha=0.8)
        elif n >= MIN_SEEDS and mean.iloc[-1:]["low"].notna().all():
            # Bands of many arms would hide each other: the interval at the last step alone, to the right of it.
            last, shift = mean.iloc[-1:], 0.018 * place * float(np.ptp(rows["progress"]))
            axes.vlines(last["place"] + shift, last["low"], last["high"], color=color, lw=2.2)
    axes.set(title=_title(rows), xlabel=progress_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis is STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    _set_limits(axes, rows)
    return entries


def _tick(value: float) -> str:
    if abs(value) >= _LARGE:
        return f"{value:.2g}".replace("e+", "e")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _set_limits(axes: Axes, rows: pd.DataFrame) -> None:
    """Show every measured value; a wide band may leave the panel rather than flatten the curves."""
    values = rows["value"].to_numpy(dtype=float)
    is_log = bool(values.min() > 0 and values.max() / values.min() > 10)
    ends = np.array([values.min(), values.max(), rows["low"].min(), rows["high"].max()], dtype=float)
    ends = np.where(np.isnan(ends), [values.min(), values.max()] * 2, ends)
    if is_log:
        log_scale(axes, "y", (1.0, 2.0, 5.0))
        ends = np.log(np.where(ends > 0, ends, values.min() / 2))
    low, high, band_low, band_high = ends
    room = 0.3 * (high - low) or 0.1 * abs(high) or 1.0
    limits = np.array([max(min(low, band_low), low - room), min(max(high, band_high), high + room)])
    limits += np.array([-0.15, 0.15]) * room
    axes.set_ylim(*(np.exp(limits) if is_log else limits))


def _mark_speedup(axes: Axes, rows: pd.DataFrame, goal: Goal, axis: Axis) -> None:
    """Draw an arrow from where the baseline reaches its final value to where its only arm did, if that is resolved."""
    baseline, arm = rows[rows["rank"] < 0], rows[rows["rank"] >= 0]
    if baseline.empty or arm["arm"].nunique() != 1 or arm["speedup"].iloc[0] is None:
        return
    ratio, curves = arm["speedup"].iloc[0], [means(arm), means(baseline)]
    arm_mean, baseline_mean = (dict(zip(curve["place"], curve["mean"], strict=True)) for curve in curves)
    level = baseline_mean[max(baseline_mean)]
    places = [steps_to_reach(curve, level, goal) for curve in (arm_mean, baseline_mean)]
    if None in places:
        return
    arm_place, baseline_place = np.array(places) * axis.scale(float(rows["progress"].max()))[0]
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (arm_place, level), (baseline_place, level), arrowprops=style, zorder=5)
    # The note is in the corner that convergence curves leave empty.
    corner = 0.05 if goal == "min" else 0.85
    detail = f"to the baseline\u2019s final value\n95 % interval {ratio.low:.2f} to {ratio.high:.2f}, n = {ratio.n}"
    axes.text(0.04, corner, detail, transform=axes.transAxes, fontsize=9.5, color=SOFT)
    heading = f"{ratio.mean:.2f}\u00d7 sooner"
    axes.text(0.04, corner + 0.115, heading, transform=axes.transAxes, fontsize=12, weight="bold")
