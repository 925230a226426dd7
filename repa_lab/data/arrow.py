"""Data sets of the `datasets` library: one that it saved to disk, or one of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import fingerprint_saved
from repa_lab.data.hub import HubData
from repa_lab.data.listing import caption_notes, find_caption_column
from repa_lab.data.settings import HubSettings, SavedSettings
from repa_lab.data.sources import Pictures

_SPLIT = "train"
_TEXT = ("string", "large_string")


def open_saved(settings: SavedSettings) -> SavedDataset:
    """Open a saved data set."""
    return SavedDataset(settings.folder, settings.side, settings.sizes, settings.caption_column)


def open_hub(settings: HubSettings) -> HubDataset:
    """Open a data set of the hub."""
    return HubDataset(settings.data, settings.side, settings.sizes, settings.caption_column)


class TableImages(Pictures):
    """Images of the rows of a table.

    The images are the first column of images, and the labels the first column of class labels. For the column of
    captions see :func:`repa_lab.data.listing.find_caption_column`; a row without a caption has the empty one.

    Args:
        rows: a map-style `datasets.Dataset`.
        place: the name of the data set in messages.
        fingerprint: see :class:`ImageSource`.
        resolution: pixels along each side.
        buckets: see :class:`Pictures`.
        captions: the column of captions.

    Raises:
        DataError: no column of images, or no texts in a column of that name.
    """

    _field = "path"

    def __init__(
        self,
        rows: Any,
        place: str,
        fingerprint: str,
        resolution: int,
        buckets: Buckets | None = None,
        captions: str | None = None,
    ) -> None:
        features = rows.features
        image, label = _column(features, "Image"), _column(features, "ClassLabel")
        if image is None:
            raise DataError(self._field, f"no column of images in '{place}'; there are: {', '.join(features)}")
        self._images = rows.select_columns([image]).with_format(None)
        self._column = image
        super().__init__(len(rows), resolution, buckets)
        self.num_classes = features[label].num_classes if label else 1
        self.labels = torch.tensor(rows[label] if label else [0] * len(self)).long()
        self.captions = _captions(rows, captions)
        self.notes = tuple(caption_notes(self.captions))
        self.fingerprint = fingerprint

    def open(self, index: int) -> Image.Image:
        """See :class:`Pictures`."""
        try:
            image: Image.Image | None = self._images[index][self._column]
        except OSError as error:
            raise DataError(self._field, f"cannot read the image of row {index}: {error}") from None
        if image is None:
            raise DataError(self._field, f"row {index} has no image")
        return image


class SavedDataset(TableImages):
    """Images of a folder that `Dataset.save_to_disk` wrote; of several splits, ``train``. See :class:`TableImages`.

    Raises:
        DataError: no such folder, no column of images, or no texts in the column of captions.
    """

    def __init__(
        self, folder: Path, resolution: int, buckets: Buckets | None = None, captions: str | None = None
    ) -> None:
        rows = load_rows(folder)
        super().__init__(
            rows, str(folder), fingerprint_saved(folder, resolution, buckets), resolution, buckets, captions
        )


class HubDataset(TableImages):
    """Images of a data set of the hub, downloaded if they are not in the cache of `datasets`. See :class:`TableImages`.

    Raises:
        DataError: the data set cannot be had, has no column of images, or no texts in the column of captions.
    """

    _field = "name"

    def __init__(
        self, data: HubData, resolution: int, buckets: Buckets | None = None, captions: str | None = None
    ) -> None:
        rows = load_hub_rows(data)
        super().__init__(rows, data.name, data.fingerprint(resolution, buckets), resolution, buckets, captions)


def load_rows(folder: Path) -> Any:
    """The rows of a saved data set.

    Raises:
        DataError: `datasets` is not installed, or the folder is none of its own.
    """
    _require_datasets()
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        message = f"'{folder}' is not what Dataset.save_to_disk writes: {_first_line(error)}"
        raise DataError("path", message) from None
    if not isinstance(found, DatasetDict):
        return found
    if _SPLIT not in found:
        raise DataError("path", f"no split '{_SPLIT}' in '{folder}'; there are: {', '.join(found)}")
    return found[_SPLIT]


def load_hub_rows(data: HubData) -> Any:
    """Return the rows of a split of a data set of the hub, at exactly its commit.

    A commit never changes, so a copy in the cache of `datasets` is taken without asking the hub.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be had, or there is no such split.
    """
    _require_datasets()
    from datasets import load_dataset_builder

    try:
        builder = _cached_builder(data)
        if builder is None:
            data.require_hub()  # asks once; `datasets` would ask for minutes
            builder = load_dataset_builder(data.name, data.config, revision=data.commit)
            builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:  # whatever a network, a full disk or a file of the data set can raise
        raise DataError("name", f"cannot load '{data.name}' at {data.commit[:8]}: {_first_line(error)}") from None
    try:
        return builder.as_dataset(split=data.split)
    except ValueError as error:
        raise DataError("split", f"cannot take '{data.split}' of '{data.name}': {_first_line(error)}") from None


def _cached_builder(data: HubData) -> Any:
    """The builder of a data set that `datasets` has prepared before, or None; its folder is called after the commit."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, own = data.name.split("/")
    name = camelcase_to_snakecase(own)
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, name])
    places = [path for path in root.glob(f"{data.config or '*'}/*/{data.commit}") if path.is_dir()]
    if len(places) != 1:  # of several configs the hub says which is the default
        return None
    config, version = places[0].parts[-3:-1]
    return Cache(repo_id=data.name, dataset_name=name, config_name=config, version=version, hash=data.commit)


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError("source", "the library `datasets` is missing: pip install repa-lab[datasets]") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _column(features: Any, kind: str) -> str | None:
    return next((name for name, feature in features.items() if type(feature).__name__ == kind), None)


def _captions(rows: Any, asked: str | None) -> Sequence[str]:
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) in _TEXT]
    if asked in rows.features and asked not in texts:
        message = f"column '{asked}' holds no texts; of texts there are: {', '.join(texts) or 'none'}"
        raise DataError("caption_column", message)
    column = find_caption_column(texts if asked is None else list(rows.features), asked)
    return [str(text or "") for text in rows[column]] if column else ()
