"""Data sets of Hugging Face: those of the hub, and folders that `Dataset.save_to_disk` wrote. Imports no torch.

What `plan` asks is answered without loading `datasets`, an image or, for the hub, any data.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.listing import find_caption_column, fingerprint_files, list_files
from repa_lab.files import digest
from repa_lab.timm_models import reason

_SPLIT = "train"
_TEXT = ("string", "large_string")
_LABELS = ("label", "labels")  # columns that look like classes
_CACHE = "cache-*.arrow"  # what `datasets` leaves beside a data set that it maps or filters
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST_ROWS = re.compile(r"(.+?)\[:(\d+)\]")  # a split's first rows, as `datasets` writes them
_NOT_SAVED = "is not what Dataset.save_to_disk writes"
_TIMEOUT_S = 5
_REMEMBERED_S = 60
_HubFacts = tuple[str, Mapping[tuple[str, str], int]]  # commit, and number of rows by configuration and split


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        image: the first column of images.
        label: the first column of class labels, or None.
        classes: number of classes, 1 without labels.
        captions: the column of captions, or None.
        notes: what is not read though its name suggests it, a sentence each.
    """

    image: str
    label: str | None
    classes: int
    captions: str | None
    notes: tuple[str, ...] = ()


def read_columns(
    features: Mapping[str, Any], table: Any, name: str, captions: str | None, field: str = "path"
) -> Columns:
    """Choose the columns of a table, and refuse rows that cannot be trained on.

    No image is read, so an image that cannot be decoded is found later.

    Args:
        features: the features of the table, as `datasets` writes them to JSON.
        table: the `pyarrow.Table` of all rows.
        name: the name of the table in messages.
        captions: the column of captions; None takes ``text``, ``caption`` or ``prompt``, the first there is.
        field: the setting that names the table, for errors.

    Raises:
        DataError: there is no row, no column of images, no texts in the column of captions, or a row without an image
            or without one of the classes, which the message names.
    """
    plain = {column: feature for column, feature in features.items() if isinstance(feature, Mapping)}
    kinds = {column: feature.get("_type") for column, feature in plain.items()}
    image, label = (next((name for name in kinds if kinds[name] == kind), None) for kind in ("Image", "ClassLabel"))
    if image is None:
        raise DataError(field, f"no column of images in '{name}'; there are: {', '.join(features)}")
    texts = [column for column, feature in plain.items() if feature.get("dtype") in _TEXT]
    if captions in features and captions not in texts:
        message = f"column '{captions}' holds no texts; of texts there are: {', '.join(texts) or 'none'}"
        raise DataError("caption_column", message)
    captions = find_caption_column(texts if captions is None else list(features), captions)
    notes = tuple(
        f"column '{column}' of '{name}' holds {plain[column].get('dtype', kinds[column])} and no ClassLabel, "
        "so all images are one class: cast it with Dataset.cast_column, or class_encode_column for texts"
        for column in _LABELS
        if column in plain and label is None
    )
    columns = Columns(image, label, len(plain[label]["names"]) if label else 1, captions, notes)
    _require_rows(table, columns, name, field)
    return columns


