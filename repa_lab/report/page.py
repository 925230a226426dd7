"""The page on a sweep: ``report.md``, ``report.html`` (one file, nothing outside it) and ``figures/*.png``."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from repa_lab.report import figures, methods, tables, words
from repa_lab.report.results import Results, load_results
from repa_lab.runs import RunsRoot, SweepDirectory, files

_MOST_GRIDS = 24


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was written; ``figures`` holds only those that there was data for."""

    markdown: Path
    html: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class _Picture:
    """An image of the page: ``path`` on disk, ``link`` from the sweep's folder."""

    caption: str
    path: Path
    link: str

    @property
    def data(self) -> str:
        """The image as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode("ascii")


def write_report(sweep: SweepDirectory) -> ReportPaths:
    """Write the report on what the sweep's runs have measured so far; every file is replaced whole.

    Raises:
        ResultsError: the sweep was never recorded, or a file of it cannot be read.
    """
    results = load_results(sweep.path)
    pictures = _figures(results, sweep.path)
    page = _page(results, sweep, pictures)
    markdown, html = sweep.path / "report.md", sweep.path / "report.html"
    files.write_text(markdown, _render("report.md.j2", page))
    files.write_text(html, _render("report.html.j2", page))
    return ReportPaths(markdown, html, tuple(picture.path for picture in pictures))


def _page(results: Results, sweep: SweepDirectory, pictures: list[_Picture]) -> dict[str, Any]:
    return {
        "name": results.name,
        "question": results.question,
        "conclusions": words.conclusions(results),
        "incomplete": words.incomplete(results),
        "figures": pictures,
        "summary": tables.summary_table(results),
        "targets": tables.targets_table(results),
        "trials": tables.trials_table(results),
        "samples": _samples(results, sweep),
        "runs": tables.runs_table(results),
        "methods": methods.measured_how(results),
        "provenance": methods.made_with(_provenances(results, sweep.root)),
    }


def _render(template: str, page: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("repa_lab.report"),
        autoescape=lambda name: "html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(page)


def _figures(results: Results, folder: Path) -> list[_Picture]:
    convergence, alignment = figures.convergence_frame(results), figures.alignment_frame(results)
    drawn = [
        _drawn(convergence, lambda frame: figures.draw_convergence(frame, results.goal), "Convergence", "convergence"),
        _drawn(alignment, figures.draw_alignment, "Alignment with the encoder on held-out images", "alignment"),
    ]
    found = [(figure, caption, f"figures/{name}.png") for figure, caption, name in drawn if figure is not None]
    return [_Picture(caption, figures.save(figure, folder / link), link) for figure, caption, link in found]


def _drawn(
    frame: pd.DataFrame, draw: Callable[[pd.DataFrame], Figure], caption: str, name: str
) -> tuple[Figure | None, str, str]:
    return None if frame["mean"].isna().all() else draw(frame), caption, name


def _samples(results: Results, sweep: SweepDirectory) -> list[_Picture]:
    """The last grid of each arm's lowest seed that has one."""
    found = (_sample(arm, runs, sweep) for arm, runs in results.runs.groupby("arm", sort=False))
    return [picture for picture in found if picture][:_MOST_GRIDS]


def _sample(arm: Any, runs: pd.DataFrame, sweep: SweepDirectory) -> _Picture | None:
    for _, run in runs.sort_values("seed").iterrows():
        grids = sweep.root.run(str(run["run_id"])).sample_grids()
        if grids:
            step = max(grids)
            link = Path(os.path.relpath(grids[step], sweep.path)).as_posix()
            return _Picture(f"{arm}: seed {run['seed']}, step {step}", grids[step], link)
    return None


def _provenances(results: Results, root: RunsRoot) -> Iterable[dict[str, Any]]:
    runs = [root.run(run_id) for run_id in results.runs["run_id"].unique()]
    return [run.provenance for run in runs if (run.path / "provenance.json").is_file()]
