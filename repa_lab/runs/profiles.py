"""A run's profile: a measurement of every block of its denoiser at several times, in two files beside its other
results.

    profile.json   the values, and the protocol that they were measured by
    profile.png    the same as a picture

Measuring it again replaces both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repa_lab.runs import files
from repa_lab.runs.directory import RunDirectory

# What a profile may hold: agreement with the encoder, and how tokens differ over an image.
ALIGNMENT = ("cka", "cknna", "mutual_knn")
SPATIAL = ("lds", "cds", "rmsc")


def path_of(run: RunDirectory) -> Path:
    """Where a run's profile stands, if it has one."""
    return run.path / "profile.json"


def picture_of(run: RunDirectory, baseline: RunDirectory | None = None) -> Path:
    """Where its picture stands, or that of the run beside a baseline."""
    return run.path / (f"profile-minus-{baseline.run_id}.png" if baseline else "profile.png")


def write(run: RunDirectory, profile: Mapping[str, Any]) -> None:
    """Replace a run's profile; see :func:`repa_lab.training.profile.profile_run`."""
    files.write_json(path_of(run), dict(profile))


def read(run: RunDirectory) -> dict[str, Any]:
    """A run's profile.

    Raises:
        FileNotFoundError: it has none.
    """
    return files.read_object(path_of(run))