def _require_rows(table: Any, columns: Columns, name: str, field: str) -> None:
    """Refuse a table without rows, or with a row that has no image, or none of the classes."""
    import pyarrow
    from pyarrow import compute

    def refuse(column: str, rows: Sequence[int], reason: Callable[[int], str]) -> None:
        if rows:
            others = f" ({len(rows):,} such rows)" if len(rows) > 1 else ""
            raise DataError(field, f"'{name}', row {rows[0]}, column '{column}': {reason(rows[0])}{others}")

    def where(condition: Any) -> list[int]:
        rows: list[int] = compute.indices_nonzero(condition).to_pylist()
        return rows

    if not table.num_rows:
        raise DataError(field, f"'{name}' has no rows")
    if pyarrow.types.is_struct(table[columns.image].type):
        content, path = (compute.struct_field(table[columns.image], part) for part in ("bytes", "path"))
        is_filled = compute.fill_null(compute.greater(compute.binary_length(content), 0), False)
        is_file = compute.and_(compute.is_null(content), compute.is_valid(path))
        refuse(columns.image, where(compute.invert(compute.or_(is_filled, is_file))), lambda row: "no image")
        files = {row: path[row].as_py() for row in where(is_file)}
        missing = [row for row, file in files.items() if "://" not in file and not Path(file).is_file()]
        refuse(columns.image, missing, lambda row: f"no file '{files[row]}'")
    if columns.label:
        labels, advice = table[columns.label], "leave such rows out, or remove the column to train without classes"
        is_class = compute.and_(compute.greater_equal(labels, 0), compute.less(labels, columns.classes))
        unlabelled = where(compute.invert(compute.fill_null(is_class, False)))
        known = f"is none of the {columns.classes:,} classes, which are numbered from 0"
        refuse(columns.label, unlabelled, lambda row: f"{json.dumps(labels[row].as_py())} {known}: {advice}")


def fingerprint_saved(folder: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """Return a digest of the files of a saved data set and of the resolution that its images are read at.

    Raises:
        DataError: there is no such folder, or a link in it leads nowhere.
    """
    list_files(folder)
    content = {"source": "datasets", "files": fingerprint_files(folder, but=_CACHE), "resolution": resolution}
    return digest({**content, "buckets": asdict(buckets) if buckets else None})


def read_saved(folder: Path, captions: str | None = None) -> tuple[int, Columns]:
    """Return the number of rows of a saved data set and its columns; of several splits, those of ``train``.

    Args:
        captions: the column of captions; see :func:`read_columns`.

    Raises:
        DataError: `datasets` is not installed, the folder holds something else, or a column is missing.
    """
    _require_datasets()
    import pyarrow.ipc  # which `datasets` brings

    try:
        split = _split_of(folder)
        features = json.loads((split / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        files = [split / file["filename"] for file in json.loads((split / "state.json").read_bytes())["_data_files"]]
        if not files:
            raise DataError("path", f"'{folder}' has no rows")
        streams = (pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) for file in files)
        table = pyarrow.concat_tables([stream.read_all() for stream in streams])
        return table.num_rows, read_columns(features, table, str(folder), captions)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("path", f"'{folder}' {_NOT_SAVED}: {type(error).__name__}") from None


def load_saved(folder: Path) -> Any:
    """Load the rows of a saved data set, a map-style `datasets.Dataset`; of several splits, those of ``train``.

    Raises:
        DataError: `datasets` is not installed, or the folder holds something else.
    """
    _require_datasets()
    from datasets import load_from_disk

    try:
        return load_from_disk(str(_split_of(folder)))
    except IndexError:  # there is no file, because there is no row
        raise DataError("path", f"'{folder}' has no rows") from None
    except (OSError, ValueError, KeyError) as error:
        raise DataError("path", f"'{folder}' {_NOT_SAVED}: {reason(error)}") from None


def _split_of(folder: Path) -> Path:
    """Return the folder of the rows of a saved data set; of several splits, that of ``train``."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return folder
    splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
    if _SPLIT not in splits:
        raise DataError("path", f"no split '{_SPLIT}' in '{folder}'; there are: {', '.join(splits)}")
    return folder / _SPLIT


def count_rows(name: str, config: str | None, split: str, commit: str) -> int | None:
    """Return the number of rows of a split that the hub's card of a data set gives, or None if it gives none."""
    if first := _FIRST_ROWS.fullmatch(split):
        return int(first[2])
    try:
        _, rows = _hub_facts(name, commit)
    except DataError:
        return None
    configs = {config for config, _ in rows}
    return rows.get((config or (configs.pop() if len(configs) == 1 else "default"), split))


def resolve_commit(name: str, revision: str | None) -> str:
    """Return the commit of a branch, a tag or a commit; None is the main branch. A commit is not looked up.

    The hub's answer stays for as long as the process, so that a branch that moves does not part a sweep.

    Raises:
        DataError: the hub cannot be reached, or has no such data set or revision.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    return _hub_facts(name, revision)[0]


def load_hub(name: str, config: str | None, split: str, commit: str) -> Any:
    """Load the rows of a split of a data set of the hub, at exactly this commit.

    A commit never changes, so a copy in the cache of `datasets` is taken without asking the hub.

    Args:
        name: the id of the data set, ``owner/name``.
        config: its configuration (subset); None is the default one.
        split: the split, or a slice of one such as ``train[:1000]``.
        commit: 40 hexadecimal digits.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or there is no such split.
    """
    _require_datasets()
    from datasets import load_dataset_builder

    try:
        builder = _cached_builder(name, config, commit)
        if builder is None:
            _hub_facts(name, commit)  # asks once; `datasets` would ask for minutes
            builder = load_dataset_builder(name, config, revision=commit)
            builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:  # whatever a network, a full disk or a file of the data set can raise
        raise DataError("name", f"cannot load '{name}' at {commit[:8]}: {reason(error)}") from None
    try:
        return builder.as_dataset(split=split)
    except ValueError as error:
        raise DataError("split", f"cannot take '{split}' of '{name}': {reason(error)}") from None


def _cached_builder(name: str, config: str | None, commit: str) -> Any:
    """Return the builder of a data set in the cache of `datasets`, whose folder is named by the commit, or None."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, last = name.split("/")
    snake = camelcase_to_snakecase(last)
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, snake])
    places = [path for path in root.glob(f"{config or '*'}/*/{commit}") if path.is_dir()]
    if len(places) != 1:  # of several configs the hub says which is the default
        return None
    found, version = places[0].parts[-3:-1]
    return Cache(repo_id=name, dataset_name=snake, config_name=found, version=version, hash=commit)


