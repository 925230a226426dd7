"""Devices, precisions and the seconds of a device; and refusal of what this machine cannot do."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from repa_lab.errors import InputError
from repa_lab.kernels import kernels
from repa_lab.runs import RunDirectory
from repa_lab.spec import EvaluateConfig, Machine, ResolvedOptions, RunOptions
from repa_lab.spec.options import cores_here

PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceError(InputError):
    """An option, ``field``, that this machine's devices cannot satisfy."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def pick_device(options: RunOptions) -> torch.device:
    """Return the GPU if there is one and the options allow it.

    Raises:
        DeviceError: there is no GPU, or fp16 is asked for on a CPU, where accelerate would silently use float32.
    """
    device = _device_of(options)
    if options.device == "cuda" and device.type == "cpu":
        raise DeviceError("device", "torch sees no GPU on this machine; use auto or cpu")
    if options.precision == "fp16" and device.type == "cpu":
        raise DeviceError("precision", "fp16 needs a GPU; use bf16 or fp32")
    return device


def is_on_cpu(options: RunOptions) -> bool:
    """Return whether the run trains on a CPU, where accelerate heeds a launcher only if it is told so."""
    return _device_of(options).type == "cpu"


def _device_of(options: RunOptions) -> torch.device:
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun starts one process for each GPU
    is_used = torch.cuda.is_available() and options.device != "cpu"
    return torch.device("cuda", rank) if is_used else torch.device("cpu")


def resolved(options: RunOptions) -> ResolvedOptions:
    """Return the options with every `auto` replaced by what is right for this process on its device."""
    device = _device_of(options)
    sharing = options.slots_per_gpu * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machine = Machine(cores=max(cores_here() // sharing, 1), processes=int(os.environ.get("WORLD_SIZE", "1")))
    if device.type == "cuda":
        half: Literal["bf16", "fp16"] = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))  # Triton compiles C too
        is_supported = torch.cuda.get_device_capability(device) >= (7, 0)  # Triton's oldest
        machine = replace(machine, half=half, compiles=has_compiler and is_supported)
    return options.resolved(machine)


def as_trained(options: RunOptions, directory: RunDirectory) -> ResolvedOptions:
    """Return the options for this machine, with `auto` precisions replaced by those that a run was trained in."""
    recorded = directory.provenance.get("options", {})
    names = [name for name in ("precision", "encoder_precision") if getattr(options, name) == "auto"]
    options = options.model_copy(update={name: recorded[name] for name in names if name in recorded})
    return resolved(options)


def require_equal_parts(batch_size: int, processes: int) -> None:
    """Refuse a batch that the processes cannot share equally; the mean of their losses would not be the batch's."""
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
        precision: a key of ``PRECISION``; bf16 and fp16 use autocast.
    """
    wrapped = vars(module).pop("forward", None)
    if (dtype := PRECISION[precision]) != torch.float32:
        module.forward = convert_outputs_to_fp32(torch.autocast(device.type, dtype)(module.forward))
    try:
        with kernels(tf32=precision == "tf32"):
            yield
    finally:
        vars(module).pop("forward", None)
        if wrapped is not None:
            module.forward = wrapped


class Stopwatch:
    """Sums the seconds of code blocks: wall-clock time on a CPU, time between CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._intervals = deque[list[torch.cuda.Event]]()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a with-statement. Never synchronises: adds only the intervals whose CUDA events have completed."""
        began, events = time.perf_counter(), list[torch.cuda.Event]()
        if self._is_cuda:
            while self._intervals and self._intervals[0][1].query():
                self._add_first()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        try:
            yield
        finally:
            if events:
                events[1].record()
                self._intervals.append(events)
            else:
                self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Return the seconds since the last call, after waiting for the device to complete the last interval."""
        while self._intervals:
            self._intervals[0][1].synchronize()
            self._add_first()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_first(self) -> None:
        begin, end = self._intervals.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
