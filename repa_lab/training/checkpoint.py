"""What a run needs to go on, as safetensors and JSON: no pickle anywhere.

denoiser.safetensors     the weights that train
regularizer.safetensors  the projector's weights, if there is one
ema.safetensors          averages of both
optimizer.safetensors    AdamW's moments, by parameter number
state.json               step, images, seconds, gradient scaler
input.json               channels, size and classes that a denoiser from scratch was built for (written by the trainer)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from repa_lab.runs import files
from repa_lab.runs.files import Row
from repa_lab.training.ema import EMA

INPUT_FILE = "input.json"
# What the denoiser's parameters are called by in the averages.
PREFIX = "denoiser."


@dataclass
class Progress:
    """How far a run has come: optimizer steps, images seen, seconds spent training and measuring.

    ``encoder_seconds`` are those of ``seconds`` that encoders took, since the last checkpoint of a version that did not
    count them, if there was one.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    encoder_seconds: float = 0.0

    def row(self) -> Row:
        """As the head of a metric row."""
        return {"step": self.step, "images": self.images, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Trained:
    """Everything that changes while a run trains; ``scaler`` is fp16's gradient scaler or None."""

    denoiser: nn.Module
    regularizer: nn.Module | None
    optimizer: torch.optim.Optimizer
    ema: EMA
    scaler: Any = None

    def save(self, folder: Path, progress: Progress) -> None:
        """Write all of it into an empty folder."""
        save_file(_contiguous(trainable(self.denoiser)), folder / "denoiser.safetensors")
        if self.regularizer is not None:
            save_file(_contiguous(self.regularizer.state_dict()), folder / "regularizer.safetensors")
        save_file(_contiguous(self.ema.average), folder / "ema.safetensors")
        save_file(_contiguous(_moments(self.optimizer)), folder / "optimizer.safetensors")
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        files.write_json(folder / "state.json", {"progress": asdict(progress), "scaler": scaler})

    def load(self, folder: Path, progress: Progress) -> None:
        """Take up what :meth:`save` wrote."""
        load_trainable(self.denoiser, load_file(folder / "denoiser.safetensors"))
        if self.regularizer is not None:
            self.regularizer.load_state_dict(load_file(folder / "regularizer.safetensors"))
        self.ema.load(load_file(folder / "ema.safetensors"))
        _restore_moments(self.optimizer, load_file(folder / "optimizer.safetensors"))
        state = files.read_json(folder / "state.json")
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for field, value in state["progress"].items():
            setattr(progress, field, value)


def trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module that train; everything else is as it was built."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_trainable(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Take up what :func:`trainable` gave, and perhaps fixed weights, which older checkpoints hold too.

    Raises:
        KeyError: a weight is missing.
    """
    missing = sorted(trainable(module).keys() - state.keys())
    if missing:
        raise KeyError(f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    module.load_state_dict(state, strict=False)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items() if value is not None
    }


def _restore_moments(optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in moments.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
