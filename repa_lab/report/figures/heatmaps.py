"""Heat maps of the blocks of a denoiser by timesteps; see :mod:`repa_lab.report.profile`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from repa_lab.report.figure_data import INK, PALETTE
from repa_lab.report.figures.style import STYLE, shorten
from repa_lab.report.profile import load_profile, profile_difference, profile_matrix, run_id_of, shown_metrics
from repa_lab.runs import RunDirectory

LABELS = {
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


@dataclass(frozen=True)
class _Panel:
    """A heat map: blocks by timesteps, the title, and the aligned block if there is one."""

    matrix: pd.DataFrame
    title: str
    aligned: int | str | None
    is_difference: bool = False


def profile_figure(
    runs: Sequence[str | Path | RunDirectory], metrics: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Draw heat maps of blocks by timesteps: a column per run and, for two runs, the second minus the first.

    Args:
        runs: run directories that have a profile.
        metrics: a row for each; None takes :func:`shown_metrics`.
        names: names of the runs in titles; None takes their ids.

    Raises:
        ResultsError: a run has no profile, or two were measured under different protocols.
    """
    return draw_profiles([load_profile(run) for run in runs], metrics, names)


def draw_profiles(
    frames: Sequence[pd.DataFrame], metrics: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Draw profiles from :func:`repa_lab.report.profile.load_profile`; see :func:`profile_figure`."""
    shown = list(metrics or shown_metrics(frames))
    titles = []
    for frame, name in zip(frames, names or map(run_id_of, frames), strict=True):
        protocol = frame.attrs["protocol"]
        titles.append(f"{shorten(name)}, {protocol['weights']} of step {protocol['step']:,}")
    rows = [_panels(frames, metric, titles) for metric in shown]
    with mpl.rc_context(STYLE | _SMALL):
        return _draw(rows, shown)


def _panels(frames: Sequence[pd.DataFrame], metric: str, titles: Sequence[str]) -> list[_Panel]:
    pairs = zip(frames, titles, strict=True)
    panels = [_Panel(profile_matrix(frame, metric), title, frame.attrs["aligned_block"]) for frame, title in pairs]
    if len(frames) == 2:
        aligned = frames[1].attrs["aligned_block"]
        panels.append(_Panel(profile_difference(frames[0], frames[1], metric), "second less first", aligned, True))
    return panels


def _draw(rows: Sequence[Sequence[_Panel]], metrics: Sequence[str]) -> Figure:
    blocks, times = rows[0][0].matrix.shape
    size = max(3.6, 1.9 + 0.52 * times) * len(rows[0]), max(2.4, 1.1 + 0.27 * blocks) * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, panels, metric in zip(grid, rows, metrics, strict=True):
        values = np.concatenate([panel.matrix.to_numpy().ravel() for panel in panels if not panel.is_difference])
        for axes, panel in zip(line, panels, strict=True):
            most = float(np.abs(panel.matrix.to_numpy()).max()) or 1.0
            limits = (-most, most) if panel.is_difference else (float(values.min()), float(values.max()))
            _draw_panel(axes, panel, limits)
        line[0].set_ylabel(f"{LABELS.get(metric, metric)}\nblock")
    return figure


def _draw_panel(axes: Axes, panel: _Panel, limits: tuple[float, float]) -> None:
    matrix = panel.matrix.to_numpy(dtype=float)
    colors = "RdBu" if panel.is_difference else "viridis"
    image = axes.imshow(matrix, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    times, blocks = list(panel.matrix.columns), list(panel.matrix.index)
    axes.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    labels = [f"{block} aligned" if block == panel.aligned else str(block) for block in blocks]
    axes.set_yticks(range(len(blocks)), labels)
    axes.set(title=panel.title, xlabel="timestep (1 is noise)")
    _draw_numbers(axes, matrix, limits, panel.is_difference)
    if panel.aligned in blocks:
        place = blocks.index(panel.aligned)
        frame: dict[str, Any] = {"fill": False, "ec": PALETTE[1], "lw": 2.2, "zorder": 4, "clip_on": False}
        axes.add_patch(Rectangle((-0.5, place - 0.5), len(times), 1, **frame))
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)


def _draw_numbers(axes: Axes, matrix: np.ndarray[Any, Any], limits: tuple[float, float], signed: bool) -> None:
    """Write the values into their cells, in a colour that is legible there."""
    if matrix.size > _MAX_CELLS:
        return
    span = (limits[1] - limits[0]) or 1.0
    digits = 2 if span > _NARROW else 3
    for (row, column), value in np.ndenumerate(matrix):
        share = (value - limits[0]) / span
        is_dark = abs(share - 0.5) > 0.35 if signed else share < 0.55
        rounded = round(value, digits) + 0.0  # no minus sign before a zero
        text = f"{rounded:+.{digits}f}" if signed and rounded else f"{rounded:.{digits}f}"
        color = "white" if is_dark else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
