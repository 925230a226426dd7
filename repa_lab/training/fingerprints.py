"""What stands for a run's data and its local weights in its identity; imports no torch, so that `plan` can say it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.align.settings import EncoderSettings
from repa_lab.data.fingerprint import fingerprint_files
from repa_lab.data.settings import SOURCES, Dataset, SourceSettings
from repa_lab.encoders.registry import token_identity
from repa_lab.files import file_digest
from repa_lab.settings import file_fields
from repa_lab.spec import RunConfig


@dataclass
class Inventory:
    """The data sets and local weights of a sweep: each folder is listed, and each file read, once for as long as this lives."""

    _datasets: dict[SourceSettings, Dataset] = field(default_factory=dict)
    _contents: dict[str, str] = field(default_factory=dict)

    def dataset(self, data: SourceSettings) -> Dataset:
        """Return what is known of a data set.

        Raises:
            DataError: it is not there, or incomplete.
        """
        key = data.model_copy(update={"holdout": None, "flip": False, "vae": None})
        if key not in self._datasets:
            self._datasets[key] = SOURCES[data.source].describe(key)
        return self._datasets[key]

    def content(self, place: str) -> str:
        """See :func:`content_of`."""
        if place not in self._contents:
            self._contents[place] = content_of(place)
        return self._contents[place]

    def resolve(self, config: RunConfig) -> RunConfig:
        """Return the settings that a run records: the number of images that are held out, and the commit of a hub's
        data set.

        Raises:
            DataError: see :meth:`dataset`.
        """
        data = config.data.pinned()
        if data.holdout is None:
            data = data.model_copy(update={"holdout": data.held_out(self.dataset(config.data).images)})
        return config.model_copy(update={"data": data})


def content_of(place: str) -> str:
    """What stands for a file or folder of weights: its content; for what is neither, its name at the hub."""
    path = Path(place)
    if path.is_file():
        return file_digest(path)
    return fingerprint_files(path) if path.is_dir() else place


def described(encoder: EncoderSettings) -> dict[str, Any]:
    """Return an encoder's settings with its files by their content: equal descriptions give the same tokens."""
    settings = encoder.model_dump(mode="json")
    files = {name: content_of(value) for name, value, _ in file_fields(encoder)}
    return settings | files | token_identity(encoder.name)
