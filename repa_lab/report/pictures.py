"""The figures of a report: drawn once as PNG for Markdown and LaTeX, and panel by panel as SVG for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from repa_lab.report import figures
from repa_lab.report.profile import profile_figures
from repa_lab.report.progress import Axis
from repa_lab.report.results import Results, ResultsError
from repa_lab.report.search import objectives, search_frame
from repa_lab.runs import RunsRoot

_MOST_PANELS = 24


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        section: where it stands: ``convergence``, ``alignment``, ``differences``, ``search`` or ``profiles``.
        title: what it shows.
        caption: what its lines and bands are.
        path: the PNG; ``link`` leads to it from the sweep's folder.
        link: see ``path``.
        panels: the same as ``<svg>`` elements, each to be laid out by itself.
    """

    section: str
    title: str
    caption: str
    path: Path
    link: str
    panels: tuple[str, ...]


def draw_pictures(results: Results, root: RunsRoot, folder: Path) -> list[Picture]:
    """Every figure that there is data for, written into the ``figures`` of a sweep's folder."""
    drawn = [
        *_differences(results),
        *_convergence(results),
        *_alignment(results),
        *_search(results),
        *_profiles(results, root),
    ]
    return [_kept(draft, folder) for draft in drawn]


@dataclass(frozen=True)
class _Draft:
    section: str
    name: str
    title: str
    caption: str
    whole: Figure
    panels: tuple[Figure, ...]


def _kept(draft: _Draft, folder: Path) -> Picture:
    link = f"figures/{draft.name}.png"
    path = figures.save(draft.whole, folder / link)
    panels = tuple(figures.to_svg(panel, f"{draft.name}-{place}") for place, panel in enumerate(draft.panels))
    return Picture(draft.section, draft.title, draft.caption, path, link, panels)


def _differences(results: Results) -> Iterator[_Draft]:
    frame = figures.differences_frame(results)
    if len(frame) > 1:  # one arm's difference is the answer's sentence
        whole = figures.draw_differences(frame, results.goal)
        caption = "Point: mean paired difference. Line: its 95 % Student-t interval. Coloured: resolved among all comparisons."
        yield _Draft("differences", "differences", "Differences to the baseline", caption, whole, (whole,))


def _convergence(results: Results) -> Iterator[_Draft]:
    for axis in results.axes:
        frame = figures.convergence_frame(results, axis)
        if not frame["mean"].isna().all():
            yield _curves(
                "convergence", axis.label, frame, _drawer(results, axis), "" if axis.name == "step" else f"_{axis.name}"
            )


def _drawer(results: Results, axis: Axis) -> Callable[[pd.DataFrame, bool], Figure]:
    return lambda frame, captioned: figures.draw_convergence(frame, results.goal, axis, captioned)


def _alignment(results: Results) -> Iterator[_Draft]:
    frame = figures.alignment_frame(results)
    if not frame["mean"].isna().all():
        title = "Alignment on held-out images"
        yield _curves("alignment", title, frame, figures.draw_alignment, "")


def _curves(
    section: str, title: str, frame: pd.DataFrame, draw: Callable[[pd.DataFrame, bool], Figure], suffix: str
) -> _Draft:
    rows = [panel for panel in figures.panels(frame) if panel["mean"].notna().any()][:_MOST_PANELS]
    panels = tuple(draw(panel, False) for panel in rows)
    return _Draft(section, section + suffix, title, figures.caption(frame), draw(frame, True), panels)


def _search(results: Results) -> Iterator[_Draft]:
    frame, goals = search_frame(results), dict(objectives(results))
    values = [f"value/{metric}" for metric in goals]
    if frame.empty or frame[values].isna().all(axis=None) or not any(name.startswith("param/") for name in frame):
        return
    slices = figures.draw_slices(frame, goals)
    caption = (
        "A point for each trial; faint ones did not complete. Star: the best completed one; line: the best so far."
    )
    title = "The objective over the trials, and along every searched setting"
    yield _Draft("search", "search", title, caption, slices, (slices,))
    if len(goals) > 1:
        front = figures.draw_pareto(frame)
        caption = "A point for each trial; joined: the trials of which none is better in every objective."
        yield _Draft("search", "pareto", "Objectives against each other", caption, front, (front,))


def _profiles(results: Results, root: RunsRoot) -> Iterator[_Draft]:
    try:
        for place, (title, figure) in enumerate(profile_figures(results, root)):
            caption = "Layers by timesteps, as `repa-lab profile` measured them."
            yield _Draft("profiles", f"profile_{place}", title, caption, figure, (figure,))
    except ResultsError:  # a damaged profile: `repa-lab profile` says so, and the curves do not depend on it
        return
