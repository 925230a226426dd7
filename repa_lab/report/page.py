"""The report on a sweep: ``report.md``, ``report.tex``, ``figures/*.png`` and a self-contained ``report.html``."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from repa_lab.report import figures, tables, text
from repa_lab.report.profile import profile_figure, shown_profiles
from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.report.search import MIN_TRIALS, importance_frame, objectives, ordered_trials, search_frame
from repa_lab.runs import RunsRoot, RunStatus, SweepDirectory, files

_SECTIONS = ("differences", "convergence", "alignment", "search", "profiles")
_MAX_PANELS = 24
_MAX_ARMS, _MAX_STEPS = 12, 5  # of a sheet of samples
_MAX_PIXELS, _MAX_PNG_BYTES = 640, 60_000  # of an embedded image


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report; ``figures`` holds the figures that there was data for."""

    markdown: Path
    latex: Path
    html: Path
    figures: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, the page first."""
        return (self.html, self.markdown, self.latex, *self.figures)


def write_report(sweep: SweepDirectory) -> ReportPaths:
    """Write the report on everything that the sweep's runs have measured so far; every file is replaced whole.

    Raises:
        ResultsError: the sweep was never recorded, or its ``sweep.json`` cannot be read. Files of its runs that cannot
            be read, and figures that cannot be drawn, are left out and named in the report.
    """
    results = load_results(sweep.path)
    pictures, failures = draw_pictures(results, sweep.root, sweep.path)
    content = _content(results, sweep, pictures, failures)
    paths = {kind: sweep.path / f"report.{kind}" for kind in ("md", "tex", "html")}
    for kind, path in paths.items():
        environment = Environment(
            loader=PackageLoader("repa_lab.report"),
            autoescape=kind == "html",
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["latex"] = tables.latex
        files.write_text(path, environment.get_template(f"report.{kind}.j2").render(content))
    return ReportPaths(paths["md"], paths["tex"], paths["html"], tuple(picture.path for picture in pictures))


def _content(results: Results, sweep: SweepDirectory, pictures: list[Picture], failures: list[str]) -> dict[str, Any]:
    return {
        "name": results.name,
        "question": results.question,
        "lead": text.lead(results),
        "facts": _facts(results),
        "conclusions": text.conclusions(results),
        "incomplete": text.incomplete(results),
        "exclusions": [*text.exclusions(results), *failures],
        "pictures": {name: [picture for picture in pictures if picture.section == name] for name in _SECTIONS},
        "summary": tables.summary_tables(results),
        "others": tables.summary_tables(results, compared=False),
        "targets": tables.targets_tables(results),
        "trials": tables.trials_table(results),
        "importance": tables.importance_table(importance_frame(results)),
        "least_trials": MIN_TRIALS,
        "sheets": sheets(results, sweep.path),
        "costs": tables.cost_table(results),
        "runs": tables.runs_table(results),
        "settings": tables.settings_table(results),
        "methods": text.methods(results),
        "protocols": tables.protocols_table(results),
        "provenance": tables.provenance_table(results),
    }


def _facts(results: Results) -> list[tuple[str, str]]:
    """Return the size of the sweep in numbers."""
    runs = results.runs.drop_duplicates("run_id")
    hours = tables.cost_frame(results)["hours/training"]
    ended = int(runs["state"].isin([status.value for status in RunStatus if status.is_over]).sum())
    facts = [("arms", str(results.runs["arm"].nunique())), ("seeds", str(results.runs["seed"].nunique()))]
    facts.append(("runs ended", f"{ended} of {len(runs)}"))
    return facts if hours.isna().all() else [*facts, ("device hours", tables.significant(float(hours.sum())))]


# ---- figures


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        section: ``differences``, ``convergence``, ``alignment``, ``search`` or ``profiles``.
        title: what the figure shows.
        caption: explains lines, bands and points.
        path: the PNG.
        link: path of the PNG relative to the sweep's folder.
        panels: the same as ``<svg>`` elements, each to be laid out by itself.
    """

    section: str
    title: str
    caption: str
    path: Path
    link: str
    panels: tuple[str, ...]


