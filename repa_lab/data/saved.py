"""What a data set on disk that `Dataset.save_to_disk` wrote says of itself, without loading `datasets` or an image."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repa_lab.data.errors import DataError
from repa_lab.data.listing import find_caption_column

_SPLIT, _TEXT = "train", ("string", "large_string")


@dataclass(frozen=True)
class SavedFacts:
    """A saved data set.

    Attributes:
        rows: their number.
        classes: the number of its labels, 1 without any.
        captions: the column of captions, or None.
    """

    rows: int
    classes: int
    captions: str | None


def read_saved(folder: Path, captions: str | None = None) -> SavedFacts:
    """Read the features and count the rows of a saved data set; of several splits, those of ``train``.

    Args:
        folder: the data set.
        captions: the column of captions; None takes ``text``, ``caption`` or ``prompt``.

    Raises:
        DataError: `datasets` is not installed, the folder is none of its own, or it lacks a column.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError("source", "the library `datasets` is missing: pip install repa-lab[datasets]")
    try:
        part = folder / _split(folder) if (folder / "dataset_dict.json").is_file() else folder
        features = json.loads((part / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        files = [part / file["filename"] for file in json.loads((part / "state.json").read_bytes())["_data_files"]]
        kinds = {name: feature.get("_type") for name, feature in features.items()}
        rows = sum(map(_rows, files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("path", f"'{folder}' is not what Dataset.save_to_disk writes: {type(error).__name__}") from None
    if "Image" not in kinds.values():
        raise DataError("path", f"no column of images in '{folder}'; there are: {', '.join(kinds)}")
    labels = [feature["names"] for feature in features.values() if feature.get("_type") == "ClassLabel"]
    return SavedFacts(rows, len(labels[0]) if labels else 1, _captions(features, captions))


def _split(folder: Path) -> str:
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if _SPLIT not in splits:
        raise DataError("path", f"no split '{_SPLIT}' in '{folder}'; there are: {', '.join(splits)}")
    return _SPLIT


def _rows(file: Path) -> int:
    import pyarrow.ipc  # which `datasets` brings

    with pyarrow.memory_map(str(file)) as mapped:
        return int(pyarrow.ipc.open_stream(mapped).read_all().num_rows)


def _captions(features: dict[str, Any], asked: str | None) -> str | None:
    texts = [name for name, feature in features.items() if feature.get("dtype") in _TEXT]
    if asked in features and asked not in texts:
        message = f"column '{asked}' holds no texts; of texts there are: {', '.join(texts) or 'none'}"
        raise DataError("caption_column", message)
    return find_caption_column(texts if asked is None else list(features), asked)
