"""The report on a sweep: ``report.md``, ``report.tex``, ``figures/*.svg`` and a self-contained ``report.html``."""

from __future__ import annotations

import base64
import functools
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from repa_lab.files import digest, file_digest, write_text
from repa_lab.registry import one_line
from repa_lab.report import figure_data, tables, text
from repa_lab.report.figure_data import FAINT, INK, PALETTE, SOFT
from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.runs import RunStatus, SweepDirectory, files

_MAX_PANELS = 24
_MAX_ARMS, _MAX_STEPS = 12, 5  # of a sheet of samples
_MAX_PIXELS, _MAX_PNG_BYTES = 640, 60_000  # of an embedded image

# Variables of the page's style sheet; other colours, such as mixed greys, are legible on light and dark.
_VARIABLES = {
    **{INK: "--ink", SOFT: "--soft", "#6e7781": "--soft", "#9aa1a9": "--axis", "#e6e8eb": "--grid", FAINT: "--faint"},
    **{"#ffffff": "--paper"},
    **{hue: f"--series-{place}" for place, hue in enumerate(PALETTE)},
}


@dataclass(frozen=True)
class Report:
    """The files of a report, and the answer that it gives."""

    markdown: Path
    latex: Path
    html: Path
    figures: tuple[Path, ...]  # those that there was data for
    answer: list[str]  # see `repa_lab.report.answer`

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, the page first."""
        return (self.html, self.markdown, self.latex, *self.figures)


@files.garbage_collection_paused()
def write_report(sweep: SweepDirectory) -> Report:
    """Write the report on everything that the sweep's runs have measured so far; every file is replaced whole.

    Raises:
        ResultsError: the sweep was never recorded, or its ``sweep.json`` cannot be read. Files of its runs that cannot
            be read, and figures that cannot be drawn, are left out and named in the report.
        LinkError: the sweep's folder, or that of its figures, is a symbolic link.
    """
    files.require_no_links(sweep.path, sweep.path / "figures")
    results = load_results(sweep.path)
    pictures, failures = draw_pictures(results, sweep.path)
    sections = ("differences", "convergence", "alignment", "search", "profiles")
    content = {
        "name": results.name,
        "question": results.question,
        "lead": text.lead(results),
        "facts": _facts(results),
        "conclusions": text.conclusions(results),
        "incomplete": text.incomplete(results),
        "exclusions": [*text.exclusions(results), *failures],
        "pictures": {name: [picture for picture in pictures if picture.section == name] for name in sections},
        "summary": tables.summary_tables(results),
        "others": tables.summary_tables(results, compared=False),
        "targets": tables.targets_tables(results),
        "trials": tables.trials_table(results),
        "importance": tables.importance_table(figure_data.importance_frame(results)),
        "least_trials": figure_data.MIN_TRIALS,
        "sheets": list(sheets(results, sweep.path)),
        "costs": tables.cost_table(results),
        "speed": tables.speed_table(results),
        "runs": tables.runs_table(results),
        "settings": tables.settings_table(results),
        "methods": text.methods(results),
        "protocols": tables.protocols_table(results),
        "provenance": tables.provenance_table(results),
    }
    environment = Environment(
        loader=PackageLoader("repa_lab.report"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"latex": tables.latex, "markdown": tables.markdown}
    paths = {kind: sweep.path / f"report.{kind}" for kind in ("md", "tex", "html")}
    for kind, path in paths.items():
        write_text(path, environment.get_template(f"report.{kind}.j2").render(content))
    drawn = tuple(sweep.path / link for picture in pictures for link in picture.elements)
    return Report(paths["md"], paths["tex"], paths["html"], drawn, text.answer(results))


def _facts(results: Results) -> dict[str, str]:
    """Return the size of the sweep in numbers."""
    runs, over = results.runs.drop_duplicates("run_id"), [status.value for status in RunStatus if status.is_over]
    counts = {"arms": len(results.by_arm), "seeds": results.runs["seed"].nunique()}
    facts = {name: str(count) for name, count in counts.items()}
    facts["runs ended"] = f"{runs['state'].isin(over).sum()} of {len(runs)}"
    hours = tables.cost_frame(results)[tables.TRAINING_HOURS]
    return facts if hours.isna().all() else {**facts, "device hours": tables.significant(float(hours.sum()))}


# ---- figures


@dataclass(frozen=True)
class Picture:
    """A figure of the report, which may have several panels."""

    section: str  # `differences`, `convergence`, `alignment`, `search` or `profiles`
    title: str  # what the figure shows
    caption: str  # explains lines, bands and points
    draw: str  # module and name of the function that draws a panel; imported only if a figure has changed
    panels: Mapping[str, pd.DataFrame | list[pd.DataFrame]]  # what each panel shows, by the panel's name
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the function
    elements: dict[str, str] = field(default_factory=dict)  # `<svg>` elements of what was drawn, by the links to files


def draw_pictures(results: Results, folder: Path) -> tuple[list[Picture], list[str]]:
    """Draw every figure of one sweep that there is data for and that ``figures`` in the folder does not hold already.

    Returns:
        The pictures, and a line for every figure that could not be drawn.
    """
    drawn, failures = [], []
    try:
        for picture in _pictures(results):
            try:
                for name in picture.panels:
                    link = f"figures/{name}.svg"
                    picture.elements[link] = _element(picture, name, folder / link)
                drawn.append(picture)
            except Exception as error:  # the rest of the report does not depend on a figure
                figure = f"{picture.section}: {picture.title}"
                failures.append(f"The figure '{figure}' could not be drawn ({one_line(error)}).")
    except ResultsError as error:
        failures.append(f"Layer profiles are not shown: {error}.")
    return drawn, failures


def _pictures(results: Results) -> Iterator[Picture]:
    """Yield every figure that there is data for, not drawn yet."""
    goal: dict[str, Any] = {"goal": results.goal}
    frame = figure_data.differences_frame(results)
    if len(frame) > 1:  # the difference of a single arm is the answer's sentence
        caption = (
            "Point: mean paired difference. Line: 95 % Student-t interval. Coloured: resolved among all comparisons."
        )
        title = "Differences to the baseline"
        yield Picture("differences", title, caption, "figures.draw_differences", {"differences": frame}, goal)
    for axis in results.axes:
        frame = figure_data.convergence_frame(results, axis)
        if panels := _panels(frame, "convergence" if axis.name == "step" else f"convergence_{axis.name}"):
            options, caption = goal | {"axis": axis}, figure_data.caption(frame)
            yield Picture("convergence", axis.label, caption, "curves.draw_convergence", panels, options)
    frame = figure_data.alignment_frame(results)
    if panels := _panels(frame, "alignment"):
        caption, title = figure_data.caption(frame), "Alignment on held-out images"
        yield Picture("alignment", title, caption, "curves.draw_alignment", panels)
    frame, goals = figure_data.search_frame(results), results.objectives
    has_values = frame.filter(regex="^value/").notna().any(axis=None)
    if has_values and any(name.startswith("param/") for name in frame):
        title = "The objective over the trials, and along every searched setting"
        caption = (
            "A point for each trial; faint ones did not complete. Star: the best completed one; line: the best so far."
        )
        yield Picture("search", title, caption, "figures.draw_slices", {"search": frame}, {"goals": goals})
        if len(goals) > 1:
            title, caption = "Objectives against each other", "A point for each trial; joined: the Pareto front."
            yield Picture("search", title, caption, "figures.draw_pareto", {"pareto": frame})
    caption = "Layers by timesteps, as `repa-lab profile` measured them."
    for place, (title, frames, names) in enumerate(figure_data.shown_profiles(results)):
        yield Picture(
            "profiles", title, caption, "figures.profile_figure", {f"profile_{place}": frames}, {"names": names}
        )


def _panels(frame: pd.DataFrame, name: str) -> dict[str, pd.DataFrame]:
    panels = [panel for panel in figure_data.panels(frame) if panel["mean"].notna().any()][:_MAX_PANELS]
    return {f"{name}_{place}" if place else name: panel for place, panel in enumerate(panels)}


def _element(picture: Picture, name: str, path: Path) -> str:
    """Return a panel as an element of the page; draw it anew unless its file ends with the digest of the same data."""
    data = picture.panels[name]
    shown = [(frame.to_csv(), frame.attrs) for frame in (data if isinstance(data, list) else [data])]
    key = f"<!-- {digest([*_drawing_code(), picture.draw, repr(picture.options), shown])} -->"
    drawn = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not drawn.endswith(key):
        from repa_lab.report import curves, figures

        module, _, draw = picture.draw.partition(".")
        drawing = getattr({"curves": curves, "figures": figures}[module], draw)
        drawn = figures.svg(drawing(data, **picture.options), name) + key
        write_text(path, drawn)
    return inline(drawn, name)


@functools.cache
def _drawing_code() -> tuple[str, ...]:
    """Return the digests of the code that draws, and the version of the drawing library."""
    code = (Path(__file__).with_name(f"{name}.py") for name in ("curves", "figures", "figure_data"))
    return (*map(file_digest, code), version("matplotlib"))


def inline(svg: str, name: str) -> str:
    """Return an SVG file as an element of a page, with the page's colours and ids that begin with a unique name."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", svg[svg.index("<svg") :])
    svg = re.sub(
        r"(?<=[:\s])#[0-9a-f]{6}\b",
        lambda match: f"var({_VARIABLES[match[0]]})" if match[0] in _VARIABLES else match[0],
        svg,
    )
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).strip()


