"""A run's denoiser as others load it: without projector, optimizer or anything else of the lab's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repa_lab.models.pretrained import DiffusersDenoiser
from repa_lab.models.scratch import Input
from repa_lab.runs import RunDirectory, files
from repa_lab.spec.identity import Run
from repa_lab.training.checkpoint import INPUT_FILE
from repa_lab.training.model import build_denoiser
from repa_lab.training.trained import load_weights, newest_checkpoint


class ExportError(ValueError):
    """There is no place to put it."""


def export_model(directory: RunDirectory, folder: Path, weights: str = "ema") -> int:
    """Write the denoiser of a run's newest checkpoint into a new folder.

    A ``unet`` becomes a folder that diffusers' `UNet2DModel.from_pretrained` loads; a ``sit`` becomes
    ``model.safetensors`` and a ``config.json`` of :class:`repa_lab.models.sit.SiTConfig`. A pretrained family that was
    trained in full becomes a folder of its own class in diffusers; LoRA becomes the one file that the family's pipeline
    takes (`load_lora_weights`), or, where it takes none, peft's folder (`PeftModel.from_pretrained`).

    Args:
        directory: the run.
        folder: where to write; it must not hold anything yet.
        weights: ``ema``, the averages that are measured, or ``last``, those of the last step.

    Returns:
        The step of the checkpoint.

    Raises:
        NoWeightsError: the run has no checkpoint, or ``weights`` is another word.
        ExportError: the folder is in use.
    """
    step, checkpoint = newest_checkpoint(directory, weights)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"'{folder}' is not empty; name a new folder")
    run = Run.from_json(directory.run_id, directory.spec)
    denoiser = build_denoiser(run.config, _input(files.read_json(checkpoint / INPUT_FILE)), run.seed)
    load_weights(denoiser, checkpoint, weights)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(denoiser, DiffusersDenoiser):
        denoiser.export(folder, run.config.model.rank if run.config.model.train == "lora" else None)
    else:
        denoiser.export(folder)
    return step


def _input(given: dict[str, Any] | None) -> Input | None:
    return Input(given["channels"], tuple(given["size"]), given["num_classes"]) if given else None
