"""The state of a run that changes while it trains, and its checkpoint as safetensors and JSON; no pickle anywhere.

denoiser.safetensors     the weights that train
regularizer.safetensors  the regularizer's weights, if it has any
ema.safetensors          averages of both
optimizer.safetensors    the optimizer's state, by number of the parameter
state.json               steps, images and seconds; the gradient scaler's state
input.json               channels, size and classes that a denoiser from scratch was built for
run.json                 the run and its metric rows so far (see `repa_lab.runs.checkpoints`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from repa_lab.errors import InputError
from repa_lab.files import write_json
from repa_lab.runs import RunDirectory, checkpoints, files
from repa_lab.runs.files import Row
from repa_lab.spec.train import EmaConfig

INPUT_FILE = "input.json"
# Prefix of the denoiser's parameters in the averages.
PREFIX = "denoiser."
WEIGHTS = ("ema", "last")
_FORMAT = 1


class NoWeightsError(InputError):
    """A run has no weights of the requested kind."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step, images: optimizer steps taken and images seen.
        seconds: spent in training steps.
        evaluation_seconds: spent measuring.
        encoder_seconds: the part of ``seconds`` that encoders took.
        data_seconds: the part of ``seconds`` in which the step waited for its batch.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    encoder_seconds: float = 0.0
    data_seconds: float = 0.0

    def row(self) -> Row:
        """Return the fields that every metric row begins with."""
        return {"step": self.step, "images": self.images, "seconds": round(self.seconds, 3)}


class EMA:
    """The exponential moving average of the trainable parameters, from their initial values on.

    After every step an average becomes ``decay * average + (1 - decay) * parameter``. At decay 0.9999 the half-life is
    6,931 steps.

    Attributes:
        live, average: the parameters and their averages by name, which begins with the module's.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: EmaConfig) -> None:
        self.live: dict[str, torch.Tensor] = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in trainable(module).items()
        }
        self._config = config
        self.average = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Add the weights to the average, after ``updates`` earlier updates of the run."""
        torch._foreach_lerp_([*self.average.values()], [*self.live.values()], 1 - self._config.decay_at(updates))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the modules their averaged weights within a with-statement."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def of(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the averages of the module whose names begin with ``prefix``, by their names in the module."""
        return {name.removeprefix(prefix): value for name, value in self.average.items() if name.startswith(prefix)}

    def load(self, average: Mapping[str, torch.Tensor]) -> None:
        """Load saved averages; KeyError if a parameter is missing."""
        for name, value in self.average.items():
            value.copy_(average[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.live.items():
            live = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(live)


@dataclass(frozen=True)
class TrainState:
    """Everything that changes while a run trains.

    Attributes:
        denoiser, regularizer: as they are without wrappers; None without a regularizer.
        optimizer, ema: of both.
        scaler: the gradient scaler of fp16, or None.
    """

    denoiser: nn.Module
    regularizer: nn.Module | None
    optimizer: torch.optim.Optimizer
    ema: EMA
    scaler: Any = None

    def save(self, folder: Path, progress: Progress) -> None:
        """Write the state into an empty folder."""
        moments = {
            f"{number}.{key}": value
            for number, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
            if value is not None
        }
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "denoiser": trainable(self.denoiser),
            "ema": self.ema.average,
            "optimizer": moments,
        }
        if self.regularizer is not None:
            tensors["regularizer"] = self.regularizer.state_dict()
        for name, values in tensors.items():
            contiguous = {key: value.detach().contiguous() for key, value in values.items()}
            save_file(contiguous, folder / f"{name}.safetensors")
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        write_json(folder / "state.json", {"format": _FORMAT, "progress": asdict(progress), "scaler": scaler})

    def load(self, folder: Path, progress: Progress) -> None:
        """Load a state that :meth:`save` wrote, and update ``progress`` to it; KeyError if a weight is missing."""
        load_trainable(self.denoiser, load_file(folder / "denoiser.safetensors"))
        if self.regularizer is not None:
            self.regularizer.load_state_dict(load_file(folder / "regularizer.safetensors"))
        self.ema.load(load_file(folder / "ema.safetensors"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(folder / "optimizer.safetensors").items():
            number, key = name.split(".", 1)
            moments.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, entry in self.optimizer.state.items():
            for key, value in entry.items():
                # Fused optimizers need the parameter's memory format, which a file does not keep.
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state = files.read_json(folder / "state.json")
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for field, value in state["progress"].items():
            setattr(progress, field, value)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that train; all others stay as they were built."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_trainable(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load the weights that train, and fixed ones if the state holds them; KeyError if one that trains is missing."""
    missing = sorted(trainable(module).keys() - state.keys())
    if missing:
        raise KeyError(f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    module.load_state_dict(state, strict=False)


def load_weights(denoiser: nn.Module, checkpoint: Path, weights: str) -> None:
    """Load the averaged (``ema``) or the ``last`` weights of a checkpoint into a run's denoiser."""
    state = load_file(checkpoint / "denoiser.safetensors")
    if weights == "ema":
        averages = load_file(checkpoint / "ema.safetensors")
        state |= {name.removeprefix(PREFIX): value for name, value in averages.items() if name.startswith(PREFIX)}
    load_trainable(denoiser, state)


def newest_checkpoint(directory: RunDirectory, weights: str) -> tuple[int, Path]:
    """Return the step and the folder of a run's newest whole checkpoint, which has both kinds of weights.

    Raises:
        NoWeightsError: the run has no checkpoint, or ``weights`` is neither.
    """
    if weights not in WEIGHTS:
        raise NoWeightsError(f"unknown weights '{weights}'; allowed: {', '.join(WEIGHTS)}")
    newest = checkpoints.latest(directory.checkpoints)
    if newest is None:
        raise NoWeightsError(f"run {directory.run_id} has no checkpoint yet")
    return newest