@dataclass(frozen=True)
class _Draft:
    """A figure to be drawn: ``draw`` returns the whole and its panels; no panels stand for the whole."""

    section: str
    name: str
    title: str
    caption: str
    draw: Callable[[], tuple[Figure, list[Figure]]]


def draw_pictures(results: Results, root: RunsRoot, folder: Path) -> tuple[list[Picture], list[str]]:
    """Draw every figure that there is data for.

    Args:
        results: of one sweep.
        root: the runs root.
        folder: the sweep's folder; the PNGs are written to ``figures`` in it.

    Returns:
        The pictures, and a line for every figure that could not be drawn.
    """
    pictures, failures = [], []
    drafts = [draft for make in (_differences, _convergence, _alignment, _search) for draft in make(results)]
    try:
        drafts += _profiles(results, root)
    except ResultsError as error:
        failures.append(f"Layer profiles are not shown: {error}.")
    for draft in drafts:
        link = f"figures/{draft.name}.png"
        try:
            whole, panels = draft.draw()
            path = figures.save(whole, folder / link)
            svgs = [figures.to_svg(panel, f"{draft.name}-{place}") for place, panel in enumerate(panels or [whole])]
            pictures.append(Picture(draft.section, draft.title, draft.caption, path, link, tuple(svgs)))
        except Exception as error:  # the rest of the report does not depend on a figure
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            failures.append(f"The figure '{draft.section}: {draft.title}' could not be drawn ({reason}).")
    return pictures, failures


def _differences(results: Results) -> Iterator[_Draft]:
    frame = figures.differences_frame(results)
    if len(frame) > 1:  # the difference of a single arm is the answer's sentence
        caption = (
            "Point: mean paired difference. Line: 95 % Student-t interval. Coloured: resolved among all comparisons."
        )
        draw = partial(_alone, figures.draw_differences, frame, results.goal)
        yield _Draft("differences", "differences", "Differences to the baseline", caption, draw)


def _convergence(results: Results) -> Iterator[_Draft]:
    for axis in results.axes:
        frame = figures.convergence_frame(results, axis)
        if not frame["mean"].isna().all():
            name = "convergence" if axis.name == "step" else f"convergence_{axis.name}"
            draw = partial(_with_panels, figures.draw_convergence, frame, goal=results.goal, axis=axis)
            yield _Draft("convergence", name, axis.label, figures.caption(frame), draw)


def _alignment(results: Results) -> Iterator[_Draft]:
    frame = figures.alignment_frame(results)
    if not frame["mean"].isna().all():
        draw = partial(_with_panels, figures.draw_alignment, frame)
        yield _Draft("alignment", "alignment", "Alignment on held-out images", figures.caption(frame), draw)


def _search(results: Results) -> Iterator[_Draft]:
    frame, goals = search_frame(results), dict(objectives(results))
    values = [f"value/{metric}" for metric in goals]
    if frame.empty or frame[values].isna().all(axis=None) or not any(name.startswith("param/") for name in frame):
        return
    title = "The objective over the trials, and along every searched setting"
    caption = (
        "A point for each trial; faint ones did not complete. Star: the best completed one; line: the best so far."
    )
    yield _Draft("search", "search", title, caption, partial(_alone, figures.draw_slices, frame, goals))
    if len(goals) > 1:
        caption = "A point for each trial; joined: the Pareto front."
        draw = partial(_alone, figures.draw_pareto, frame)
        yield _Draft("search", "pareto", "Objectives against each other", caption, draw)


def _profiles(results: Results, root: RunsRoot) -> list[_Draft]:
    caption = "Layers by timesteps, as `repa-lab profile` measured them."
    return [
        _Draft("profiles", f"profile_{place}", title, caption, partial(_alone, profile_figure, runs, names=names))
        for place, (title, runs, names) in enumerate(shown_profiles(results, root))
    ]


