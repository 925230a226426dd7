"""Figures for notebooks: each function returns a figure together with the frame that it shows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repa_lab.report import figures
from repa_lab.report.figure_data import GREY, PALETTE, SOFT
from repa_lab.report.figures.style import STYLE, short_labels
from repa_lab.report.profile import load_profile, shown_profiles
from repa_lab.report.published import TEXT, VALUES
from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.report.search import objectives, search_frame

__all__ = ["Drawn", "Profiles", "Reproduced", "alignment", "convergence", "layers", "quality", "reproduction", "search"]

_CAPTION_CHARACTERS = 14  # per inch


class Drawn(NamedTuple):
    """A figure, and the tidy frame that it shows."""

    figure: Figure
    frame: pd.DataFrame


class Profiles(NamedTuple):
    """Heat maps of blocks by timesteps, by caption, and the rows of all profiles."""

    figures: dict[str, Figure]
    frame: pd.DataFrame


class Reproduced(NamedTuple):
    """The tables and remarks as Markdown, the figure, and the frame that it shows: a row per arm and metric."""

    markdown: str
    figure: Figure
    frame: pd.DataFrame


def convergence(results: Results) -> Drawn:
    """Draw the compared metric of every arm over steps; see :func:`repa_lab.report.figures.convergence_frame`.

    Raises:
        ResultsError: the metrics of several sweeps improve in opposite directions.
    """
    frame = _combined(results, figures.convergence_frame)
    goals = {results.only(sweep.name).goal for sweep in results.sweeps}
    if len(goals) > 1:
        raise ResultsError(f"{results.name}: their metrics improve in opposite directions; take one with .only(name)")
    return Drawn(_explained(figures.draw_convergence(frame, goals.pop()), frame), frame)


def alignment(results: Results) -> Drawn:
    """Draw alignment on held-out images over steps; see :func:`repa_lab.report.figures.alignment_frame`."""
    frame = _combined(results, figures.alignment_frame)
    return Drawn(_explained(figures.draw_alignment(frame), frame), frame)


def quality(results: Results) -> Drawn:
    """Draw the compared metric against alignment; see :func:`repa_lab.report.figures.quality_frame`."""
    frame = _combined(results, figures.quality_frame)
    return Drawn(figures.draw_quality(frame), frame)


def search(results: Results) -> Drawn:
    """Draw the trials of one sweep's search; see :func:`repa_lab.report.search.search_frame`.

    Raises:
        ResultsError: the sweep is no search, or there are several sweeps.
    """
    goals = dict(objectives(results))
    if not goals:
        raise ResultsError(f"sweep {results.name} is no search: its spec has no search section")
    frame = search_frame(results)
    return Drawn(figures.draw_slices(frame, goals), frame)


def layers(path: str | Path) -> Profiles:
    """Draw the profiles of a sweep's runs; see :func:`repa_lab.report.profile.shown_profiles`.

    Args:
        path: the sweep's folder.

    Raises:
        ResultsError: no run of the sweep has a profile.
    """
    results = load_results(path)
    runs = list({member.run_id: member.reader.run for member in results.members}.values())
    frames = [load_profile(run) for run in runs if run.profile_file.is_file()]
    if not frames:
        hint = f"make some with `repa-lab profile {runs[0].run_id} ...`"
        raise ResultsError(f"no run of {results.name} has a profile; {hint}")
    drawn = {title: figures.profile_figure(shown, names=names) for title, shown, names in shown_profiles(results)}
    return Profiles(drawn, pd.concat(frames, ignore_index=True))


def reproduction(path: str | Path) -> Reproduced:
    """Draw measured values beside published ones.

    Args:
        path: the folder of a sweep that `repa-lab reproduce` has run.

    Raises:
        ResultsError: `repa-lab reproduce` left no table there, or the table cannot be read.
    """
    folder = Path(path)
    try:
        frame = pd.read_csv(folder / VALUES)
        return Reproduced((folder / TEXT).read_text(encoding="utf-8"), _draw_reproduction(frame), frame)
    except FileNotFoundError:
        raise ResultsError(f"no {VALUES} in '{path}'; `repa-lab reproduce` lists the tables that can be made") from None
    except (KeyError, ValueError) as error:
        raise ResultsError(f"'{folder / VALUES}' cannot be read: {error!r}") from error


def _draw_reproduction(frame: pd.DataFrame) -> Figure:
    """Draw published and measured values, each on its own axis: at the nano scale they are different metrics."""
    kinds, names = list(frame["kind"].unique()), short_labels(list(map(str, frame["arm"])))
    heights = [1.2 + 0.35 * int((frame["kind"] == kind).sum()) for kind in kinds]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
        panels = figure.subplots(len(kinds), 2, squeeze=False, sharey="row", height_ratios=heights)
        for (left, right), kind in zip(panels, kinds, strict=True):
            rows = frame[frame["kind"] == kind]
            places = np.arange(len(rows))[::-1]
            left.scatter(rows["published"], places, color=GREY, zorder=3)
            left.set(title="published", xlabel=kind)
            left.set_yticks(places, [names[str(arm)] for arm in rows["arm"]])
            left.margins(y=0.15)
            right.hlines(places, rows["low"], rows["high"], color=PALETTE[0], lw=2)
            right.scatter(rows["measured"], places, color=PALETTE[0], zorder=3)
            title = f"measured, n = {rows['n'].max()}, 95 % t intervals"
            right.set(title=title, xlabel=rows["metric"].iloc[0])
    return figure


def _explained(figure: Figure, frame: pd.DataFrame) -> Figure:
    """Write what lines and bands are below the curves."""
    if not frame.empty:
        text = textwrap.fill(figures.caption(frame), int(_CAPTION_CHARACTERS * figure.get_figwidth()))
        figure.supxlabel(text, x=0.012, ha="left", multialignment="left", fontsize=9, color=SOFT)
    return figure


def _combined(results: Results, make: Callable[[Results], pd.DataFrame]) -> pd.DataFrame:
    """Return the frame of one sweep, or those of several with the sweep's name before groups and arms."""
    if len(results.sweeps) == 1:
        return make(results)
    frames = [(sweep.name, make(results.only(sweep.name))) for sweep in results.sweeps]
    named = [frame.assign(**{key: f"{name}, " + frame[key] for key in ("group", "arm")}) for name, frame in frames]
    return pd.concat([frame for frame in named if not frame.empty] or named, ignore_index=True)
