"""A panel of curves: means over seeds with their bands, each arm in its colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from repa_lab.report.figures.frames import means, shared_parts, unique
from repa_lab.report.figures.style import FAINT, GREY, PALETTE, blend
from repa_lab.report.progress import STEPS, Axis
from repa_lab.report.statistics import MIN_BOOTSTRAP, MIN_SEEDS

MOST_BANDS = 3
_LARGE = 1e7


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure."""

    arm: str
    name: str
    color: str
    is_baseline: bool
    is_faint: bool


def looks(frame: pd.DataFrame, group: str) -> list[Look]:
    """The arms of a group in the order of drawing: the baseline, then from the worst to the best.

    An arm that stands alone against its baseline has a hue per group, and the baseline a greyed version of it. Beyond
    six arms the worse ones are faint: six hues are what eyes tell apart.
    """
    arms = frame[frame["group"] == group].drop_duplicates("arm").sort_values("rank", ascending=False, kind="stable")
    others = arms[~arms["is_baseline"].astype(bool)]
    alone = PALETTE[int(others["hue"].iloc[0]) % len(PALETTE)] if len(others) == 1 else None
    found = [
        _look(row.arm, row.name, bool(row.is_baseline), int(row.hue), int(row.rank), alone)
        for row in arms[["arm", "name", "is_baseline", "hue", "rank"]].itertuples(index=False, name="Arm")
    ]
    return sorted(found, key=lambda look: not look.is_baseline)


def draw_curves(axes: Axes, rows: pd.DataFrame, group_looks: list[Look], axis: Axis = STEPS) -> None:
    """Draw a panel.

    Args:
        axes: where.
        rows: of one group and metric.
        group_looks: from :func:`looks`.
        axis: the measure of progress of the rows.
    """
    factor, label = axis.scale(float(rows["progress"].max()))
    rows = rows.assign(progress=rows["progress"] * factor, place=rows["place"] * factor)
    shown = [look for look in group_looks if look.arm in set(rows["arm"])]
    clear = [look for look in shown if not look.is_faint]
    _faint(axes, rows, [look for look in shown if look.is_faint])
    for place, look in enumerate(clear, start=1):
        arm = rows[rows["arm"] == look.arm].sort_values("step")
        _curve(axes, arm, look)
        if len(shown) <= MOST_BANDS:
            _band(axes, arm, look)
            _seeds(axes, arm if _needs_seeds(arm) else arm[:0], look)
        else:
            _bar(axes, arm, look, shift=0.018 * place * float(np.ptp(rows["progress"])))
    axes.set(title=title(rows), xlabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis is STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    _scale(axes, rows)


def legend(axes: Axes, place: Any) -> None:
    """The arms, the best first."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc=place, handlelength=2.85)


def title(rows: pd.DataFrame) -> str:
    """What the arms of a panel share, with their baseline, which gives the group its name and may not be among them."""
    labels = dict.fromkeys([*unique(rows, "group"), *unique(rows, "arm")])
    return ", ".join(shared_parts([label for label in labels if label]))


def caption(frame: pd.DataFrame) -> str:
    """What lines and bands are, in words."""
    most = int(frame["n"].max())
    if most <= 1:
        return "One seed: no interval."
    crowded = frame.groupby(["group", "metric"])["arm"].nunique().max() > MOST_BANDS
    if crowded and most < MIN_SEEDS:
        return "Line: mean over two seeds, which are too few for an interval that says anything."
    kind = "bootstrap" if most >= MIN_BOOTSTRAP else "Student-t"
    where = f"Bar: 95 % {kind} interval of the last mean" if crowded else f"Band: 95 % {kind} interval of that mean"
    thin = "; thin: single seeds" if _needs_seeds(frame) and not crowded else ""
    return f"Line: mean over n seeds{thin}. {where}; by seed (paired), arms may differ clearly where these overlap."


def _look(arm: str, name: str, is_baseline: bool, hue: int, rank: int, alone: str | None) -> Look:
    if is_baseline:
        return Look(arm, name, blend(GREY, alone, 0.3) if alone else GREY, True, False)
    if alone:
        return Look(arm, name, alone, False, False)
    is_faint = not 0 <= rank < len(PALETTE)
    return Look(arm, name, FAINT if is_faint else PALETTE[hue % len(PALETTE)], False, is_faint)


def _faint(axes: Axes, rows: pd.DataFrame, faint: list[Look]) -> None:
    for index, look in enumerate(faint):
        shown = means(rows[rows["arm"] == look.arm])
        label = None if index else f"{len(faint)} other arms"
        axes.plot(shown["place"], shown["mean"], color=look.color, lw=1.0, zorder=1.5, label=label)


def _curve(axes: Axes, rows: pd.DataFrame, look: Look) -> None:
    shown, label = means(rows), f"{look.name} (n = {rows['n'].max()})"
    dashes: Any = (0, (3.2, 1.6)) if look.is_baseline else "solid"
    line = axes.plot(shown["place"], shown["mean"], color=look.color, lw=2.3, linestyle=dashes, label=label)
    line[0].set(marker="o", markersize=4.8, markeredgecolor="white", markeredgewidth=0.9)


def _band(axes: Axes, rows: pd.DataFrame, look: Look) -> None:
    shown, alpha = means(rows), 0.15 if rows["n"].max() >= MIN_SEEDS else 0.07
    axes.fill_between(shown["place"], shown["low"], shown["high"], color=look.color, alpha=alpha, lw=0)


def _seeds(axes: Axes, rows: pd.DataFrame, look: Look) -> None:
    for _, run in rows.groupby("seed"):
        axes.plot(run["progress"], run["value"], color=look.color, lw=0.9, alpha=0.8)


def _needs_seeds(rows: pd.DataFrame) -> bool:
    """Whether single seeds tell more than the mean: its band is very wide for two, and it ends where a seed stops."""
    return rows["n"].max() in range(2, MIN_SEEDS) or bool(rows["mean"].isna().any())


def _bar(axes: Axes, rows: pd.DataFrame, look: Look, shift: float) -> None:
    """The interval at the last step only, to the right of it: bands of many arms would hide each other."""
    last = means(rows).iloc[-1:]
    if last["low"].notna().all() and rows["n"].max() >= MIN_SEEDS:
        axes.vlines(last["place"] + shift, last["low"], last["high"], color=look.color, lw=2.2)


def _tick(value: float) -> str:
    if abs(value) >= _LARGE:
        return f"{value:.2g}".replace("e+", "e")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _scale(axes: Axes, rows: pd.DataFrame) -> None:
    """Limits that show every measured value; a wide band may leave the panel rather than flatten the curves."""
    values = rows["value"].to_numpy(dtype=float)
    is_log = bool(values.min() > 0 and values.max() / values.min() > 10)
    ends = np.array([values.min(), values.max(), rows["low"].min(), rows["high"].max()], dtype=float)
    ends = np.where(np.isnan(ends), [values.min(), values.max()] * 2, ends)
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        ends = np.log(np.where(ends > 0, ends, values.min() / 2))
    axes.set_ylim(*(np.exp(_limits(*ends)) if is_log else _limits(*ends)))


def _limits(low: float, high: float, band_low: float, band_high: float) -> tuple[float, float]:
    room = 0.3 * (high - low) or 0.1 * abs(high) or 1.0
    pad = 0.15 * room
    return max(min(low, band_low), low - room) - pad, min(max(high, band_high), high + room) + pad
