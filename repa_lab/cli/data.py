"""Prepare data sets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from repa_lab.cli.shared import clean_errors, mistake, out, progress

app = typer.Typer(no_args_is_help=True, help="Prepare data sets.")

_DEVICES = ("auto", "cpu", "cuda")
_LOOK_S = 0.2


@app.callback()
def data() -> None:
    """Prepare data sets."""


@app.command()
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
    with clean_errors():
        if device not in _DEVICES:
            raise mistake("--device", f"unknown device '{device}'; allowed: {', '.join(_DEVICES)}")
        import torch

        gpus = torch.cuda.device_count() if device != "cpu" else 0
        if device == "cuda" and not gpus:
            raise mistake("--device", "torch sees no GPU on this machine; use auto or cpu")
        options = ["--resolution", str(resolution), "--vae", vae, "--batch-size", str(batch_size), "--device", device]
        if gpus > 1 and "RANK" not in os.environ:
            if status := spread(["data", "prepare", *options, "--", str(source), str(folder)], gpus):
                raise typer.Exit(status)
        else:
            _carry_out(source, folder, resolution, vae, batch_size, bool(gpus))
        if "RANK" not in os.environ:  # one of several does not know whether all are done
            line = f"data: {{source: repa, path: {folder}, resolution: {resolution}, vae: {vae}}}"
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def spread(words: Sequence[str], count: int) -> int:
    """Have this many processes carry out a command of `repa-lab`, as torchrun would; the first exit status that is not
    0.

    One that fails takes the others with it.
    """
    own = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "repa_lab.cli", *words]
    ranks = [{**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [subprocess.Popen(command, env=environment) for environment in ranks]
    try:
        while any(process.poll() is None for process in processes) and not _failure(processes):
            time.sleep(_LOOK_S)
        return _failure(processes)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    return next((abs(status) for process in processes if (status := process.poll())), 0)


def _carry_out(source: Path, folder: Path, resolution: int, vae: str, batch_size: int, on_gpu: bool) -> None:
    import torch

    from repa_lab.data.prepared import prepare

    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    task = "images" if world == 1 else f"images (one of {world} equal parts)"
    with progress(task, out, is_shown=rank == 0) as show:
        share = {"rank": rank, "world": world, "threads": threads}
        prepare(source, folder, resolution, vae, batch_size, device=place, progress=show, **share)
