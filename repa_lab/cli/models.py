"""List denoisers, and look into what a run trained: export, samples, profiles of blocks; prepare data sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repa_lab.cli.shared import (
    JsonOption,
    OutputOption,
    RootOption,
    RunArgument,
    UsageError,
    WeightsOption,
    deliver,
    err,
    out,
    progress,
    require_choice,
    table,
)
from repa_lab.runs import RunDirectory, RunsRoot
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.align.settings import EncoderSettings

_FORMATS = ("diffusers", "simpletuner")
_DEVICES = ("auto", "cpu", "cuda")
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_POLL_S = 0.2

data = typer.Typer(no_args_is_help=True, help="Prepare data sets.")


def families(json_: JsonOption = False) -> None:
    """List the denoisers: which regularizer fits, what can be tapped, and the grid of tokens at the tap."""
    from repa_lab.models.families import catalogue

    rows = [asdict(entry) for entry in catalogue()]
    if json_:
        print(json.dumps(rows))
        return
    for row in rows:
        row |= {"grid": "{}x{}".format(*row["grid"]), "parameters": f"{row['parameters']:,}"}
    out.print(table("families; the grid is that of a tapped image of so many pixels", rows))


def export(
    run: RunArgument,
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="A new folder for the model.")] = None,
    weights: WeightsOption = "ema",
    format_: Annotated[
        str, typer.Option("--format", help="diffusers: the model; simpletuner: the settings.")
    ] = "diffusers",
    output: OutputOption = None,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Write a run's denoiser alone, as diffusers would load it, or its regularizer's settings as SimpleTuner's JSON."""
    require_choice("--format", format_, _FORMATS)
    if folder and output:
        raise UsageError(f"'{folder}' is named as well; give one of them", "--output")
    target = folder or output
    if format_ == "diffusers":
        if target is None:
            raise UsageError("name a new folder for the model", "FOLDER")
        directory = RunsRoot(root).find_run(run)
        from repa_lab.training.export import export_model  # takes seconds; a mistyped run need not wait

        step = export_model(directory, target, weights)
        typer.echo(f"{weights} weights of step {step:,}: {target}")
        return
    from repa_lab.bridge.exporting import export_settings
    from repa_lab.spec.identity import Run

    exported = export_settings(Run.read(RunsRoot(root).find_run(run)).config)
    deliver(json.dumps(exported.settings, indent=2) + "\n", target)
    for lost in exported.lost:
        typer.echo(lost, err=True)


def sample(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="A new file.")],
    metric: Annotated[
        str | None, typer.Option(help="Full name of a number; else the first of the most expensive protocol.")
    ] = None,
    weights: WeightsOption = "ema",
    real: Annotated[
        bool, typer.Option("--real", help="Write the training images that the samples are compared with instead.")
    ] = False,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Draw the samples that a run's number was measured on into one file, as ADM's evaluator takes it."""
    directory, cache = RunsRoot(root).find_run(run), RunsRoot(root).cache
    from repa_lab.training.export import write_real, write_samples  # takes seconds; a mistyped run need not wait

    with progress("images" if real else "samples", err) as show:
        if real:
            count = write_real(directory, file, cache, show)
            typer.echo(f"{count:,} training images: {file}")
            return
        step, name, value = write_samples(directory, file, cache, metric, weights, show)
    typer.echo(f"the samples of {name} at step {step:,}, {weights} weights: {file}")
    typer.echo("the run has no such number of these weights" if value is None else f"the run measured {value!r}")


def profile(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Ids or folders; the others are compared with the first.")
    ],
    timesteps: Annotated[str, typer.Option(help="From 0, data, to 1, noise.")] = "0.1,0.3,0.5,0.7,0.9",
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Encoder to compare with, or its settings as in a spec; else the run's own."),
    ] = None,
    weights: WeightsOption = "ema",
    samples: Annotated[int | None, typer.Option(min=1, help="How many of the held-out images; else all.")] = None,
    metrics: Annotated[str, typer.Option(help="The metrics to measure.")] = "cka,cknna,mutual_knn,lds,cds,rmsc",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto is that of the run's training.")] = "auto",
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Measure how well every block of a run agrees with its encoder at several times, and draw it.

    Of several runs the differences from the first are drawn too.
    """
    directories = [RunsRoot(root).find_run(run) for run in dict.fromkeys(runs)]
    from repa_lab.spec import RunOptions  # takes seconds, for torch; a mistyped run need not wait
    from repa_lab.training.profile import Request, profile_run

    require_choice("--precision", precision, _PRECISIONS)
    options = RunOptions.model_validate({"precision": precision})
    names = tuple(filter(None, map(str.strip, metrics.split(","))))
    try:
        times = tuple(sorted(map(float, filter(str.strip, timesteps.split(",")))))
    except ValueError:
        raise UsageError(f"expected numbers with commas between them, got '{timesteps}'", "--timesteps") from None
    request = Request(times, names, weights, samples, _encoder(encoder, directories))
    profiles = [profile_run(run, request, options, RunsRoot(root).cache) for run in directories]
    drawn = _draw(directories)
    if json_:
        print(json.dumps(profiles))
        return
    for run in directories:
        _print_profile(run, names)
    for path in drawn:
        typer.echo(path)


