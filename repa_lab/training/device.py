"""Devices and precisions, how many images go through at once, and refusal of what this machine cannot do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from repa_lab.errors import InputError
from repa_lab.spec import EvaluateConfig, RunOptions

PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceError(InputError):
    """An option that this machine's devices cannot satisfy.

    Attributes:
        field: the option.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def pick_device(options: RunOptions) -> torch.device:
    """Return the GPU if there is one and the options allow it.

    Raises:
        DeviceError: the options ask for a GPU and torch sees none, or for fp16 on a CPU, where accelerate would use
            float32 without a word.
    """
    is_available = torch.cuda.is_available()
    if options.device == "cuda" and not is_available:
        raise DeviceError("device", "torch sees no GPU on this machine; use auto or cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun starts one process for each GPU
    device = torch.device("cuda", rank) if is_available and options.device != "cpu" else torch.device("cpu")
    if options.precision == "fp16" and device.type == "cpu":
        raise DeviceError("precision", "fp16 needs a GPU; use bf16 or fp32")
    return device


def require_equal_parts(batch_size: int, processes: int) -> None:
    """Refuse a batch that the processes cannot share equally; the mean of their losses would not be the batch's.

    Raises:
        DeviceError: the batch size is not a multiple of the number of processes.
    """
    if batch_size % processes:
        message = f"train.batch_size {batch_size} cannot be shared equally by {processes} processes"
        raise DeviceError("batch_size", message)


def measuring_precision(config: EvaluateConfig, training_precision: str) -> str:
    """Return the precision in which a denoiser is measured, a key of ``PRECISION``."""
    return training_precision if config.precision == "train" else config.precision


@contextmanager
def computing_in(module: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Let a module compute in another precision and return float32, in place of any autocast that accelerate added.

    Args:
        module: the module.
        precision: a key of ``PRECISION``; bf16 and fp16 use autocast.
        device: of the module.
    """
    wrapped, allow_tf32 = vars(module).pop("forward", None), torch.backends.cuda.matmul.allow_tf32
    if (dtype := PRECISION[precision]) != torch.float32:
        module.forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype)(module.forward))
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32 or precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        vars(module).pop("forward", None)
        if wrapped is not None:
            module.forward = wrapped


class MicroBatch:
    """The number of images in one forward and backward pass.

    Args:
        setting: a size, None for the whole batch, or ``auto``: the whole batch, halved whenever memory runs out.
        processes: number of processes that train the run.

    Attributes:
        size: images in a pass; None for the whole batch.

    Raises:
        DeviceError: ``auto`` with several processes, which would not halve together.
    """

    def __init__(self, setting: int | Literal["auto"] | None, processes: int) -> None:
        if setting == "auto" and processes > 1:
            raise DeviceError(
                "micro_batch", "auto works with one process only: several would not agree on a size; give a number"
            )
        self._is_auto = setting == "auto"
        self.size = None if setting == "auto" else setting

    def shrink(self, batch: int, error: torch.OutOfMemoryError) -> None:
        """Halve the size after memory ran out with ``batch`` images in the batch.

        Raises:
            OutOfMemoryError: the size was given, or a single image does not fit.
        """
        tried = min(self.size or batch, batch)
        if not self._is_auto or tried == 1:
            raise error
        self.size = tried // 2
