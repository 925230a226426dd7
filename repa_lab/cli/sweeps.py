"""Plan, carry out and report sweeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repa_lab.cli.shared import (
    JsonOption,
    RootOption,
    SetOption,
    SpecArgument,
    clean_errors,
    err,
    out,
    overrides,
    table,
)
from repa_lab.runs.root import DEFAULT_ROOT

WithOption = Annotated[
    list[Path] | None,
    typer.Option("--with", metavar="FILE", help="Lay a fragment over the spec, under --set; may be given again."),
]


def sweep(
    spec: SpecArgument,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    with_: WithOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many runs go on at a time.")] = None,
    max_failures: Annotated[
        int | None, typer.Option("--max-failures", min=1, help="Start no more runs after this many have failed.")
    ] = None,
    no_share: Annotated[
        bool, typer.Option("--no-share", help="Train every run by itself from its first step.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Go through all of it in minutes on a CPU, with tiny random models.")
    ] = False,
) -> None:
    """Train what the question asks for and is not done yet, then report the answer."""
    with clean_errors():
        from repa_lab.orchestration.api import sweep as carry_out
        from repa_lab.report import answer, load_results

        options = {"run.max_failures": max_failures} if max_failures else {}
        options |= {"run.share": False} if no_share else {}
        outcome = carry_out(spec, root, overrides(set_) | options, workers, out, rehearse, with_ or ())
        diverged = f"{len(outcome.diverged)} diverged, " if outcome.diverged else ""
        out.print(f"{outcome.trained} runs trained now, {diverged}{len(outcome.failures)} failed", highlight=False)
        for run_id, reason in outcome.failures.items():
            err.print(f"run {run_id} failed: {reason}", highlight=False, markup=False)
        if outcome.stopped:
            err.print(outcome.stopped, highlight=False, markup=False)
        if rehearse:
            out.print("a rehearsal: tiny random models, whose numbers say nothing", highlight=False)
        for sentence in [] if rehearse else answer(load_results(outcome.path)):
            out.print(sentence, highlight=False, markup=False, soft_wrap=True)
        out.print(f"report: {outcome.path / 'report.html'}", highlight=False, soft_wrap=True)
        if outcome.failures:
            raise typer.Exit(1)


def plan(
    spec: SpecArgument,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    with_: WithOption = None,
    runs: Annotated[bool, typer.Option("--runs", help="A line for every run, not for every arm.")] = False,
    json_: JsonOption = False,
) -> None:
    """Show a sweep's arms: what is done, what is left, what it takes, and what stands in the way. Creates nothing."""
    with clean_errors():
        from repa_lab.orchestration import display
        from repa_lab.orchestration.api import plan as make_plan
        from repa_lab.orchestration.cost import estimate

        planned = make_plan(spec, root, overrides(set_), with_ or ())
        found = estimate(planned)
        if json_:
            print(json.dumps(display.as_json(found)))
            return
        rows = display.run_rows(found) if runs else display.arm_rows(found)
        out.print(table(planned.experiment.question or planned.experiment.name, rows))
        if planned.orphans:
            title = "orphaned: asked for by an earlier version of the spec, and kept"
            out.print(table(title, display.orphan_rows(planned), hidden=("orphaned",)))
        for line in display.sentences(found) + display.blocked_lines(planned):
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def run(
    spec: SpecArgument,
    arm: Annotated[str | None, typer.Option(help="Label of the arm; `repa-lab plan` lists them.")] = None,
    seed: Annotated[int | None, typer.Option(help="One of the spec's seeds.")] = None,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    with_: WithOption = None,
) -> None:
    """Train one run of a sweep in this process, or in those that torchrun or accelerate launch started for it."""
    with clean_errors():
        from repa_lab.orchestration.api import run_one

        shown = out if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
        directory, state = run_one(spec, arm, seed, root, overrides(set_), shown, with_ or ())
        shown.print(f"{state.value}: {directory.path}", highlight=False, soft_wrap=True)


def report(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's name or folder.")],
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Write a sweep's report again and print its answer."""
    with clean_errors():
        from repa_lab.report import answer, load_results, write_report
        from repa_lab.runs import RunsRoot

        directory = RunsRoot(root).find_sweep(sweep)
        paths = write_report(directory)
        for sentence in answer(load_results(directory.path)):
            out.print(sentence, highlight=False, markup=False, soft_wrap=True)
        for path in paths.all:
            out.print(f"report: {path}", highlight=False, soft_wrap=True)
