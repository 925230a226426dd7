"""A run's model as it came out of training, to look at or to draw from."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import convert_outputs_to_fp32
from safetensors.torch import load_file
from torch import nn

from repa_lab.models.families import FAMILIES
from repa_lab.runs import RunDirectory, checkpoints
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.checkpoint import PREFIX, load_trainable
from repa_lab.training.device import PRECISION
from repa_lab.training.images import Images
from repa_lab.training.model import Model, open_model, pretrained_folder
from repa_lab.training.texts import encode_captions

WEIGHTS = ("ema", "last")


class NoWeightsError(ValueError):
    """A run has no weights of the kind that is asked for."""


def newest_checkpoint(directory: RunDirectory, weights: str) -> tuple[int, Path]:
    """Step and folder of a run's newest checkpoint that is whole.

    Args:
        directory: the run.
        weights: ``ema``, the averages that are measured, or ``last``, those of the last step.

    Raises:
        NoWeightsError: the run has no checkpoint, or ``weights`` is another word.
    """
    if weights not in WEIGHTS:
        raise NoWeightsError(f"unknown weights '{weights}'; allowed: {', '.join(WEIGHTS)}")
    found = checkpoints.latest(directory.checkpoints)
    if found is None:
        raise NoWeightsError(f"run {directory.run_id} has no checkpoint yet")
    return found


def open_trained(
    run: Run, checkpoint: Path, weights: str, images: Images, options: RunOptions, cache: Path, device: torch.device
) -> Model:
    """The model of a run with the weights of a checkpoint, in evaluation mode on the device.

    Its denoiser computes in the precision of the options, as accelerate has it do in training, and nothing else does.
    Captions are at hand; as a rule they were encoded when it was trained.

    Raises:
        PretrainedError: the pretrained pipeline cannot be had.
        KeyError: a weight is missing.
    """
    if run.config.model.pretrained is not None:
        family, folder = FAMILIES[run.config.model.family], pretrained_folder(run.config.model)
        encode_captions(family, folder, images, (), options, cache, device)
    model = open_model(run, images, options, cache, device)
    load_weights(model.denoiser, checkpoint, weights)
    model.denoiser.eval().to(device)
    if options.precision != "fp32":
        mixed = torch.autocast(device.type, PRECISION[options.precision])(model.denoiser.forward)
        model.denoiser.forward = convert_outputs_to_fp32(mixed)
    return model


def load_weights(denoiser: nn.Module, checkpoint: Path, weights: str) -> None:
    """Give a run's denoiser the ``ema`` or the ``last`` weights of one of its checkpoints.

    Raises:
        KeyError: a weight is missing.
    """
    state = load_file(checkpoint / "denoiser.safetensors")
    if weights == "ema":
        averages = load_file(checkpoint / "ema.safetensors")
        state |= {name.removeprefix(PREFIX): value for name, value in averages.items() if name.startswith(PREFIX)}
    load_trainable(denoiser, state)
