"""Figures, data first: for each a function that returns the frame it shows, and one that draws that frame.

Figures are plain :class:`matplotlib.figure.Figure` objects: no window, no global state, safe without a display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from repa_lab.report.results import Results
from repa_lab.report.statistics import (
    MIN_SEEDS,
    Goal,
    Speedup,
    mean_interval,
    paired_difference,
    speedup,
    steps_to_reach,
)
from repa_lab.report.summary import SeedCurves
from repa_lab.runs import files

P = ParamSpec("P")
DPI = 150
COLUMNS = ["group", "arm", "name", "is_baseline", "rank", "metric", "seed", "step", "value", "n", "mean", "low", "high"]
ALIGNMENT = {
    "heldout/cka": "CKA with the encoder",
    "heldout/cosine": "cosine to the encoder",
    "heldout/gap": "matched - mismatched",
}
_PALETTE = ("#0b6fb8", "#d1570a", "#128a5f", "#a83a86", "#8a6d00", "#5b4bb5")
_GREY = "#7d848c"
_FAINT = "#cdd2d8"
_INK = "#24292f"
_MOST_BANDS = 3
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.solid_capstyle": "round",
}


def _styled(draw: Callable[Concatenate[pd.DataFrame, P], Figure]) -> Callable[Concatenate[pd.DataFrame, P], Figure]:
    """Draw under the report's style without touching the notebook's; a frame without rows is said, not an error."""

    @wraps(draw)
    def wrapped(frame: pd.DataFrame, /, *args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return _blank() if frame.empty else draw(frame, *args, **kwargs)

    return wrapped


def convergence_frame(results: Results) -> pd.DataFrame:
    """What :func:`draw_convergence` shows of one sweep: the compared metric of every arm over optimizer steps.

    Columns: ``group`` (the arms that share a baseline) and ``arm``; ``name`` is the arm's label without what its group
    shares; ``rank`` of the arm in its group by its last mean, 0 is best, and -1 for the baseline; ``value`` by ``seed``
    and ``step``; and, repeated for every seed of a step, ``n``, ``mean`` and its 95 % interval ``low`` to ``high``.
    Steps that some of the arm's measured seeds lack have no ``mean``: it would jump as seeds drop out.
    """
    pairs = [(arm, metric) for arm in results.baselines if (metric := results.compared_metric(arm))]
    return _frame(results, pairs)


def alignment_frame(results: Results) -> pd.DataFrame:
    """What :func:`draw_alignment` shows of one sweep: held-out alignment; columns as in :func:`convergence_frame`."""
    return _frame(results, [(arm, metric) for metric in ALIGNMENT for arm in results.baselines])


def quality_frame(results: Results, alignment: str = "heldout/cka") -> pd.DataFrame:
    """What :func:`draw_quality` shows of one sweep: a row per run and evaluation that measured both.

    ``quality`` is the compared metric and ``alignment`` the one named ``alignment_metric``; the other columns are those
    of :func:`convergence_frame`.
    """
    quality = convergence_frame(results).rename(columns={"value": "quality"}).drop(columns=["n", "mean", "low", "high"])
    aligned = alignment_frame(results).query("metric == @alignment")[["arm", "seed", "step", "value"]]
    joined = quality.merge(aligned.rename(columns={"value": "alignment"}), on=["arm", "seed", "step"])
    return joined.assign(alignment_metric=alignment).dropna(subset=["alignment", "quality"])


@_styled
def draw_convergence(frame: pd.DataFrame, goal: Goal = "min") -> Figure:
    """Convergence curves, a panel per group of arms that share a baseline.

    Lines are means over seeds, bands their 95 % t intervals; with fewer than three seeds, or seeds that stopped early,
    every seed has a thin line. With more than three arms, bars at the last step stand for the bands. Where one arm
    stands against one baseline and its speed-up is resolved, an arrow shows it.

    Args:
        frame: from :func:`convergence_frame`.
        goal: whether small or large values are good.
    """
    cells = _cells(frame)
    columns = min(len(cells), 3)
    figure, panels = _canvas(math.ceil(len(cells) / columns), columns, size=(5.2 if columns > 1 else 7.4, 4.5))
    for axes, (group, metric) in zip(panels, cells, strict=False):
        rows = frame[(frame["group"] == group) & (frame["metric"] == metric)]
        _panel(axes, rows, _title(frame, group), _looks(frame, group))
        axes.set_ylabel(_metric_label(metric, goal), fontsize=min(11.0, 400 / len(metric)))
        _legend(axes, "upper right" if goal == "min" else "lower right")
        _mark_speedup(axes, rows, goal)
    for axes in panels[len(cells) :]:
        axes.remove()
    return _captioned(figure, frame)


@_styled
def draw_alignment(frame: pd.DataFrame) -> Figure:
    """Held-out alignment over steps: a row per group of arms, a column per measure.

    Args:
        frame: from :func:`alignment_frame`.
    """
    groups, metrics = _unique(frame, "group"), _unique(frame, "metric")
    figure, panels = _canvas(len(groups), len(metrics), size=(4.4, 3.4))
    cells = [(group, metric) for group in groups for metric in metrics]
    for axes, (group, metric) in zip(panels, cells, strict=True):
        rows = frame[(frame["group"] == group) & (frame["metric"] == metric)]
        if rows.empty:
            axes.remove()
            continue
        _panel(axes, rows, _title(frame, group), _looks(frame, group))
        axes.set_ylabel(f"{ALIGNMENT[metric]}\n{metric}")
        _legend(axes, "best")
    return _captioned(figure, frame)


@_styled
def draw_quality(frame: pd.DataFrame) -> Figure:
    """Quality against alignment: a point per run and evaluation, joined in training order, the last one larger.

    Args:
        frame: from :func:`quality_frame`.
    """
    cells = _cells(frame)
    figure, panels = _canvas(1, len(cells), size=(5.1, 4.3))
    for axes, (group, metric) in zip(panels, cells, strict=True):
        rows = frame[(frame["group"] == group) & (frame["metric"] == metric)]
        for look in _looks(frame, group):
            _trails(axes, rows[rows["arm"] == look.arm], look)
        measure = rows["alignment_metric"].iloc[0]
        axes.set(title=_title(frame, group), xlabel=f"{ALIGNMENT.get(measure, measure)}\n{measure}", ylabel=metric)
        _legend(axes, "best")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    options: dict[str, Any] = {"format": "png", "dpi": DPI, "facecolor": "white"}
    files.replace_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    return path


# ---- the frames


def _frame(results: Results, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    parts = [part for arm, metric in pairs if not (part := _arm_frame(results, arm, metric)).empty]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.concat(parts, ignore_index=True)
    frame["name"] = frame["arm"].map(_names(frame))
    frame["rank"] = _ranks(frame, results.goal)
    return frame[COLUMNS]


def _arm_frame(results: Results, arm: str, metric: str) -> pd.DataFrame:
    curves = results.seed_curves(arm, metric)
    rows = pd.DataFrame(
        [(seed, step, value) for seed, curve in curves.items() for step, value in curve.items()],
        columns=["seed", "step", "value"],
    ).dropna()
    referenced = arm in results.baselines.values()
    group = results.baselines[arm] or (arm if referenced else "")
    return rows.merge(_bands(rows), on="step").assign(group=group, arm=arm, is_baseline=referenced, metric=metric)


def _bands(rows: pd.DataFrame) -> pd.DataFrame:
    steps = [(step, mean_interval(values)) for step, values in rows.groupby("step")["value"]]
    whole = max((estimate.n for _, estimate in steps), default=0)
    bands = [(step, e.n, e.mean, e.low, e.high) if e.n == whole else (step, e.n, *3 * (math.nan,)) for step, e in steps]
    return pd.DataFrame(bands, columns=["step", "n", "mean", "low", "high"])


def _ranks(frame: pd.DataFrame, goal: Goal) -> pd.Series:
    others = frame[~frame["is_baseline"].astype(bool)].dropna(subset=["mean"]).sort_values("step")
    last = others.drop_duplicates(["group", "arm"], keep="last").set_index("arm")
    ranks = last.groupby("group")["mean"].rank(method="first", ascending=goal == "min") - 1
    return frame["arm"].map(ranks).fillna(-1).astype(int)


def _names(frame: pd.DataFrame) -> dict[str, str]:
    """Labels without the parts that all arms of a group share."""
    names: dict[str, str] = {}
    for group in _unique(frame, "group"):
        arms = _unique(frame[frame["group"] == group], "arm")
        shared = _shared_parts(arms)
        names |= {arm: ", ".join(part for part in arm.split(", ") if part not in shared) or arm for arm in arms}
    return names


def _shared_parts(arms: Sequence[str]) -> list[str]:
    if len(arms) < 2:
        return []
    return [part for part in arms[0].split(", ") if all(part in arm.split(", ") for arm in arms)]


# ---- the drawing


@dataclass(frozen=True)
class _Look:
    """How an arm is drawn, the same in every figure."""

    arm: str
    name: str
    color: str
    is_baseline: bool
    is_faint: bool


def _looks(frame: pd.DataFrame, group: str) -> list[_Look]:
    """The arms of a group in the order of drawing: the baseline, then from the worst to the best.

    An arm that stands alone against its baseline has a hue per group, and the baseline a greyed version of it. Beyond
    six arms the worse ones are faint: six hues are what eyes tell apart.
    """
    arms = frame[frame["group"] == group].drop_duplicates("arm").sort_values("rank", ascending=False, kind="stable")
    others = arms.loc[~arms["is_baseline"].astype(bool), "arm"].tolist()[::-1]
    first = _unique(frame, "group").index(group) if len(others) == 1 else 0
    hues = {arm: _PALETTE[(first + index) % len(_PALETTE)] for index, arm in enumerate(others[: len(_PALETTE)])}
    grey = _blend(_GREY, hues[others[0]], 0.3) if len(others) == 1 else _GREY
    looks = [
        _Look(arm, name, grey if baseline else hues.get(arm, _FAINT), baseline, not baseline and arm not in hues)
        for arm, name, baseline in zip(arms["arm"], arms["name"], arms["is_baseline"].astype(bool), strict=True)
    ]
    return sorted(looks, key=lambda look: not look.is_baseline)


def _blend(one: str, other: str, share: float) -> str:
    mixed = (1 - share) * np.array(to_rgb(one)) + share * np.array(to_rgb(other))
    return to_hex(tuple(mixed.tolist()))


def _canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=layout)
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.flat)


def _blank() -> Figure:
    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, "Nothing to show: none of it has been measured yet.", ha="center", color="#57606a")
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, title: str, looks: list[_Look]) -> None:
    shown = [look for look in looks if look.arm in set(rows["arm"])]
    clear = [look for look in shown if not look.is_faint]
    _faint(axes, rows, [look for look in shown if look.is_faint])
    for place, look in enumerate(clear, start=1):
        arm = rows[rows["arm"] == look.arm].sort_values("step")
        _curve(axes, arm, look)
        if len(shown) <= _MOST_BANDS:
            _band(axes, arm, look)
            _seeds(axes, arm if _needs_seeds(arm) else arm[:0], look)
        else:
            _bar(axes, arm, look, shift=0.018 * place * float(np.ptp(rows["step"])))
    axes.set(title=title, xlabel="optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _scale(axes, rows)


def _faint(axes: Axes, rows: pd.DataFrame, looks: list[_Look]) -> None:
    for index, look in enumerate(looks):
        means = _means(rows[rows["arm"] == look.arm].sort_values("step"))
        label = None if index else f"{len(looks)} other arms"
        axes.plot(means["step"], means["mean"], color=look.color, lw=1.0, zorder=1.5, label=label)


def _curve(axes: Axes, rows: pd.DataFrame, look: _Look) -> None:
    means, label = _means(rows), f"{look.name} (n = {rows['n'].max()})"
    dashes: Any = (0, (3.2, 1.6)) if look.is_baseline else "solid"
    line = axes.plot(means["step"], means["mean"], color=look.color, lw=2.3, linestyle=dashes, label=label)
    line[0].set(marker="o", markersize=4.8, markeredgecolor="white", markeredgewidth=0.9)


def _band(axes: Axes, rows: pd.DataFrame, look: _Look) -> None:
    means, alpha = _means(rows), 0.15 if rows["n"].max() >= MIN_SEEDS else 0.07
    axes.fill_between(means["step"], means["low"], means["high"], color=look.color, alpha=alpha, lw=0)


def _seeds(axes: Axes, rows: pd.DataFrame, look: _Look) -> None:
    for _, run in rows.groupby("seed"):
        axes.plot(run["step"], run["value"], color=look.color, lw=0.9, alpha=0.8)


def _needs_seeds(rows: pd.DataFrame) -> bool:
    """Whether single seeds tell more than the mean: its band is very wide for two, and it ends where a seed stops."""
    return rows["n"].max() in range(2, MIN_SEEDS) or bool(rows["mean"].isna().any())


def _bar(axes: Axes, rows: pd.DataFrame, look: _Look, shift: float) -> None:
    """The interval at the last step only, to the right of it: bands of many arms would hide each other."""
    last = _means(rows).iloc[-1:]
    if last["low"].notna().all():
        axes.vlines(last["step"] + shift, last["low"], last["high"], color=look.color, lw=2.2)


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop_duplicates("step").dropna(subset=["mean"])


def _legend(axes: Axes, place: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc=place, handlelength=2.85)


def _trails(axes: Axes, rows: pd.DataFrame, look: _Look) -> None:
    for index, (_, run) in enumerate(rows.sort_values("step").groupby("seed")):
        label = look.name if index == 0 and not look.is_faint else None
        axes.plot(run["alignment"], run["quality"], color=look.color, lw=1, alpha=0.7, marker="o", ms=3.5, label=label)
        axes.plot(run["alignment"].iloc[-1:], run["quality"].iloc[-1:], color=look.color, marker="o", ms=8, mec="white")


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


def _mark_speedup(axes: Axes, rows: pd.DataFrame, goal: Goal) -> None:
    """An arrow from where the baseline gets to its final value to where the arm got there, if that is resolved."""
    baseline, arm = rows[rows["is_baseline"]], rows[~rows["is_baseline"]]
    if baseline.empty or arm["arm"].nunique() != 1:
        return
    found = _resolved_speedup(_by_seed(arm), _by_seed(baseline), goal)
    own, other = (dict(zip(means["step"], means["mean"], strict=True)) for means in (_means(arm), _means(baseline)))
    if found is None or not own or not other:
        return
    level = other[max(other)]
    ends = [steps_to_reach(curve, level, goal) for curve in (own, other)]
    if None not in ends:
        _arrow(axes, [float(end or 0) for end in ends], level)
        _note(axes, found, goal)


def _resolved_speedup(arm: SeedCurves, baseline: SeedCurves, goal: Goal) -> Speedup | None:
    """The speed-up if every seed has one, its interval excludes 1, and the last values differ too."""
    found = speedup(arm, baseline, goal)
    if found is None or found.reached < found.n or found.n < MIN_SEEDS or found.ratio.low <= 1:
        return None
    own, other = ({seed: curve[max(curve)] for seed, curve in curves.items()} for curves in (arm, baseline))
    return found if paired_difference(own, other).is_resolved else None


def _arrow(axes: Axes, ends: list[float], level: float) -> None:
    style = {"arrowstyle": "-|>", "color": _INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (ends[0], level), (ends[1], level), arrowprops=style, zorder=5)


def _note(axes: Axes, found: Speedup, goal: Goal) -> None:
    """In the corner that convergence curves leave empty."""
    ratio, corner = found.ratio, (0.05 if goal == "min" else 0.85)
    detail = f"to the baseline\u2019s final value\n95 % interval {ratio.low:.2f} to {ratio.high:.2f}, n = {ratio.n}"
    axes.text(0.04, corner, detail, transform=axes.transAxes, fontsize=9.5, color="#57606a")
    heading = f"{ratio.mean:.2f}\u00d7 sooner"
    axes.text(0.04, corner + 0.115, heading, transform=axes.transAxes, fontsize=12, weight="bold")


def _by_seed(rows: pd.DataFrame) -> SeedCurves:
    curves: dict[int, dict[int, float]] = {}
    for seed, step, value in zip(rows["seed"], rows["step"], rows["value"], strict=True):
        curves.setdefault(int(seed), {})[int(step)] = float(value)
    return curves


def _captioned(figure: Figure, frame: pd.DataFrame) -> Figure:
    most = int(frame["n"].max())
    crowded = frame.groupby(["group", "metric"])["arm"].nunique().max() > _MOST_BANDS
    where = "Bar: 95 % Student-t interval of the last mean" if crowded else "Band: 95 % Student-t interval of that mean"
    thin = "; thin: single seeds" if _needs_seeds(frame) and not crowded else ""
    spread = f"{where}; by seed (paired), arms may differ clearly where these overlap."
    gap = " " if figure.get_figwidth() > 10 else "\n"
    text = f"Line: mean over n seeds{thin}.{gap}{spread}" if most > 1 else "One seed: no interval."
    figure.supxlabel(text, x=0.012, ha="left", multialignment="left", fontsize=9, color="#6e7781")
    return figure


def _metric_label(metric: str, goal: Goal) -> str:
    kind = metric.partition(":")[0]
    words = {"frechet": "Fr\u00e9chet distance", "fid": "FID"}.get(kind, kind)
    return f"{words} ({'lower' if goal == 'min' else 'higher'} is better)\n{metric}"


def _title(frame: pd.DataFrame, group: str) -> str:
    arms = _unique(frame[frame["group"] == group], "arm")
    return ", ".join(_shared_parts(arms)) or ("no baseline" if not group and frame["group"].nunique() > 1 else "")


def _cells(frame: pd.DataFrame) -> list[tuple[str, str]]:
    cells = frame[["group", "metric"]].drop_duplicates()
    return list(zip(cells["group"], cells["metric"], strict=True))


def _unique(frame: pd.DataFrame, column: str) -> list[str]:
    return [str(value) for value in frame[column].unique()]
