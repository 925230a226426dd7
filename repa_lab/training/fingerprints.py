"""What stands for a run's data and its local weights in its identity; imports no torch, so that `plan` can say it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa_lab.data.crop import Buckets
from repa_lab.data.fingerprint import (
    file_digest,
    fingerprint_digits,
    fingerprint_files,
    fingerprint_folder,
    fingerprint_saved,
)
from repa_lab.data.layout import fingerprint_prepared
from repa_lab.spec import DataConfig, EncoderSettings

UNSET_DATA = "unset"
_FILES = ("weights", "tae")  # of an encoder
_FINGERPRINTS: dict[str, Callable[[Path, int, Buckets | None], str]] = {
    "imagefolder": fingerprint_folder,
    "datasets": fingerprint_saved,
    "repa": fingerprint_prepared,
}


def buckets_of(data: DataConfig) -> Buckets | None:
    """The sizes that images are given, if not all are square."""
    return Buckets(data.side, data.buckets.step, data.buckets.max_aspect) if data.buckets else None


def fingerprint_of(data: DataConfig) -> str:
    """The data set of these settings.

    Raises:
        DataError: it is not there.
    """
    if data.source == "digits":
        return fingerprint_digits()
    return _FINGERPRINTS[data.source](Path(data.path), data.side, buckets_of(data)) if data.path else UNSET_DATA


def content_of(place: str) -> str:
    """What stands for a file or folder of weights: its content; for what is neither, its name at the hub."""
    path = Path(place)
    if path.is_file():
        return file_digest(path)
    return fingerprint_files(path) if path.is_dir() else place


def described(encoder: EncoderSettings) -> dict[str, Any]:
    """An encoder's settings with its files by their content: two of one description give the same tokens."""
    settings = encoder.model_dump(mode="json")
    return settings | {name: settings[name] and content_of(settings[name]) for name in _FILES}
