"""The command line: parse, call, print. Exit status 2 means the input was refused and nothing was created."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.runs import RunDirectory
    from repa_lab.spec import SpecError

_PIPE_WIDTH = 160
EXPORT_FORMATS = ("diffusers", "simpletuner")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
# A pipe has no width: a table must not be cut for a terminal that is not there.
out, err = (Console(stderr=e, width=None if s.isatty() else _PIPE_WIDTH) for e, s in ((False, sys.stdout), (True, sys.stderr)))

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec file: one question.")]
RootOption = Annotated[Path, typer.Option("--root", help="Where runs live.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Lay a value over the spec.")]
OutputOption = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="A new file instead of the terminal.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    with _clean_errors():
        from repa_lab.report import answer, load_results
        from repa_lab.sweep.api import sweep as carry_out

        outcome = carry_out(spec, root, _overrides(set_), workers, out, rehearse)
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
    with _clean_errors():
        from repa_lab.sweep.api import plan as make_plan

        planned = make_plan(spec, root, _overrides(set_))
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
        out.print(_table(planned.experiment.question or planned.experiment.name, rows, hidden=("blocked",)))
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
    with _clean_errors():
        from repa_lab.sweep.single import run_one

        shown = out if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
        directory, state = run_one(spec, arm, seed, root, _overrides(set_), shown)
        shown.print(f"{state.value}: {directory.path}", highlight=False, soft_wrap=True)


@app.command()
def report(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's name or folder.")],
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Write a sweep's report again and print its answer."""
    with _clean_errors():
        from repa_lab.report import answer, load_results, write_report
        from repa_lab.runs import RunsRoot

        directory = RunsRoot(root).find_sweep(sweep)
        paths = write_report(directory)
        for sentence in answer(load_results(directory.path)):
            out.print(sentence, highlight=False, markup=False, soft_wrap=True)
        out.print(f"report: {paths.html}", highlight=False, soft_wrap=True)


