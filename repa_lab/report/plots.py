"""For notebooks: each helper draws one thing, and returns the figure with the frame that it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from repa_lab.report import figures
from repa_lab.report.profile import load_profile, profile_figures
from repa_lab.report.reproduced import reproduction
from repa_lab.report.results import Results, ResultsError, load_results, root_of
from repa_lab.report.search import objectives, search_frame
from repa_lab.report.statistics import Goal
from repa_lab.runs import profiles

__all__ = ["Drawn", "Profiles", "alignment", "convergence", "layers", "quality", "reproduction", "search"]


class Drawn(NamedTuple):
    """A figure, and the tidy frame that it shows."""

    figure: Figure
    frame: pd.DataFrame


class Profiles(NamedTuple):
    """Heat maps of blocks by timesteps, by caption, and the rows of all profiles that there are."""

    figures: dict[str, Figure]
    frame: pd.DataFrame


def convergence(results: Results) -> Drawn:
    """The compared metric of every arm over optimizer steps; see :func:`repa_lab.report.figures.convergence_frame`.

    Raises:
        ResultsError: of several sweeps, some take small values of their metric for good, and some large ones.
    """
    frame = _of_each(results, figures.convergence_frame)
    return Drawn(figures.draw_convergence(frame, _goal(results)), frame)


def alignment(results: Results) -> Drawn:
    """Agreement with the encoder on held-out images over steps; see :func:`repa_lab.report.figures.alignment_frame`."""
    frame = _of_each(results, figures.alignment_frame)
    return Drawn(figures.draw_alignment(frame), frame)


def quality(results: Results) -> Drawn:
    """The compared metric against agreement with the encoder; see :func:`repa_lab.report.figures.quality_frame`."""
    frame = _of_each(results, figures.quality_frame)
    return Drawn(figures.draw_quality(frame), frame)


def search(results: Results) -> Drawn:
    """The trials of one sweep's search; see :func:`repa_lab.report.search.search_frame`.

    Raises:
        ResultsError: the sweep is no search, or there are several.
    """
    goals = dict(objectives(results))
    if not goals:
        raise ResultsError(f"sweep {results.name} is no search: its spec has no search section")
    frame = search_frame(results)
    return Drawn(figures.draw_slices(frame, goals), frame)


def layers(path: str | Path) -> Profiles:
    """What the blocks of a sweep's runs know of the encoder; see :func:`repa_lab.report.profile.profile_figures`.

    Args:
        path: the sweep's folder.

    Raises:
        ResultsError: no run of the sweep has a profile.
    """
    results, root = load_results(path), root_of(path)
    runs = [root.run(run_id) for run_id in results.runs["run_id"].unique()]
    found = [load_profile(run) for run in runs if profiles.path_of(run).is_file()]
    if not found:
        raise ResultsError(
            f"no run of {results.name} has a profile; make some with `repa-lab profile {runs[0].run_id} ...`"
        )
    return Profiles(dict(profile_figures(results, root)), pd.concat(found, ignore_index=True))


def _of_each(results: Results, make: Callable[[Results], pd.DataFrame]) -> pd.DataFrame:
    """The frame of one sweep, or those of several under each other with the sweep in the names of groups and arms."""
    if len(results.sweeps) == 1:
        return make(results)
    frames = [(sweep["name"], make(results.only(sweep["name"]))) for sweep in results.sweeps]
    named = [frame.assign(**{key: f"{name}, " + frame[key] for key in ("group", "arm")}) for name, frame in frames]
    return pd.concat([frame for frame in named if not frame.empty] or named, ignore_index=True)


def _goal(results: Results) -> Goal:
    goals = {results.only(sweep["name"]).goal for sweep in results.sweeps}
    if len(goals) > 1:
        raise ResultsError(f"{results.name}: their metrics improve in opposite directions; take one with .only(name)")
    return goals.pop()