@functools.cache
def _hub_facts(name: str, revision: str | None) -> _HubFacts:
    """Return what the hub says of a data set.

    Raises:
        DataError: the hub cannot be reached, or has no such data set or revision.
    """
    answer = _ask_hub(name, revision, int(time.monotonic() // _REMEMBERED_S))
    if isinstance(answer, DataError):
        raise answer
    return answer


@functools.lru_cache(maxsize=64)
def _ask_hub(name: str, revision: str | None, minute: int) -> _HubFacts | DataError:
    """Ask the hub once; a refusal is remembered for about a minute, because every arm of a sweep asks."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
        card: Any = info.card_data
        infos = card and card.get("dataset_info")  # a mapping, or a list of one for each configuration
        rows = {
            (info.get("config_name", "default"), split["name"]): split["num_examples"]
            for info in (infos if isinstance(infos, list) else [infos] if isinstance(infos, dict) else [])
            for split in info.get("splits") or []
            if isinstance(split.get("num_examples"), int)
        }
        return str(info.sha), rows
    except HFValidationError as error:
        return DataError("name", f"'{name}' is no id of a data set: {reason(error)}")
    except GatedRepoError:
        return DataError("name", f"'{name}' is gated: ask for access on its page, then run `hf auth login`")
    except RepositoryNotFoundError:
        return DataError("name", f"the hub has no data set '{name}'; if it is private, run `hf auth login`")
    except RevisionNotFoundError:
        return DataError("revision", f"'{name}' has no revision '{revision}'")
    except HfHubHTTPError as error:
        return DataError("name", f"the hub refuses '{name}': {reason(error)}")
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses
        advice = "go online, or give as data.revision the commit of a copy in the local cache"
        return DataError("name", f"the hub cannot be reached for '{name}' ({reason(error)}): {advice}")


def _require_datasets() -> None:
    if importlib.util.find_spec("datasets") is None:
        raise DataError("source", "the library `datasets` is missing: pip install repa-lab[datasets]")
