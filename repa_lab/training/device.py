"""Where a run is computed, and refusal of what this machine cannot do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from repa_lab.spec import EvaluateConfig, RunOptions

# accelerate's names of the precisions.
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceError(ValueError):
    """The options ask for what this machine's devices cannot do; :attr:`field` names the option."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def pick_device(options: RunOptions) -> torch.device:
    """The GPU if there is one and the options allow it; nothing falls back in silence.

    Raises:
        DeviceError: a GPU is asked for where torch sees none, or fp16, which accelerate turns into float32 on a CPU.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise DeviceError("device", "torch sees no GPU on this machine; use auto or cpu")
    own = int(os.environ.get("LOCAL_RANK", "0"))  # of the processes that torchrun started, each has a GPU
    device = torch.device("cuda", own) if available and options.device != "cpu" else torch.device("cpu")
    if options.precision == "fp16" and device.type == "cpu":
        raise DeviceError("precision", "fp16 needs a GPU; use bf16 or fp32")
    return device


def measuring_precision(config: EvaluateConfig, trained: str) -> str:
    """Return the precision in which a denoiser is measured, by that in which it is ``trained``: a key of ``PRECISION``."""
    return trained if config.precision == "train" else config.precision


@contextmanager
def computing_in(module: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Let a module compute in a precision and give float32, for the length of a with-statement.

    Whatever was put around the module's forward before, such as accelerate's autocast, is set aside meanwhile.

    Args:
        module: the module.
        precision: a key of ``PRECISION``; bf16 and fp16 are by autocast.
        device: where the module stands.
    """
    around, products = vars(module).pop("forward", None), torch.backends.cuda.matmul.allow_tf32
    if (dtype := PRECISION[precision]) != torch.float32:
        module.forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype)(module.forward))
    torch.backends.cuda.matmul.allow_tf32 = products or precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products
        vars(module).pop("forward", None)
        if around is not None:
            module.forward = around
