"""The style of figures, how they are written, and the figures without curves: differences, trials, blocks of runs.

Figures are plain :class:`matplotlib.figure.Figure` objects: no window, no global state, safe without a display.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from repa_lab.files import replace_atomically
from repa_lab.report.figure_data import (
    FAINT,
    GREY,
    INK,
    PALETTE,
    SOFT,
    is_wide,
    load_profile,
    profile_difference,
    profile_matrix,
    run_id_of,
    shown_metrics,
    unique,
)
from repa_lab.report.statistics import Goal
from repa_lab.runs import RunDirectory

P = ParamSpec("P")
T = TypeVar("T")
STYLE: dict[Any, Any] = {
    **{"text.parse_math": False, "text.usetex": False},  # labels are the user's words: a dollar sign is a dollar sign
    **{"font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "legend.fontsize": 10.5},
    **{"axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.labelcolor": INK, "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1a9"},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e8eb", "grid.linewidth": 0.8},
    **{"legend.frameon": False, "lines.solid_capstyle": "round"},
}
DASHED = (0, (3.2, 1.6))
_DPI = 150
_MAX_LABEL = 36  # characters of an arm's label in a figure
_POINT, _BEST, _BETTER = PALETTE[:3]
_WORSE = PALETTE[1]
_ROW_INCHES, _CHARACTER_INCHES = 0.36, 0.085
_WIDE_LABEL = 8  # characters
_METRICS = {
    "cka": "CKA with the encoder",
    "cknna": "CKNNA with the encoder",
    "mutual_knn": "mutual kNN with the encoder",
    "lds": "LDS: near less far cosine",
    "cds": "CDS: decay of the cosine",
    "rmsc": "RMSC: contrast of tokens",
}
_MAX_CELLS = 400  # beyond this many cells their numbers would be illegible
_SMALL = {"axes.grid": False, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "normal"}
_NARROW = 0.15  # range of values below which two decimals would hide differences


# ---- style


def styled(draw: Callable[Concatenate[pd.DataFrame, P], Figure]) -> Callable[Concatenate[pd.DataFrame, P], Figure]:
    """Draw under the report's style without changing the notebook's; an empty frame gives a figure that says so."""

    @wraps(draw)
    def wrapped(frame: pd.DataFrame, /, *args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            if not frame.empty:
                return draw(frame, *args, **kwargs)
            figure = Figure(figsize=(5, 1))
            figure.text(0.5, 0.5, "Nothing to show: none of it has been measured yet.", ha="center", color=SOFT)
            return figure

    return wrapped


def canvas(cells: Sequence[T | None], columns: int, size: tuple[float, float]) -> tuple[Figure, list[tuple[Axes, T]]]:
    """Return a figure and its panels, row by row, each with what it shows; None leaves a place empty.

    A row has at most ``columns`` panels, whose ``size`` is in inches.
    """
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=layout)
    panels = []
    for axes, cell in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, cells):
        if cell is None:
            axes.remove()
        else:
            panels.append((axes, cell))
    return figure, panels


def shorten(text: str, most: int = _MAX_LABEL) -> str:
    """Return text on one line with its middle left out beyond ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}\u2026{text[-(most // 3) :]}"


def short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Return a short form of every label; labels that would look the same are numbered."""
    short: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        text, count = shorten(label), sum(shorten(other) == shorten(label) for other in short)
        short[label] = f"{text} #{count + 1}" if count else text
    return short


def legend(axes: Axes, entries: Sequence[tuple[Artist, str]], place: Any) -> None:
    """Draw a legend of (artist, label) pairs, the last first; matplotlib itself may hide labels that begin with _."""
    drawn = axes.legend([artist for artist, _ in entries[::-1]], [" "] * len(entries), loc=place, handlelength=2.85)
    for text, (_, label) in zip(drawn.get_texts(), entries[::-1], strict=True):
        text.set_text(label)


def log_scale(axes: Axes, name: Literal["x", "y"], multiples: Sequence[float] = (1.0,)) -> None:
    """Make the x or y axis logarithmic, with plain numbers at ``multiples`` of powers of ten."""
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white"))
    return path


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG file with text as text and ids made of a name; the same figure gives the same file."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)


# ---- differences and trials


@styled
def draw_differences(frame: pd.DataFrame, goal: Goal = "min") -> Figure:
    """Draw a :func:`repa_lab.report.figure_data.differences_frame`: an arm's mean and 95 % interval on each line.

    What is resolved is coloured, by whether small or large values are good.
    """
    metrics, names = unique(frame, "metric"), short_labels(unique(frame, "arm"))
    most = int(frame.groupby("metric").size().max())
    # Labels take room beside the panel, whose own width must hold the label of its axis.
    width = 6.2 + _CHARACTER_INCHES * max(0, max(map(len, names.values())) - _WIDE_LABEL)
    figure, panels = canvas(metrics, 1, size=(width, 1.1 + _ROW_INCHES * most))
    for axes, metric in panels:
        rows = frame[frame["metric"] == metric]
        for place, (_, row) in enumerate(rows.iterrows()):
            is_better = (row["diff"] < 0) == (goal == "min")
            color = (_BETTER if is_better else _WORSE) if row["verdict"] == "resolved" else GREY
            if pd.notna(row["diff_low"]):
                axes.plot([row["diff_low"], row["diff_high"]], [-place, -place], color=color, lw=2.6)
            axes.plot([row["diff"]], [-place], color=color, marker="o", ms=8, mec="white")
            right = axes.get_yaxis_transform()
            axes.text(1.015, -place, row["verdict"], transform=right, fontsize=10, color=SOFT, va="center")
        axes.axvline(0, color=INK, lw=1.0, linestyle=DASHED, zorder=1)
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
    """Draw a :func:`repa_lab.report.figure_data.search_frame`: a point per trial, the best one marked.

    Each objective, with its goal ``min`` or ``max``, is drawn over the trials and along every searched setting.
    """
    values, names = _columns(frame, "value/"), ["trial", *_columns(frame, "param/")]
    columns = min(len(names), 3)
    blanks = [None] * (-len(names) % columns)  # every objective begins a row
    cells = [cell for value in values for cell in (*((value, name) for name in names), *blanks)]
    figure, panels = canvas(cells, columns, size=(6.2, 4.2) if columns == 1 else (4.4, 3.6))
    for axes, (value, name) in panels:
        _draw_slice(axes, frame, value, name, goals[value.removeprefix("value/")])
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
    """Draw every pair of objectives of a search against each other, with the Pareto front joined."""
    pairs = list(combinations(_columns(frame, "value/"), 2))
    figure, panels = canvas(pairs, len(pairs), size=(6.0 if len(pairs) == 1 else 4.6, 4.3))
    for axes, (first, second) in panels:
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


# ---- profiles of blocks


def profile_figure(
    profiles: Sequence[str | Path | RunDirectory | pd.DataFrame],
    metrics: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Draw heat maps of blocks by timesteps: a column per run and, for two runs, the second minus the first.

    Args:
        profiles: run directories that have a profile, or profiles that are loaded.
        metrics: a row for each; None takes :func:`repa_lab.report.figure_data.shown_metrics`.
        names: names of the runs in titles; None takes their ids.

    Raises:
        ResultsError: a run has no profile, or two were measured under different protocols.
    """
    frames = [profile if isinstance(profile, pd.DataFrame) else load_profile(profile) for profile in profiles]
    metrics = list(metrics or shown_metrics(frames))
    columns = [(name, frame.attrs) for name, frame in zip(names or map(run_id_of, frames), frames, strict=True)]
    titles = [
        f"{shorten(name)}, {at['protocol']['weights']} of step {at['protocol']['step']:,}" for name, at in columns
    ]
    titles += ["second less first"] * (len(frames) == 2)
    aligned = [frame.attrs["aligned_block"] for frame in frames]
    rows = [[profile_matrix(frame, metric) for frame in frames] for metric in metrics]
    blocks, times = rows[0][0].shape
    size = max(3.6, 1.9 + 0.52 * times) * len(titles), max(2.4, 1.1 + 0.27 * blocks) * len(rows)
    with mpl.rc_context(STYLE | _SMALL):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(rows), len(titles), squeeze=False)
        for line, matrices, metric in zip(grid, rows, metrics, strict=True):
            values = np.concatenate([matrix.to_numpy().ravel() for matrix in matrices])
            limits = float(values.min()), float(values.max())
            for axes, matrix, block in zip(line, matrices, aligned, strict=False):
                _draw_blocks(axes, matrix, block, limits)
            if len(frames) == 2:
                difference = profile_difference(frames[0], frames[1], metric)
                most = float(np.abs(difference.to_numpy()).max()) or 1.0
                _draw_blocks(line[-1], difference, aligned[1], (-most, most), is_difference=True)
            line[0].set_ylabel(f"{_METRICS.get(metric, metric)}\nblock")
            for axes, title in zip(line, titles, strict=True):
                axes.set(title=title, xlabel="timestep (1 is noise)")
    return figure


def _draw_blocks(
    axes: Axes,
    matrix: pd.DataFrame,
    aligned: int | str | None,
    limits: tuple[float, float],
    is_difference: bool = False,
) -> None:
    """Draw blocks by timesteps, mark the aligned block, and write the values into their cells, legible there."""
    values, times, blocks = matrix.to_numpy(dtype=float), list(matrix.columns), list(matrix.index)
    colors = "RdBu" if is_difference else "viridis"
    image = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    axes.set_yticks(range(len(blocks)), [f"{block} aligned" if block == aligned else str(block) for block in blocks])
    if aligned in blocks:
        place = blocks.index(aligned)
        frame: dict[str, Any] = {"fill": False, "ec": PALETTE[1], "lw": 2.2, "zorder": 4, "clip_on": False}
        axes.add_patch(Rectangle((-0.5, place - 0.5), len(times), 1, **frame))
        axes.get_yticklabels()[place].set_fontweight("bold")
    span = (limits[1] - limits[0]) or 1.0
    digits = 2 if span > _NARROW else 3
    for (row, column), value in np.ndenumerate(values) if values.size <= _MAX_CELLS else ():
        share = (value - limits[0]) / span
        is_dark = abs(share - 0.5) > 0.35 if is_difference else share < 0.55
        rounded = round(value, digits) + 0.0  # no minus sign before a zero
        text = f"{rounded:+.{digits}f}" if is_difference and rounded else f"{rounded:.{digits}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if is_dark else INK)
    axes.figure.colorbar(image, ax=axes, shrink=0.9)