@data.callback()
def _data() -> None:
    """Prepare data sets."""


@data.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of images, one class per subfolder.")],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A new folder, or one to go on with.")],
    vae: Annotated[str, typer.Option(help="A hub id or a folder; the papers' is stabilityai/sd-vae-ft-mse.")],
    resolution: Annotated[int, typer.Option(min=1, help="Pixels along each side.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images that are encoded at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes all GPUs there are.")] = "auto",
) -> None:
    """Crop images and encode them once, in the layout of REPA's preprocessing. Run it again to go on where it stopped.

    Under torchrun or accelerate launch each process does its share.
    """
    require_choice("--device", device, _DEVICES)
    import torch

    from repa_lab.data.prepared import prepare as prepare_data

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise UsageError("torch sees no GPU on this machine; use auto or cpu", "--device")
    if gpus > 1 and "RANK" not in os.environ:
        options = ["--resolution", str(resolution), "--vae", vae, "--batch-size", str(batch_size), "--device", device]
        if status := run_in_processes(["data", "prepare", *options, "--", str(source), str(folder)], gpus):
            raise typer.Exit(status)
    else:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpus else torch.device("cpu")
        share = {"rank": rank, "world": world, "threads": threads}
        task = "images" if world == 1 else f"images (one of {world} equal parts)"
        with progress(task, out, is_shown=rank == 0) as show:
            prepare_data(source, folder, resolution, vae, batch_size, device=place, progress=show, **share)
    if "RANK" not in os.environ:  # one of several processes does not know whether all are done
        typer.echo(f"data: {{source: repa, path: {folder}, resolution: {resolution}, vae: {vae}}}")


def run_in_processes(words: Sequence[str], count: int) -> int:
    """Run a command of `repa-lab` in this many processes, as torchrun would; a process that fails ends the others.

    Returns:
        The first exit status that is not 0, or 0.
    """
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "repa_lab", *words]
    ranks = [{**os.environ, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [subprocess.Popen(command, env=environment) for environment in ranks]

    try:
        while True:
            statuses = [process.poll() for process in processes]
            if any(statuses) or None not in statuses:
                return next((abs(status) for status in statuses if status), 0)
            time.sleep(_POLL_S)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _encoder(given: str | None, directories: Sequence[RunDirectory]) -> EncoderSettings | None:
    """Return the named encoder, with the settings under which one of the runs uses it, or else with the defaults."""
    from repa_lab.align.settings import EncoderSettings
    from repa_lab.spec.document import Draft, parse_scalar
    from repa_lab.spec.identity import Run
    from repa_lab.spec.schema import validate

    if given is None:
        return None
    try:
        value = parse_scalar(given)
    except ValueError as error:
        raise UsageError(str(error), "--encoder") from None
    if isinstance(value, dict):
        return validate(EncoderSettings, Draft(value))
    used = (encoder for run in directories for _, encoder in Run.read(run).config.encoder_paths)
    return next((encoder for encoder in used if encoder.name == given), EncoderSettings(name=given))


def _print_profile(run: RunDirectory, metrics: Sequence[str]) -> None:
    """Print, for each timestep and metric, the block with the largest value, and the value that the run measures."""
    from repa_lab.report.figure_data import load_profile, shown_metrics

    frame, rows = load_profile(run), []
    protocol, aligned, measured = (frame.attrs[key] for key in ("protocol", "aligned_block", "measured_block"))
    for timestep in protocol["timesteps"]:
        row = {"timestep": f"{timestep:g}"}
        for metric in shown_metrics([frame]):
            values = frame[(frame["timestep"] == timestep) & (frame["metric"] == metric)].set_index("block")["value"]
            row[f"{metric}: best block"] = f"{values.idxmax()} ({values.max():.3f})"
            if measured in values.index:
                row[f"{metric} at {measured}"] = f"{values[measured]:.3f}"
        rows.append(row)
    source = f"{protocol['weights']} weights of step {protocol['step']:,}, {protocol['images']:,} held-out images"
    out.print(table(f"{run.run_id}: {source}, {protocol['encoder']['name']}", rows))
    typer.echo("not aligned" if aligned is None else f"aligned at block {aligned}")
    if missing := [metric for metric in metrics if metric not in set(frame["metric"])]:
        typer.echo(f"the grid is too small for {', '.join(missing)}")


def _draw(directories: Sequence[RunDirectory]) -> list[Path]:
    """Draw each run, and each run beside the first; print why a pair cannot be drawn."""
    from repa_lab.report.figure_data import load_profile, why_not_comparable
    from repa_lab.report.figures import profile_figure, save

    profiles = [load_profile(run) for run in directories]
    pairs = list(zip(directories, profiles, strict=True))
    drawn = [save(profile_figure([profile]), run.profile_picture()) for run, profile in pairs]
    (first, first_profile), *others = pairs
    for run, profile in others:
        if reason := why_not_comparable(first_profile, profile):
            typer.echo(reason, err=True)
        else:
            drawn.append(save(profile_figure([first_profile, profile]), run.profile_picture(first)))
    return drawn
