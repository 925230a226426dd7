"""A run's denoiser as others load it: without projector, optimizer or anything else of the lab's."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from repa_lab.models.family import BUILDERS, Input
from repa_lab.runs import RunDirectory, checkpoints, files
from repa_lab.spec.identity import Run
from repa_lab.training.checkpoint import INPUT_FILE, PREFIX
from repa_lab.training.trainer import build_denoiser

WEIGHTS = ("ema", "last")


class ExportError(ValueError):
    """There is nothing to export, or no place to put it."""


def export_model(directory: RunDirectory, folder: Path, weights: str = "ema") -> int:
    """Write the denoiser of a run's newest checkpoint into a new folder.

    A ``unet`` becomes a folder that diffusers' `UNet2DModel.from_pretrained` loads; a ``sit`` becomes ``model.safetensors`` and
    a ``config.json`` of :class:`repa_lab.models.sit.SiTConfig`.

    Args:
        directory: the run.
        folder: where to write; it must not hold anything yet.
        weights: ``ema``, the averages that are measured, or ``last``, those of the last step.

    Returns:
        The step of the checkpoint.

    Raises:
        ExportError: the run has no checkpoint, the folder is in use, or ``weights`` is another word.
    """
    if weights not in WEIGHTS:
        raise ExportError(f"unknown weights '{weights}'; allowed: {', '.join(WEIGHTS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"'{folder}' is not empty; name a new folder")
    found = checkpoints.latest(directory.checkpoints)
    if found is None:
        raise ExportError(f"run {directory.run_id} has no checkpoint yet")
    step, checkpoint = found
    run = Run.from_json(directory.run_id, directory.spec)
    given = files.read_json(checkpoint / INPUT_FILE)
    denoiser = build_denoiser(run.config, Input(given["channels"], tuple(given["size"]), given["num_classes"]), run.seed)
    state = load_file(checkpoint / "denoiser.safetensors")
    if weights == "ema":
        averages = load_file(checkpoint / "ema.safetensors")
        state |= {name.removeprefix(PREFIX): value for name, value in averages.items() if name.startswith(PREFIX)}
    denoiser.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    BUILDERS[run.config.model.family].export(denoiser, folder)
    return step
