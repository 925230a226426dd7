"""Plan, carry out and report sweeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from repa_lab.cli.shared import JsonOption, RootOption, SetOption, SpecArgument, app, clean_errors, err, out, overrides, table
from repa_lab.runs.root import DEFAULT_ROOT


@app.command()
def sweep(
    spec: SpecArgument,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many runs go on at a time.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Go through all of it in minutes on a CPU, with tiny random models.")
    ] = False,
) -> None:
    """Train what the question asks for and is not done yet, then report the answer."""
    with clean_errors():
        from repa_lab.report import answer, load_results
        from repa_lab.sweep.api import sweep as carry_out

        outcome = carry_out(spec, root, overrides(set_), workers, out, rehearse)
        out.print(f"{outcome.trained} runs trained now, {len(outcome.failures)} failed", highlight=False)
        for run_id, reason in outcome.failures.items():
            err.print(f"run {run_id} failed: {reason}", highlight=False, markup=False)
        if rehearse:
            out.print("a rehearsal: tiny random models, whose numbers say nothing", highlight=False)
        for sentence in [] if rehearse else answer(load_results(outcome.path)):
            out.print(sentence, highlight=False, markup=False, soft_wrap=True)
        out.print(f"report: {outcome.path / 'report.html'}", highlight=False, soft_wrap=True)
        if outcome.failures:
            raise typer.Exit(1)


@app.command()
def plan(spec: SpecArgument, root: RootOption = DEFAULT_ROOT, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Show a sweep's runs, which of them are done, and what stands in the way. Creates nothing."""
    with clean_errors():
        from repa_lab.sweep.api import plan as make_plan

        planned = make_plan(spec, root, overrides(set_))
        rows = [
            {
                "arm": entry.arm.label,
                "seed": entry.run.seed,
                "run_id": entry.run.run_id,
                "state": "blocked" if entry.blocked else entry.state.state.value,
                "steps": entry.run.config.train.steps,
                "steps_left": entry.steps_left,
                "blocked": entry.blocked.message if entry.blocked else None,
            }
            for entry in planned.runs
        ]
        if json_:
            print(json.dumps({"name": planned.experiment.name, "question": planned.experiment.question, "runs": rows}))
            return
        out.print(table(planned.experiment.question or planned.experiment.name, rows, hidden=("blocked",)))
        search = planned.experiment.search
        if search:
            what = f"{search.trials} trials with {len(planned.experiment.seeds)} seeds each"
            out.print(f"searches {', '.join(search.space)} around each arm: {what}", highlight=False)
        left = sum(run.config.train.steps for run in planned.pending)
        out.print(f"{len(planned.pending)} runs to train, {left:,} steps at most", highlight=False)
        if planned.blocked:
            out.print(f"blocked: {planned.blocked.path}: {planned.blocked.message}", highlight=False, markup=False)


@app.command()
def run(
    spec: SpecArgument,
    arm: Annotated[str | None, typer.Option(help="Label of the arm; `repa-lab plan` lists them.")] = None,
    seed: Annotated[int | None, typer.Option(help="One of the spec's seeds.")] = None,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
) -> None:
    """Train one run of a sweep in this process, or in those that torchrun or accelerate launch started for it."""
    with clean_errors():
        from repa_lab.sweep.single import run_one

        shown = out if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
        directory, state = run_one(spec, arm, seed, root, overrides(set_), shown)
        shown.print(f"{state.value}: {directory.path}", highlight=False, soft_wrap=True)


@app.command()
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
        out.print(f"report: {paths.html}", highlight=False, soft_wrap=True)
