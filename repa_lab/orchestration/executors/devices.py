"""Which GPUs there are, found without torch, and which of them each slot gets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from repa_lab.orchestration.executors import ExecutorError

_PATIENCE_S = 30.0
_GPU = re.compile(r"^GPU (\d+): ")
_PART = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)")


def visible_gpus(environment: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` knows them by.

    Args:
        environment: if it limits the GPUs, those are all; else the driver's ``nvidia-smi`` on its PATH is asked.
        dev: where devices are looked for when the driver's tool is missing.
    """
    limit = environment.get("CUDA_VISIBLE_DEVICES")
    if limit is not None:
        named = [name.strip() for name in limit.split(",")]
        return tuple(name for name in named if name and name != "-1")
    listed = _listed(environment)
    if listed is not None:
        return listed
    return tuple(sorted((path.name[6:] for path in dev.glob("nvidia[0-9]*")), key=int))


def _listed(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """What the driver's tool lists; of a GPU that is split, its parts, for the whole cannot be used then."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return None
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=_PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    gpus: dict[str, list[str]] = {}
    for line in answer.splitlines():
        if match := _GPU.match(line):
            gpus[match[1]] = []
        elif (match := _PART.match(line)) and gpus:
            gpus[next(reversed(gpus))].append(match[1])
    return tuple(name for gpu, parts in gpus.items() for name in parts or [gpu])


def assign(gpus: tuple[str, ...], per_run: int, per_gpu: int, workers: int | None) -> list[str]:
    """The ``CUDA_VISIBLE_DEVICES`` of every slot; runs are spread over the GPUs before any two share one.

    Args:
        gpus: what there is; GPUs that do not make up a whole slot stay idle.
        per_run: GPUs of one slot.
        per_gpu: slots that share a GPU.
        workers: how many slots; None makes as many as that gives, a number may be more or fewer.

    Raises:
        ExecutorError: a run wants more GPUs than there are.
    """
    if len(gpus) < per_run:
        raise ExecutorError("gpus_per_run", f"a run shall have {per_run} GPUs, and this machine has {len(gpus)}")
    groups = [",".join(gpus[first : first + per_run]) for first in range(0, len(gpus) - per_run + 1, per_run)]
    count = workers or len(groups) * per_gpu
    return [groups[number % len(groups)] for number in range(count)]
