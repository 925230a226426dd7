"""The report on a sweep: ``report.md``, ``report.tex``, ``figures/*.png``, and ``report.html``, which needs no other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from repa_lab.report import ledger, methods, provenance, tables, words
from repa_lab.report.exclusions import exclusions
from repa_lab.report.lead import lead
from repa_lab.report.phrases import significant
from repa_lab.report.pictures import Picture, draw_pictures
from repa_lab.report.results import Results, load_results
from repa_lab.report.samples import sheets
from repa_lab.report.search import MIN_TRIALS, importance_frame
from repa_lab.report.table import latex
from repa_lab.runs import RunStatus, SweepDirectory, files


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was written; ``figures`` holds only those that there was data for."""

    markdown: Path
    latex: Path
    html: Path
    figures: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, the page first."""
        return (self.html, self.markdown, self.latex, *self.figures)


def write_report(sweep: SweepDirectory) -> ReportPaths:
    """Write the report on what the sweep's runs have measured so far; every file is replaced whole.

    Raises:
        ResultsError: the sweep was never recorded, or its ``sweep.json`` cannot be read. What cannot be read of its
            runs is left out and named in the report.
    """
    results = load_results(sweep.path)
    pictures = draw_pictures(results, sweep.root, sweep.path)
    page = _page(results, sweep, pictures)
    paths = {name: sweep.path / f"report.{name}" for name in ("md", "tex", "html")}
    for name, path in paths.items():
        files.write_text(path, _environment(name).get_template(f"report.{name}.j2").render(page))
    return ReportPaths(paths["md"], paths["tex"], paths["html"], tuple(picture.path for picture in pictures))


def _page(results: Results, sweep: SweepDirectory, pictures: list[Picture]) -> dict[str, Any]:
    importance = importance_frame(results)
    return {
        "name": results.name,
        "question": results.question,
        "lead": lead(results),
        "facts": _facts(results),
        "conclusions": words.conclusions(results),
        "incomplete": words.incomplete(results),
        "exclusions": exclusions(results),
        "pictures": {name: [one for one in pictures if one.section == name] for name in _SECTIONS},
        "summary": tables.summary_tables(results),
        "others": tables.summary_tables(results, compared=False),
        "targets": tables.targets_tables(results),
        "trials": tables.trials_table(results),
        "importance": tables.importance_table(importance),
        "least_trials": MIN_TRIALS,
        "sheets": sheets(results, sweep.path),
        "costs": ledger.cost_table(results),
        "runs": tables.runs_table(results),
        "settings": provenance.settings_table(results),
        "methods": methods.measured_how(results),
        "protocols": provenance.protocols_table(results),
        "provenance": provenance.provenance_table(results),
    }


_SECTIONS = ("differences", "convergence", "alignment", "search", "profiles")


def _facts(results: Results) -> list[tuple[str, str]]:
    """The size of the sweep in numbers."""
    runs = results.runs.drop_duplicates("run_id")
    hours = ledger.cost_frame(results)["hours/training"]
    done = int(runs["state"].isin([status.value for status in RunStatus if status.is_over]).sum())
    facts = [("arms", str(results.runs["arm"].nunique())), ("seeds", str(results.runs["seed"].nunique()))]
    facts.append(("runs ended", f"{done} of {len(runs)}"))
    return facts if hours.isna().all() else [*facts, ("device hours", significant(float(hours.sum())))]


def _environment(kind: str) -> Environment:
    environment = Environment(
        loader=PackageLoader("repa_lab.report"),
        autoescape=kind == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["latex"] = latex
    return environment
