"""What stands for a run's data and its local weights in its identity; imports no torch, so that `plan` can say it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.data.crop import Buckets
from repa_lab.data.fingerprint import (
    file_digest,
    fingerprint_digits,
    fingerprint_files,
    fingerprint_images,
    fingerprint_saved,
)
from repa_lab.data.hub import HubData, resolve_commit
from repa_lab.data.layout import read_listing
from repa_lab.data.listing import read_image_folder
from repa_lab.data.saved import read_saved
from repa_lab.encoders.registry import token_identity
from repa_lab.spec import DataConfig, EncoderSettings, RunConfig
from repa_lab.spec.schema import FOLDER_SOURCES

UNSET_DATA = "unset"
_FILES = ("weights", "tae")  # of an encoder
_DIGITS = (1797, 10)  # images, classes


@dataclass(frozen=True)
class Dataset:
    """What a data set is, as far as it can be told without reading its images.

    Attributes:
        fingerprint: stands for it in the identity of runs.
        images: their number; None where it is not known, or no folder is given.
        classes: the number of their labels.
        has_captions: whether there are any.
        notes: what was left out, a sentence each.
    """

    fingerprint: str
    images: int | None
    classes: int = 1
    has_captions: bool = False
    notes: tuple[str, ...] = ()


@dataclass
class Inventory:
    """The data sets and local weights of a sweep: each folder is listed, and each file read, once for as long as this lives."""

    _datasets: dict[DataConfig, Dataset] = field(default_factory=dict)
    _contents: dict[str, str] = field(default_factory=dict)

    def dataset(self, data: DataConfig) -> Dataset:
        """Return what is known of a data set.

        Raises:
            DataError: it is not there, or incomplete.
        """
        key = data.model_copy(update={"holdout": None, "flip": False, "vae": None})
        if key not in self._datasets:
            self._datasets[key] = _open(key)
        return self._datasets[key]

    def content(self, place: str) -> str:
        """See :func:`content_of`."""
        if place not in self._contents:
            self._contents[place] = content_of(place)
        return self._contents[place]

    def resolve(self, config: RunConfig) -> RunConfig:
        """Return the settings that a run records: the number of images that are held out, and the commit of a hub's data set.

        Raises:
            DataError: see :meth:`dataset`.
        """
        data = pinned(config.data)
        if data.holdout is None:
            data = data.model_copy(update={"holdout": data.held_out(self.dataset(config.data).images)})
        return config.model_copy(update={"data": data})


def buckets_of(data: DataConfig) -> Buckets | None:
    """The sizes that images are given, if not all are square."""
    return Buckets(data.side, data.buckets.step, data.buckets.max_aspect) if data.buckets else None


def fingerprint_of(data: DataConfig) -> str:
    """Return what stands for the data set of these settings.

    Raises:
        DataError: it is not there.
    """
    return _open(data).fingerprint


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


def _open(data: DataConfig) -> Dataset:
    return Dataset(UNSET_DATA, None) if is_unset(data) else _DATASETS[data.source](data, Path(data.path or ""))


def _digits(data: DataConfig, folder: Path) -> Dataset:
    return Dataset(fingerprint_digits(), *_DIGITS)


def _folder(data: DataConfig, folder: Path) -> Dataset:
    images = read_image_folder(folder, data.caption_column)
    fingerprint = fingerprint_images(images, data.side, buckets_of(data))
    names = [path.parts[len(folder.parts) :] for path in images.files]
    classes = len({parts[0] if len(parts) > 1 else "" for parts in names})
    return Dataset(fingerprint, len(images.files), classes, bool(images.captions), images.notes)


def _saved(data: DataConfig, folder: Path) -> Dataset:
    fingerprint = fingerprint_saved(folder, data.side, buckets_of(data))
    facts = read_saved(folder, data.caption_column)
    return Dataset(fingerprint, facts.rows, facts.classes, facts.captions is not None)


def _prepared(data: DataConfig, folder: Path) -> Dataset:
    listing = read_listing(folder)
    return Dataset(listing.fingerprint(data.side), len(listing), max(listing.labels) + 1)


def _hub(data: DataConfig, folder: Path) -> Dataset:
    """The hub's card says how many images there are, not whether they have captions: the run finds that out."""
    found = hub_data(data)
    return Dataset(found.fingerprint(data.side, buckets_of(data)), found.count(), has_captions=True)


_DATASETS: dict[str, Callable[[DataConfig, Path], Dataset]] = {
    "digits": _digits,
    "imagefolder": _folder,
    "datasets": _saved,
    "repa": _prepared,
    "hub": _hub,
}


def content_of(place: str) -> str:
    """What stands for a file or folder of weights: its content; for what is neither, its name at the hub."""
    path = Path(place)
    if path.is_file():
        return file_digest(path)
    return fingerprint_files(path) if path.is_dir() else place


def described(encoder: EncoderSettings) -> dict[str, Any]:
    """Return an encoder's settings with its files by their content: equal descriptions give the same tokens."""
    settings = encoder.model_dump(mode="json")
    files = {name: settings[name] and content_of(settings[name]) for name in _FILES}
    return settings | files | token_identity(encoder.name)
