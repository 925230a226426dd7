"""A data set that the `datasets` library saved to disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import fingerprint_saved
from repa_lab.data.sources import Pictures

_CAPTIONS = ("text", "caption", "prompt")
_SPLIT = "train"
_TEXT = ("string", "large_string")


class SavedDataset(Pictures):
    """Images of a folder that `Dataset.save_to_disk` wrote; of several splits, ``train``.

    The images are the first column of images, the labels the first column of class labels, and the captions the column that is
    named or else called ``text``, ``caption`` or ``prompt``.

    Args:
        folder: the folder.
        resolution: pixels along each side.
        buckets: see :class:`Pictures`.
        captions: the column of captions.

    Raises:
        DataError: no such folder, no column of images, or no column of that name.
    """

    def __init__(self, folder: Path, resolution: int, buckets: Buckets | None = None, captions: str | None = None) -> None:
        self._rows = load_rows(folder)
        features = self._rows.features
        image, label = _column(features, "Image"), _column(features, "ClassLabel")
        if image is None:
            raise DataError("path", f"no column of images in '{folder}'; there are: {', '.join(features)}")
        self._images = self._rows.select_columns([image]).with_format(None)
        self._column = image
        super().__init__(len(self._rows), resolution, buckets)
        self.num_classes = features[label].num_classes if label else 1
        self.labels = torch.tensor(self._rows[label] if label else [0] * len(self)).long()
        self.captions = _captions(self._rows, captions)
        self.fingerprint = fingerprint_saved(folder, resolution, buckets)

    def open(self, index: int) -> Image.Image:
        """See :class:`Pictures`."""
        try:
            image: Image.Image | None = self._images[index][self._column]
        except OSError as error:
            raise DataError("path", f"cannot read the image of row {index}: {error}") from None
        if image is None:
            raise DataError("path", f"row {index} has no image")
        return image


def load_rows(folder: Path) -> Any:
    """The rows of a saved data set.

    Raises:
        DataError: `datasets` is not installed, or the folder is none of its own.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise DataError("source", "the library `datasets` is missing: pip install repa-lab[datasets]") from None
    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        message = f"'{folder}' is not what Dataset.save_to_disk writes: {str(error).splitlines()[0]}"
        raise DataError("path", message) from None
    if not isinstance(found, DatasetDict):
        return found
    if _SPLIT not in found:
        raise DataError("path", f"no split '{_SPLIT}' in '{folder}'; there are: {', '.join(found)}")
    return found[_SPLIT]


def _column(features: Any, kind: str) -> str | None:
    return next((name for name, feature in features.items() if type(feature).__name__ == kind), None)


def _captions(rows: Any, column: str | None) -> Sequence[str]:
    if column is not None and column not in rows.features:
        raise DataError("caption_column", f"no column '{column}'; there are: {', '.join(rows.features)}")
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) in _TEXT]
    if column is not None and column not in texts:
        raise DataError("caption_column", f"column '{column}' holds no texts; of texts there are: {', '.join(texts) or 'none'}")
    found = column or next((name for name in _CAPTIONS if name in texts), None)
    return [str(text or "") for text in rows[found]] if found else ()