@app.command()
def status(
    sweep: Annotated[Path | None, typer.Argument(metavar="[SWEEP]", help="A sweep's name or folder; else all runs.")] = None,
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Show where runs stand."""
    with _clean_errors():
        from repa_lab.runs import RunsRoot

        if sweep is None:
            runs = [("", run) for run in RunsRoot(root).runs()]
        else:
            directory = RunsRoot(root).find_sweep(sweep)
            asked = [(f"{a['label']}, seed {r['seed']}", r["run_id"]) for a in directory.manifest["arms"] for r in a["runs"]]
            runs = [(name, directory.root.run(run_id)) for name, run_id in asked]
        rows: list[dict[str, Any]] = []
        for name, one in runs:
            state, last = one.state, (one.rows() or [{"step": 0}])[-1]
            error = state.error or ""
            rows.append({"run": name, "run_id": one.run_id, "state": state.state.value, "step": last["step"], "error": error})
        print(json.dumps(rows)) if json_ else out.print(_table(str(sweep or root), rows))


@app.command()
def families(json_: JsonOption = False) -> None:
    """List the denoisers: which regularizer fits, what can be tapped, and the grid of tokens that is found there."""
    with _clean_errors():
        from dataclasses import asdict

        from repa_lab.models.catalogue import catalogue

        rows = [asdict(entry) for entry in catalogue()]
        if json_:
            print(json.dumps(rows))
            return
        for row in rows:
            row |= {"grid": "{}x{}".format(*row["grid"]), "parameters": f"{row['parameters']:,}"}
        out.print(_table("families; the grid is that of a tapped image of so many pixels", rows))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's id, or its folder.")],
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="A new folder for the model.")] = None,
    weights: Annotated[str, typer.Option(help="ema (the averages that are measured) or last.")] = "ema",
    format_: Annotated[str, typer.Option("--format", help="diffusers: the model; simpletuner: the settings.")] = "diffusers",
    output: OutputOption = None,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Write a run's denoiser alone, as diffusers would load it, or its regularizer's settings as SimpleTuner's JSON."""
    with _clean_errors():
        from repa_lab.runs import RunsRoot

        target = _target(format_, folder, output)
        directory = RunsRoot(root).find_run(run)
        if format_ == "simpletuner" or target is None:
            _export_settings(directory, target)
            return
        from repa_lab.training.export import export_model

        step = export_model(directory, target, weights)
        out.print(f"{weights} weights of step {step:,}: {target}", highlight=False, soft_wrap=True)


@app.command("import", context_settings={"ignore_unknown_options": True})
def import_(
    config: Annotated[list[str], typer.Argument(metavar="CONFIG", help="A file of JSON or of flags, or the flags themselves.")],
    output: OutputOption = None,
) -> None:
    """Turn a SimpleTuner config into a spec, and say what it cannot carry and what means something else here."""
    with _clean_errors():
        from repa_lab.bridge.importing import import_config

        imported = import_config(config)
        _deliver(imported.spec, output)
        for remark in imported.remarks:
            err.print(remark, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point of `repa-lab`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()


@contextmanager
def _clean_errors() -> Iterator[None]:
    """A user's mistake is one message and exit status 2; an interruption says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to go on from the last checkpoints")
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError) as error:
        status = _exit_status(error)
        if status is None:
            raise
        err.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(status) from None


def _exit_status(error: Exception) -> int | None:
    """2 for input that was refused, 1 for work that could not go on, None for a defect: an error that is not the lab's own."""
    if not type(error).__module__.startswith("repa_lab."):
        return None
    return 2 if isinstance(error, ValueError) else 1


def _target(format_: str, folder: Path | None, output: Path | None) -> Path | None:
    """Where an export goes; None is standard output, which takes settings alone."""
    if format_ not in EXPORT_FORMATS:
        raise _mistake("--format", f"unknown format '{format_}'; allowed: {', '.join(EXPORT_FORMATS)}")
    if folder and output:
        raise _mistake("--output", f"'{folder}' is named as well; give one of them")
    if format_ == "diffusers" and not (folder or output):
        raise _mistake("FOLDER", "name a new folder for the model")
    return folder or output


def _export_settings(directory: RunDirectory, output: Path | None) -> None:
    from repa_lab.bridge.exporting import export_settings
    from repa_lab.spec.identity import Run

    exported = export_settings(Run.from_json(directory.run_id, directory.spec).config)
    _deliver(json.dumps(exported.settings, indent=2) + "\n", output)
    for lost in exported.lost:
        err.print(lost, highlight=False, markup=False, soft_wrap=True)


def _deliver(text: str, output: Path | None) -> None:
    """Print a text as it is, or write it to a file that is not there yet."""
    from repa_lab.runs.files import write_text

    if output is None:
        print(text, end="")
        return
    try:
        if output.exists():
            raise _mistake("", f"'{output}' exists; name a new file")
        write_text(output, text)
    except OSError as error:
        raise _mistake("", f"cannot write '{output}': {error.strerror}") from None


def _mistake(what: str, message: str) -> SpecError:
    from repa_lab.spec import Place, Problem, SpecError

    return SpecError([Problem(Place(None), what, message)])


def _overrides(given: list[str] | None) -> dict[str, Any]:
    from repa_lab.spec import Place, Problem, SpecError
    from repa_lab.spec.yaml import parse_scalar

    overrides = {}
    for text in given or []:
        path, equals, value = text.partition("=")
        try:
            if not path or not equals:
                raise ValueError("expected PATH=VALUE")
            overrides[path] = parse_scalar(value)
        except ValueError as error:
            raise SpecError([Problem(Place(None), f"--set {text}", str(error))]) from None
    return overrides


def _table(title: str, rows: list[dict[str, Any]], hidden: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for column in (rows or [{"run": ""}])[0]:
        if column not in hidden:
            table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for column, value in row.items() if column not in hidden))
    return table


if __name__ == "__main__":
    main()
