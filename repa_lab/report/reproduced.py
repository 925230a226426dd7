"""What `repa-lab reproduce` left beside a sweep's report, for notebooks: a paper's numbers and ours."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repa_lab.report.results import ResultsError

TEXT, VALUES = "reproduce.md", "reproduce.csv"
_PUBLISHED, _MEASURED = "#7d848c", "#0b6fb8"


class Reproduced(NamedTuple):
    """The tables and remarks as Markdown, the figure, and the frame that it shows: a row per arm and metric."""

    markdown: str
    figure: Figure
    frame: pd.DataFrame


def reproduction(path: str | Path) -> Reproduced:
    """What was measured beside what was published.

    Args:
        path: the folder of a sweep that `repa-lab reproduce` carried out.

    Raises:
        ResultsError: it did not, or its table cannot be read.
    """
    folder = Path(path)
    try:
        frame = pd.read_csv(folder / VALUES)
        return Reproduced((folder / TEXT).read_text(encoding="utf-8"), draw_reproduction(frame), frame)
    except FileNotFoundError:
        raise ResultsError(f"no {VALUES} in '{path}'; `repa-lab reproduce` lists the tables that can be made") from None
    except (KeyError, ValueError) as error:
        raise ResultsError(f"'{folder / VALUES}' cannot be read: {error!r}") from error


def draw_reproduction(frame: pd.DataFrame) -> Figure:
    """Published and measured values, each on its own axis: at the nano scale they are of different metrics.

    Args:
        frame: columns ``kind``, ``arm``, ``published``, ``metric``, ``measured``, ``low``, ``high``, ``n``.
    """
    kinds = list(frame["kind"].unique())
    heights = [1.2 + 0.35 * int((frame["kind"] == kind).sum()) for kind in kinds]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharey="row", height_ratios=heights)
    for (left, right), kind in zip(panels, kinds, strict=True):
        rows = frame[frame["kind"] == kind]
        places = np.arange(len(rows))[::-1]
        left.scatter(rows["published"], places, color=_PUBLISHED, zorder=3)
        left.set(title="published", xlabel=kind)
        left.set_yticks(places, rows["arm"])
        left.margins(y=0.15)
        _measured(right, rows, places)
    return figure


def _measured(axes: Axes, rows: pd.DataFrame, places: np.ndarray) -> None:
    axes.hlines(places, rows["low"], rows["high"], color=_MEASURED, lw=2)
    axes.scatter(rows["measured"], places, color=_MEASURED, zorder=3)
    axes.set(title=f"measured, n = {rows['n'].max()}, 95 % t intervals", xlabel=rows["metric"].iloc[0])