# ---- samples


class Sample(NamedTuple):
    """A grid of samples: its path relative to the sweep's folder, and its image as a data URI; None if damaged."""

    link: str
    data: str | None


def _sample(path: Path, folder: Path) -> Sample:
    link = Path(os.path.relpath(path, folder)).as_posix()
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files
        return Sample(link, None)
    image.thumbnail((_MAX_PIXELS, image.height))
    kind, content = "png", io.BytesIO()
    image.save(content, format="PNG")
    if content.tell() > _MAX_PNG_BYTES:
        kind, content = "jpeg", io.BytesIO()
        image.save(content, format="JPEG", quality=85)
    return Sample(link, f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}")


@dataclass(frozen=True)
class Sheet:
    """The sample grids of arms that share a baseline, arms below each other, training from left to right."""

    seed: int  # the seed of every run in it
    steps: tuple[int, ...]  # the columns
    rows: Mapping[str, tuple[Sample | None, ...]]  # by arm, a sample for each step, None where the run has none
    left_out: int  # number of arms that are not shown


def sheets(results: Results, folder: Path) -> Iterator[Sheet]:
    """Yield a sheet for every group of arms that share a baseline; arms of a search are in the order of their trials.

    Links are relative to the sweep's folder.
    """
    order = {arm: place for place, arm in enumerate(dict.fromkeys(trial.arm for _, trial in results.trials))}
    groups: dict[str, list[str]] = {}
    for arm, baseline in results.baselines.items():
        is_baseline = arm in results.baselines.values()
        groups.setdefault(baseline or (arm if is_baseline else ""), []).append(arm)
    for arms in groups.values():
        arms.sort(key=lambda arm: order.get(arm, -1))
        grids = {arm: {seed: run.grids for seed, run in results.by_arm[arm].items() if run.grids} for arm in arms}
        count = Counter(seed for by_seed in grids.values() for seed in by_seed)
        if not count:
            continue
        seed = max(sorted(count), key=lambda seed: count[seed])
        shown = {arm: by_seed[seed] for arm, by_seed in grids.items() if seed in by_seed}
        steps = sorted({step for by_step in shown.values() for step in by_step})
        if len(steps) > _MAX_STEPS:  # evenly, with the first and the last
            steps = [steps[round(place * (len(steps) - 1) / (_MAX_STEPS - 1))] for place in range(_MAX_STEPS)]
        rows = {
            arm: tuple(_sample(by_step[step], folder) if step in by_step else None for step in steps)
            for arm, by_step in [*shown.items()][:_MAX_ARMS]
        }
        yield Sheet(seed, tuple(steps), rows, len(arms) - len(rows))