def _alone(draw: Callable[..., Figure], *args: Any, **options: Any) -> tuple[Figure, list[Figure]]:
    return draw(*args, **options), []


def _with_panels(draw: Callable[..., Figure], frame: pd.DataFrame, **options: Any) -> tuple[Figure, list[Figure]]:
    panels = [panel for panel in figures.panels(frame) if panel["mean"].notna().any()][:_MAX_PANELS]
    return draw(frame, **options), [draw(panel, captioned=False, **options) for panel in panels]


# ---- samples


@dataclass(frozen=True)
class Sample:
    """A grid of samples; ``link`` is its path relative to the sweep's folder."""

    path: Path
    link: str

    @cached_property
    def data(self) -> str | None:
        """The image as a data URI, no wider than the page has room for; None if the file is damaged."""
        try:
            with Image.open(self.path) as image:
                image.load()
                return _data_uri(image)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files
            return None


def _data_uri(image: Image.Image) -> str:
    if image.width > _MAX_PIXELS:
        size = (_MAX_PIXELS, round(image.height * _MAX_PIXELS / image.width))
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    kind, content = "png", io.BytesIO()
    image.save(content, format="PNG")
    if len(content.getvalue()) > _MAX_PNG_BYTES:
        kind, content = "jpeg", io.BytesIO()
        image.convert("RGB").save(content, format="JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


@dataclass(frozen=True)
class Sheet:
    """The sample grids of arms that share a baseline, arms below each other, training from left to right.

    Attributes:
        seed: the seed of every run in it.
        steps: the columns.
        rows: by arm, a sample for each step, None where the run has none.
        left_out: number of arms that are not shown.
    """

    seed: int
    steps: tuple[int, ...]
    rows: Mapping[str, tuple[Sample | None, ...]]
    left_out: int


def sheets(results: Results, folder: Path) -> list[Sheet]:
    """Return a sheet for every group of arms that share a baseline; arms of a search are in the order of their trials.

    Args:
        results: of one sweep.
        folder: the sweep's folder, to which links are relative.
    """
    order = {trial.arm: place for place, trial in enumerate(ordered_trials(results))}
    groups: dict[str, list[str]] = {}
    for arm, baseline in results.baselines.items():
        is_baseline = arm in results.baselines.values()
        groups.setdefault(baseline or (arm if is_baseline else ""), []).append(arm)
    made = (_sheet(sorted(arms, key=lambda arm: order.get(arm, -1)), results, folder) for arms in groups.values())
    return [sheet for sheet in made if sheet is not None]


def _sheet(arms: list[str], results: Results, folder: Path) -> Sheet | None:
    grids: dict[str, dict[int, dict[int, Path]]] = {}  # by arm, seed and step
    for arm in arms:
        for _, row in results.samples[results.samples["arm"] == arm].iterrows():
            grids.setdefault(arm, {}).setdefault(int(row["seed"]), {})[int(row["step"])] = row["path"]
    seeds = sorted({seed for by_seed in grids.values() for seed in by_seed})
    if not seeds:
        return None
    seed = max(seeds, key=lambda seed: (sum(seed in by_seed for by_seed in grids.values()), -seed))
    shown = {arm: by_seed[seed] for arm, by_seed in grids.items() if seed in by_seed}
    steps = sorted({step for by_step in shown.values() for step in by_step})
    if len(steps) > _MAX_STEPS:  # evenly, with the first and the last
        steps = [steps[round(place * (len(steps) - 1) / (_MAX_STEPS - 1))] for place in range(_MAX_STEPS)]
    rows = {
        arm: tuple(
            Sample(by_step[step], Path(os.path.relpath(by_step[step], folder)).as_posix()) if step in by_step else None
            for step in steps
        )
        for arm, by_step in [*shown.items()][:_MAX_ARMS]
    }
    return Sheet(seed, tuple(steps), rows, len(arms) - len(rows))
