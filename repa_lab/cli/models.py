"""Denoisers: what there are, and what comes out of a run; settings of another trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repa_lab.cli.shared import (
    JsonOption,
    OutputOption,
    RootOption,
    clean_errors,
    deliver,
    err,
    mistake,
    out,
    progress,
    table,
)
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.runs import RunDirectory

EXPORT_FORMATS = ("diffusers", "simpletuner")


def families(json_: JsonOption = False) -> None:
    """List the denoisers: which regularizer fits, what can be tapped, and the grid of tokens that is found there."""
    with clean_errors():
        from dataclasses import asdict

        from repa_lab.models.families import catalogue

        rows = [asdict(entry) for entry in catalogue()]
        if json_:
            print(json.dumps(rows))
            return
        for row in rows:
            row |= {"grid": "{}x{}".format(*row["grid"]), "parameters": f"{row['parameters']:,}"}
        out.print(table("families; the grid is that of a tapped image of so many pixels", rows))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's id, or its folder.")],
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="A new folder for the model.")] = None,
    weights: Annotated[str, typer.Option(help="ema (the averages that are measured) or last.")] = "ema",
    format_: Annotated[
        str, typer.Option("--format", help="diffusers: the model; simpletuner: the settings.")
    ] = "diffusers",
    output: OutputOption = None,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Write a run's denoiser alone, as diffusers would load it, or its regularizer's settings as SimpleTuner's JSON."""
    with clean_errors():
        from repa_lab.runs import RunsRoot

        target = _target(format_, folder, output)
        directory = RunsRoot(root).find_run(run)
        if format_ == "simpletuner" or target is None:
            _export_settings(directory, target)
            return
        from repa_lab.training.export import export_model

        step = export_model(directory, target, weights)
        out.print(f"{weights} weights of step {step:,}: {target}", highlight=False, soft_wrap=True)


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's id, or its folder.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="A new file.")],
    metric: Annotated[
        str | None, typer.Option(help="Full name of a number; else the first of the dearest protocol.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema (the averages that are measured) or last.")] = "ema",
    real: Annotated[
        bool, typer.Option("--real", help="Write instead what they are compared with: training images.")
    ] = False,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Draw the samples that a run's number was measured on into one file, as ADM's evaluator takes it."""
    with clean_errors():
        from repa_lab.runs import RunsRoot

        directory = RunsRoot(root).find_run(run)
        from repa_lab.training.export import write_real, write_samples

        with progress("images" if real else "samples", err) as show:
            if real:
                count = write_real(directory, file, RunsRoot(root).cache, show)
                out.print(f"{count:,} training images: {file}", highlight=False, soft_wrap=True)
                return
            step, name, value = write_samples(directory, file, RunsRoot(root).cache, metric, weights, show)
        out.print(f"the samples of {name} at step {step:,}, {weights} weights: {file}", highlight=False, soft_wrap=True)
        measured = "the run has no such number of these weights" if value is None else f"the run measured {value!r}"
        out.print(measured, highlight=False, soft_wrap=True)


def import_(
    config: Annotated[
        list[str], typer.Argument(metavar="CONFIG", help="A file of JSON or of flags, or the flags themselves.")
    ],
    output: OutputOption = None,
) -> None:
    """Turn a SimpleTuner config into a spec, and say what it cannot carry and what means something else here."""
    with clean_errors():
        from repa_lab.bridge.importing import import_config

        imported = import_config(config)
        deliver(imported.spec, output)
        for remark in imported.remarks:
            err.print(remark, highlight=False, markup=False, soft_wrap=True)


def _target(format_: str, folder: Path | None, output: Path | None) -> Path | None:
    """Where an export goes; None is standard output, which takes settings alone."""
    if format_ not in EXPORT_FORMATS:
        raise mistake("--format", f"unknown format '{format_}'; allowed: {', '.join(EXPORT_FORMATS)}")
    if folder and output:
        raise mistake("--output", f"'{folder}' is named as well; give one of them")
    if format_ == "diffusers" and not (folder or output):
        raise mistake("FOLDER", "name a new folder for the model")
    return folder or output


def _export_settings(directory: RunDirectory, output: Path | None) -> None:
    from repa_lab.bridge.exporting import export_settings
    from repa_lab.spec.identity import Run

    exported = export_settings(Run.from_json(directory.run_id, directory.spec).config)
    deliver(json.dumps(exported.settings, indent=2) + "\n", output)
    for lost in exported.lost:
        err.print(lost, highlight=False, markup=False, soft_wrap=True)
