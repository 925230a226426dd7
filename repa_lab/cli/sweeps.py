"""Plan, carry out, report and rank sweeps."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from repa_lab.cli import shared
from repa_lab.cli.shared import JsonOption, RootOption, SetOption, SpecArgument, WithOption, WorkersOption, out, table
from repa_lab.runs import RunsRoot
from repa_lab.runs.files import garbage_collection_paused
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.orchestration.api import SweepOutcome
    from repa_lab.report.leaderboard import Board

ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Take the place of another sweep of this name; its runs stay.")
]


def sweep(
    spec: SpecArgument,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    with_: WithOption = None,
    workers: WorkersOption = None,
    max_failures: Annotated[
        int | None, typer.Option("--max-failures", min=1, help="Start no more runs after this many have failed.")
    ] = None,
    no_share: Annotated[
        bool, typer.Option("--no-share", help="Train every run by itself from its first step.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Go through all of it in minutes on a CPU, with tiny random models.")
    ] = False,
    replace: ReplaceOption = False,
) -> None:
    """Train what the question asks for and is not done yet, then report the answer."""
    from repa_lab.orchestration.api import sweep as carry_out

    options = {"run.max_failures": max_failures} if max_failures else {}
    options |= {"run.share": False} if no_share else {}
    outcome = carry_out(spec, root, shared.overrides(set_) | options, workers, out, rehearse, with_ or (), replace)
    diverged = f"{len(outcome.diverged)} diverged, " if outcome.diverged else ""
    typer.echo(f"{outcome.trained} runs trained now, {diverged}{len(outcome.failures)} failed")
    _print_failures(outcome.failures)
    if outcome.stopped:
        typer.echo(outcome.stopped, err=True)
    if rehearse:
        typer.echo("a rehearsal: tiny random models, whose numbers say nothing")
    else:
        _print_answer(outcome.path)
    _print_untracked(outcome)
    typer.echo(f"report: {outcome.path / 'report.html'}")
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
    from repa_lab.orchestration import display
    from repa_lab.orchestration.api import plan as make_plan
    from repa_lab.orchestration.cost import estimate

    planned = make_plan(spec, root, shared.overrides(set_), with_ or ())
    estimated = estimate(planned)
    if json_:
        print(json.dumps(display.as_json(estimated)))
        return
    rows = display.run_rows(estimated) if runs else display.arm_rows(estimated)
    out.print(table(planned.experiment.question or planned.experiment.name, rows))
    if planned.orphans:
        title = "orphaned: asked for by an earlier version of the spec, and kept"
        out.print(table(title, display.orphan_rows(planned)))
    lines = display.baseline_lines(planned) + display.sentences(estimated) + display.blocked_lines(planned)
    for line in lines:
        typer.echo(line)


def run(
    spec: SpecArgument,
    arm: Annotated[str | None, typer.Option(help="Label of the arm; `repa-lab plan` lists them.")] = None,
    seed: Annotated[int | None, typer.Option(help="One of the spec's seeds.")] = None,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    with_: WithOption = None,
) -> None:
    """Train one run of a sweep in this process, or in those that torchrun or accelerate launch started for it."""
    from repa_lab.orchestration.api import run_one

    console = out if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
    directory, state = run_one(spec, arm, seed, root, shared.overrides(set_), console, with_ or ())
    console.out(f"{state.value}: {directory.path}", highlight=False)


@garbage_collection_paused()
def report(sweep: shared.SweepArgument, root: RootOption = DEFAULT_ROOT) -> None:
    """Write a sweep's report again and print its answer."""
    from repa_lab.report import write_report

    written = write_report(RunsRoot(root).find_sweep(sweep))
    for line in (*written.answer, *(f"report: {path}" for path in written.all)):
        typer.echo(line)


