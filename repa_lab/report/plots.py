"""Figures for notebooks: each function returns a figure together with the frame that it shows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from repa_lab.report import curves, figure_data, figures
from repa_lab.report.figure_data import GREY, PALETTE, SOFT
from repa_lab.report.figures import STYLE, short_labels
from repa_lab.report.published import TEXT, VALUES
from repa_lab.report.results import Results, ResultsError, load_results

__all__ = ["Drawn", "alignment", "convergence", "layers", "quality", "reproduction", "search"]

_CAPTION_CHARACTERS = 14  # per inch


class Drawn(NamedTuple):
    """A figure, and the tidy frame that it shows."""

    figure: Figure
    frame: pd.DataFrame


def convergence(results: Results) -> Drawn:
    """Draw the compared metric of every arm over steps; see :func:`repa_lab.report.figure_data.convergence_frame`.

    Raises:
        ResultsError: the metrics of several sweeps improve in opposite directions.
    """
    goals = {sweep.compare.goal for sweep in results.sweeps}
    if len(goals) > 1:
        raise ResultsError(f"{results.name}: their metrics improve in opposite directions; take one with .only(name)")
    frame = _combined(results, figure_data.convergence_frame)
    return Drawn(_explained(curves.draw_convergence(frame, goals.pop()), frame), frame)


def alignment(results: Results) -> Drawn:
    """Draw alignment on held-out images over steps; see :func:`repa_lab.report.figure_data.alignment_frame`."""
    frame = _combined(results, figure_data.alignment_frame)
    return Drawn(_explained(curves.draw_alignment(frame), frame), frame)


def quality(results: Results) -> Drawn:
    """Draw the compared metric against alignment; see :func:`repa_lab.report.figure_data.quality_frame`."""
    frame = _combined(results, figure_data.quality_frame)
    return Drawn(curves.draw_quality(frame), frame)


def search(results: Results) -> Drawn:
    """Draw the trials of one sweep's search; see :func:`repa_lab.report.figure_data.search_frame`.

    Raises:
        ResultsError: the sweep is no search, or there are several sweeps.
    """
    if not results.objectives:
        raise ResultsError(f"sweep {results.name} is no search: its spec has no search section")
    frame = figure_data.search_frame(results)
    return Drawn(figures.draw_slices(frame, results.objectives), frame)


def layers(path: str | Path) -> tuple[dict[str, Figure], pd.DataFrame]:
    """Draw the profiles of the runs in a sweep's folder; see :func:`repa_lab.report.figure_data.shown_profiles`.

    Returns:
        Heat maps of blocks by timesteps, by caption, and the rows of all profiles.

    Raises:
        ResultsError: no run of the sweep has a profile.
    """
    results = load_results(path)
    profiles = [frame for by_seed in figure_data.load_profiles(results).values() for frame in by_seed.values()]
    if not profiles:
        hint = f"make some with `repa-lab profile {results.members[0].run_id} ...`"
        raise ResultsError(f"no run of {results.name} has a profile; {hint}")
    shown = figure_data.shown_profiles(results)
    drawn = {title: figures.profile_figure(frames, names=names) for title, frames, names in shown}
    # A run that several arms share is there once.
    each_run = {figure_data.run_id_of(frame): frame for frame in profiles}.values()
    return drawn, pd.concat(each_run, ignore_index=True)


def reproduction(path: str | Path) -> tuple[str, Figure, pd.DataFrame]:
    """Draw measured values beside published ones, from the folder of a sweep that `repa-lab reproduce` has run.

    Returns:
        The tables and remarks as Markdown, the figure, and the frame that it shows: a row per arm and metric.

    Raises:
        ResultsError: `repa-lab reproduce` left no table there, or the table cannot be read.
    """
    folder = Path(path)
    try:
        frame = pd.read_csv(folder / VALUES)
        return (folder / TEXT).read_text(encoding="utf-8"), _draw_reproduction(frame), frame
    except FileNotFoundError:
        raise ResultsError(f"no {VALUES} in '{path}'; `repa-lab reproduce` lists the tables that can be made") from None
    except (KeyError, ValueError) as error:
        raise ResultsError(f"'{folder / VALUES}' cannot be read: {error!r}") from error


def _draw_reproduction(frame: pd.DataFrame) -> Figure:
    """Draw published and measured values, each on its own axis: at the nano scale they are different metrics."""
    kinds, names = dict(list(frame.groupby("kind", sort=False))), short_labels(list(map(str, frame["arm"])))
    heights = [1.2 + 0.35 * len(rows) for rows in kinds.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
        panels = figure.subplots(len(kinds), 2, squeeze=False, sharey="row", height_ratios=heights)
        for (left, right), (kind, rows) in zip(panels, kinds.items(), strict=True):
            places = range(len(rows))[::-1]
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
        text = textwrap.fill(figure_data.caption(frame), int(_CAPTION_CHARACTERS * figure.get_figwidth()))
        figure.supxlabel(text, x=0.012, ha="left", multialignment="left", fontsize=9, color=SOFT)
    return figure


def _combined(results: Results, make: Callable[[Results], pd.DataFrame]) -> pd.DataFrame:
    """Return the frame of one sweep, or those of several with the sweep's name before groups and arms."""
    if len(results.sweeps) == 1:
        return make(results)
    frames = [(sweep.name, make(results.only(sweep.name))) for sweep in results.sweeps]
    named = [frame.assign(**{key: f"{name}, " + frame[key] for key in ("group", "arm")}) for name, frame in frames]
    return pd.concat([frame for frame in named if not frame.empty] or named, ignore_index=True)
