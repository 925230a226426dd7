"""A paper's table again."""

from __future__ import annotations

from typing import Annotated

import typer

from repa_lab.cli.shared import RootOption, SetOption, clean_errors, err, mistake, out, overrides, table
from repa_lab.runs.root import DEFAULT_ROOT

NameArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="Such as urepa/table8; without it, all are listed.")
]


def reproduce(
    name: NameArgument = None,
    scale: Annotated[str, typer.Option(help="full, or nano: the same arms on digits, in minutes on a CPU.")] = "full",
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many runs go on at a time.")] = None,
) -> None:
    """Train the arms of a paper's table and hold what is measured against what was published."""
    with clean_errors():
        from repa_lab.orchestration import reproduce as tables
        from repa_lab.orchestration.api import sweep

        if name is None:
            print("\n".join(tables.names()))
            return
        chosen = tables.SCALES.get(scale)
        if chosen is None:
            raise mistake("--scale", f"expected full or nano, got '{scale}'")
        experiment = tables.open_table(name, chosen, overrides(set_))
        outcome = sweep(experiment, root, workers=workers, console=out)
        for run_id, reason in outcome.failures.items():
            err.print(f"run {run_id} failed: {reason}", highlight=False, markup=False)
        comparisons = tables.results_of(experiment, outcome.path, chosen)
        from repa_lab.report.published import table_rows

        for comparison in comparisons:
            out.print(table(f"{experiment.name}: {comparison.metric}", table_rows(comparison)))
        for line in tables.lines_of(experiment, comparisons, chosen):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        out.print(f"written: {outcome.path / 'reproduce.md'} and .csv", highlight=False, soft_wrap=True)
        if outcome.failures:
            raise typer.Exit(1)
