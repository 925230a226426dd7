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
from repa_lab.data.hub import HubData, resolve_commit
from repa_lab.data.layout import fingerprint_prepared
from repa_lab.data.listing import read_image_folder
from repa_lab.spec import DataConfig, EncoderConfig
from repa_lab.spec.schema import FOLDER_SOURCES

UNSET_DATA = "unset"
_FILES = ("weights", "tae")  # of an encoder
_FINGERPRINTS: dict[str, Callable[[DataConfig], str]] = {
    "digits": lambda data: fingerprint_digits(),
    "imagefolder": lambda data: fingerprint_folder(
        Path(data.path or ""), data.side, buckets_of(data), data.caption_column
    ),
    "datasets": lambda data: fingerprint_saved(Path(data.path or ""), data.side, buckets_of(data)),
    "repa": lambda data: fingerprint_prepared(Path(data.path or ""), data.side),
    "hub": lambda data: hub_data(data).fingerprint(data.side, buckets_of(data)),
}


def buckets_of(data: DataConfig) -> Buckets | None:
    """The sizes that images are given, if not all are square."""
    return Buckets(data.side, data.buckets.step, data.buckets.max_aspect) if data.buckets else None


def fingerprint_of(data: DataConfig) -> str:
    """The data set of these settings.

    Raises:
        DataError: it is not there.
    """
    return UNSET_DATA if is_unset(data) else _FINGERPRINTS[data.source](data)


def is_unset(data: DataConfig) -> bool:
    """Return whether the settings are of a folder and name none."""
    return data.source in FOLDER_SOURCES and data.path is None


def hub_data(data: DataConfig) -> HubData:
    """Return the data set of the hub that the settings name, at the commit its revision stands for.

    Raises:
        DataError: see :func:`resolve_commit`.
    """
    assert data.name is not None
    return HubData(data.name, data.config, data.split, resolve_commit(data.name, data.revision))


def pinned(data: DataConfig) -> DataConfig:
    """Return the settings with a branch or a tag of the hub replaced by its commit, which is what a run records.

    Raises:
        DataError: see :func:`resolve_commit`.
    """
    return data.model_copy(update={"revision": hub_data(data).commit}) if data.source == "hub" else data


def notes_of(data: DataConfig) -> tuple[str, ...]:
    """Return what was left out of a folder of images or is missing there; other sources say it when they are opened.

    Raises:
        DataError: see :func:`read_image_folder`.
    """
    if data.source != "imagefolder" or data.path is None:
        return ()
    return read_image_folder(Path(data.path), data.caption_column).notes


def content_of(place: str) -> str:
    """What stands for a file or folder of weights: its content; for what is neither, its name at the hub."""
    path = Path(place)
    if path.is_file():
        return file_digest(path)
    return fingerprint_files(path) if path.is_dir() else place


def described(encoder: EncoderConfig) -> dict[str, Any]:
    """An encoder's settings with its files by their content: two of one description give the same tokens."""
    settings = encoder.model_dump(mode="json")
    return settings | {name: settings[name] and content_of(settings[name]) for name in _FILES}