@garbage_collection_paused()
def leaderboard(
    place: Annotated[
        Path | None, typer.Argument(metavar="[ROOT]", help="The folder of all runs; the same as --root.")
    ] = None,
    root: RootOption = DEFAULT_ROOT,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME|KIND", help="One metric, or one kind, such as fid.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(metavar="TEXT", help="What the metric's name must contain, such as @50k/sde250.")
    ] = "",
    json_: JsonOption = False,
) -> None:
    """Show the arms of all sweeps, best first, a table for each protocol."""
    from repa_lab.report.leaderboard import leaderboards

    boards = leaderboards(place or root, metric, protocol, tell=lambda line: typer.echo(line, err=True))
    if json_:
        print(json.dumps(list(map(_board_json, boards))))
        return
    for board in boards:
        better = "lower is better" if board.goal == "min" else "higher is better"
        fields = [f"{field}: {json.dumps(value)}" for field, value in board.protocol.items()]
        out.print(table("\n".join([f"{board.metric} ({better})", *fields]), _board_rows(board)))


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Such as urepa/table8; without it, all are listed.")
    ] = None,
    scale: Annotated[str, typer.Option(help="full, or nano: the same arms on digits, in minutes on a CPU.")] = "full",
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    workers: WorkersOption = None,
    replace: ReplaceOption = False,
) -> None:
    """Train the arms of a paper's table and compare what is measured with what was published."""
    from repa_lab.orchestration import reproduce as tables
    from repa_lab.orchestration.api import sweep as carry_out
    from repa_lab.report.published import table_rows

    if name is None:
        print("\n".join(tables.names()))
        return
    shared.require_choice("--scale", scale, tables.SCALES)
    experiment = tables.open_table(name, scale, shared.overrides(set_))
    outcome = carry_out(experiment, root, workers=workers, console=out, replace=replace)
    _print_failures(outcome.failures)
    comparisons, lines = tables.results_of(experiment, outcome.path, scale)
    for comparison in comparisons:
        out.print(table(f"{experiment.name}: {comparison.metric}", table_rows(comparison)))
    typer.echo("\n".join(lines))
    _print_untracked(outcome)
    typer.echo(f"written: {outcome.path / 'reproduce.md'} and .csv")
    if outcome.failures:
        raise typer.Exit(1)


def bench(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", help="A spec file; else a tiny model on digits.")
    ] = None,
    root: RootOption = DEFAULT_ROOT,
    set_: SetOption = None,
    with_: WithOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every way takes.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 5,
    json_: JsonOption = False,
) -> None:
    """Measure a training step against other ways to take it, the data path and the evaluation, side by side."""
    from repa_lab.orchestration.api import bench as measure

    measured = measure(spec, root, shared.overrides(set_), with_ or (), rounds, steps, shared.err)
    if json_:
        print(json.dumps(measured))
        return
    facts = f"batch {measured['batch_size']}, {measured['options']['precision']}"
    out.print(table(f"{measured['device']}, {facts}; ratios of {measured['clock']}", _bench_rows(measured)))
    typer.echo(f"a large matrix product: {measured['matmul_flops'] / 1e12:.3g} TFLOP/s")
    typer.echo(f"peak memory, all of this together: {measured['peak_memory_gib']:.2f} GiB")


def _bench_rows(measured: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of :func:`repa_lab.orchestration.api.bench`."""
    rows = []
    for way in measured["ways"]:
        ratio, utilisation = way["ratio"], way.get("flops_utilisation")
        rows.append(
            {
                "": way["name"],
                "images/s": f"{way['images_per_second']:,.1f}",
                "ms a step": f"{way['ms_per_step']:,.1f}",
                "time / plain step": f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
                "FLOPs / plain step": f"{way['flops_ratio']:.3f}" if utilisation is not None else "",
                "of the ceiling": f"{100 * utilisation:.1f} %" if utilisation is not None else "",
            }
        )
    return rows


def _board_json(board: Board) -> dict[str, Any]:
    rows = json.loads(board.frame.to_json(orient="records"))  # pandas writes what is not a number as null
    return {"metric": board.metric, "goal": board.goal, "protocol": dict(board.protocol), "arms": rows}


def _board_rows(board: Board) -> list[dict[str, Any]]:
    from repa_lab.report.tables import decimals, interval

    rows = []
    for arm in board.rows:
        places = decimals(arm["mean"])
        spread = "" if math.isnan(arm["low"]) else f" {interval(arm['low'], arm['high'], places)}"
        rows.append(
            {
                "arm": arm["arm"],
                "sweeps": arm["sweeps"],
                "model": f"{arm['family']} {arm['size']}".strip(),
                "regularizer": f"{arm['regularizer']} {arm['encoder']}".strip(),
                "state": arm["state"],
                "mean [95 % interval]": f"{arm['mean']:.{places}f}{spread}",
                "n": f"{arm['n']} of {arm['seeds']}",
                "best": f"{arm['best']:.{places}f}",
                "step": arm["step"],
                "images": f"{arm['images']:.0f}",
            }
        )
    return rows


def _print_failures(failures: Mapping[str, str]) -> None:
    for run_id, reason in failures.items():
        typer.echo(f"run {run_id} failed: {reason}", err=True)


def _print_untracked(outcome: SweepOutcome) -> None:
    """Print of how many runs W&B has no complete record, and why."""
    total, root = len(set(outcome.directory.manifest.run_ids)), outcome.path.parent
    for reason, count in Counter(outcome.untracked.values()).items():
        typer.echo(f"W&B has no complete record of {count} of {total} runs: {reason}")
    if outcome.untracked:
        where = "" if root == DEFAULT_ROOT else f" --root {shlex.quote(str(root))}"
        typer.echo(f"`repa-lab sync {outcome.path.name}{where}` sends what it lacks")


def _print_answer(path: Path) -> None:
    from repa_lab.report import answer, load_results

    for sentence in answer(load_results(path)):
        typer.echo(sentence)
