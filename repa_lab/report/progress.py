"""What training can be measured by: steps, images, device hours, FLOPs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Axis:
    """A measure of progress: ``name`` is its column in ``Results.curves``, ``label`` what people call it, ``unit`` is short."""

    name: str
    label: str
    unit: str
    units: tuple[tuple[float, str], ...] = ()

    def scale(self, largest: float) -> tuple[float, str]:
        """By what values up to ``largest`` are multiplied to be shown, and what they are called then."""
        for factor, unit in self.units:
            if largest * factor < 300:
                return factor, self.label.replace("hours", unit)
        return 1.0, self.label


STEPS = Axis("step", "optimizer steps", "steps")
IMAGES = Axis("images", "images seen", "images")
HOURS = Axis("hours", "device hours of training", "device hours", units=((3600.0, "seconds"), (60.0, "minutes")))
FLOPS = Axis("flops", "FLOPs of training", "FLOPs")
AXES = (STEPS, IMAGES, HOURS, FLOPS)


def progress_of(row: Mapping[str, float], processes: int) -> dict[str, float]:
    """Progress at a row: ``images``; ``hours``, without evaluations, summed over the processes that share the run;
    ``flops`` of the denoiser, projectors and encoders. NaN is what the row does not tell.
    """
    seconds, nan = row.get("seconds", math.nan), math.nan
    flops = row.get("cost/train_flops", nan) + row.get("cost/encoder_flops", 0.0)
    return {"images": row.get("images", nan), "hours": seconds * processes / _SECONDS_PER_HOUR, "flops": flops}


@functools.cache
def is_progress(name: str) -> bool:
    """Whether a row's entry says how far training is or what it took, rather than what was measured."""
    return name in ("step", "images", "seconds") or name.startswith("cost/")


def processes_of(provenance: Mapping[str, Any]) -> int:
    """How many processes shared a run."""
    processes = provenance.get("processes", 1)
    return processes if isinstance(processes, int) and processes > 0 else 1
