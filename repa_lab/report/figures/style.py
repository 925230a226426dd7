"""How figures look, and how they are kept: as PNG, and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
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

from repa_lab.files import replace_atomically

P = ParamSpec("P")
DPI = 150
PALETTE = ("#0b6fb8", "#d1570a", "#128a5f", "#a83a86", "#8a6d00", "#5b4bb5")
GREY = "#7d848c"
FAINT = "#cdd2d8"
INK = "#24292f"
SOFT = "#57606a"
STYLE: dict[Any, Any] = {
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
# The page's variables; what is not here, such as a mixed grey, is legible on light and dark alike.
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    "#6e7781": "--soft",
    "#9aa1a9": "--axis",
    "#e6e8eb": "--grid",
    FAINT: "--faint",
    "#ffffff": "--paper",
    **{hue: f"--series-{place}" for place, hue in enumerate(PALETTE)},
}


def styled(draw: Callable[Concatenate[pd.DataFrame, P], Figure]) -> Callable[Concatenate[pd.DataFrame, P], Figure]:
    """Draw under the report's style without touching the notebook's; a frame without rows is said, not an error."""

    @wraps(draw)
    def wrapped(frame: pd.DataFrame, /, *args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return _blank() if frame.empty else draw(frame, *args, **kwargs)

    return wrapped


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels, each of ``size`` (inches), row by row."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def blend(one: str, other: str, share: float) -> str:
    """A colour between two."""
    mixed = (1 - share) * np.array(to_rgb(one)) + share * np.array(to_rgb(other))
    return to_hex(tuple(mixed.tolist()))


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    options: dict[str, Any] = {"format": "png", "dpi": DPI, "facecolor": "white"}
    replace_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    return path


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element to stand in a page, with its text as text and the page's colours.

    Args:
        figure: what to draw.
        name: unlike that of any other figure of the page: it begins the ids.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", svg)
    svg = re.sub(r"(?<=[:\s])#[0-9a-f]{6}\b", lambda match: _variable(match[0]), svg)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).strip()


def _variable(color: str) -> str:
    return f"var({_VARIABLES[color]})" if color in _VARIABLES else color


def _blank() -> Figure:
    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, "Nothing to show: none of it has been measured yet.", ha="center", color=SOFT)
    return figure
