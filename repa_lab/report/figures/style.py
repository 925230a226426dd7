"""The style of figures: colours, labels and legends, and writing as PNG or as SVG with the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from repa_lab.files import replace_atomically
from repa_lab.report.figure_data import INK, SOFT

P = ParamSpec("P")
DPI = 150
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # labels are the user's words: a dollar sign is a dollar sign
    "text.usetex": False,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.solid_capstyle": "round",
}
MAX_LABEL = 36  # characters of an arm's label in a figure


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


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row; ``size`` is that of one panel in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def blend(first: str, second: str, share: float) -> str:
    """Return a colour between two; ``share`` is the weight of the second."""
    mixed = (1 - share) * np.array(to_rgb(first)) + share * np.array(to_rgb(second))
    return to_hex(tuple(mixed.tolist()))


def shorten(text: str, most: int = MAX_LABEL) -> str:
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
    options: dict[str, Any] = {"format": "png", "dpi": DPI, "facecolor": "white"}
    replace_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    return path


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG file with text as text; the same figure gives the same file.

    Args:
        name: what its ids are made of.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
