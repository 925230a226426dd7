"""Data sets of Hugging Face: those of the hub, and folders that `Dataset.save_to_disk` wrote. Imports no torch.

What `plan` asks is answered without loading `datasets`, an image or, for the hub, any data.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.listing import find_caption_column, fingerprint_files, require_targets, walk
from repa_lab.files import digest

_SPLIT = "train"
_TEXT = ("string", "large_string")
_LABELS = ("label", "labels")  # columns that look like classes
_CACHE = "cache-*.arrow"  # what `datasets` leaves beside a data set that it maps or filters
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST_ROWS = re.compile(r"(.+?)\[:(\d+)\]")  # a split's first rows, as `datasets` writes them
_TIMEOUT_S = 5
_REMEMBERED_S = 60


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


def find_columns(features: Mapping[str, Any], place: str, captions: str | None, field: str = "path") -> Columns:
    """Choose the columns of a table.

    Args:
        features: the features of the table, as `datasets` writes them to JSON.
        place: the name of the table in messages.
        captions: the column of captions; None takes ``text``, ``caption`` or ``prompt``, the first there is.
        field: the setting that names the table, for errors.

    Raises:
        DataError: there is no column of images, or no texts in the column of captions.
    """
    plain = {name: feature for name, feature in features.items() if isinstance(feature, Mapping)}
    kinds = {name: feature.get("_type") for name, feature in plain.items()}
    image, label = (next((name for name in kinds if kinds[name] == kind), None) for kind in ("Image", "ClassLabel"))
    if image is None:
        raise DataError(field, f"no column of images in '{place}'; there are: {', '.join(features)}")
    texts = [name for name, feature in plain.items() if feature.get("dtype") in _TEXT]
    if captions in features and captions not in texts:
        message = f"column '{captions}' holds no texts; of texts there are: {', '.join(texts) or 'none'}"
        raise DataError("caption_column", message)
    column = find_caption_column(texts if captions is None else list(features), captions)
    notes = tuple(
        f"column '{name}' of '{place}' holds {plain[name].get('dtype', kinds[name])} and no ClassLabel, "
        "so all images are one class: cast it with Dataset.cast_column, or class_encode_column for texts"
        for name in _LABELS
        if name in plain and label is None
    )
    return Columns(image, label, len(plain[label]["names"]) if label else 1, column, notes)


def fingerprint_saved(folder: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """Return a digest of the files of a saved data set and of the resolution that its images are read at.

    Raises:
        DataError: there is no such folder, or a link in it leads nowhere.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    require_targets(walk(folder).files)
    content = {"source": "datasets", "files": fingerprint_files(folder, but=_CACHE), "resolution": resolution}
    return digest({**content, "buckets": asdict(buckets) if buckets else None})


def read_saved(folder: Path, captions: str | None = None) -> tuple[int, Columns]:
    """Return the number of rows of a saved data set and its columns; of several splits, those of ``train``.

    Args:
        captions: the column of captions; see :func:`find_columns`.

    Raises:
        DataError: `datasets` is not installed, the folder holds something else, or a column is missing.
    """
    if importlib.util.find_spec("datasets") is None:
        raise _datasets_missing()
    try:
        split = folder
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if _SPLIT not in splits:
                raise _no_split(folder, splits)
            split = folder / _SPLIT
        features = json.loads((split / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        files = [split / file["filename"] for file in json.loads((split / "state.json").read_bytes())["_data_files"]]
        columns = find_columns(features, str(folder), captions)
        if not files:
            raise _no_rows(str(folder))
        require_rows(table := _concatenated(files), columns, str(folder))
        return table.num_rows, columns
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_saved(folder, type(error).__name__) from None


def _concatenated(files: Sequence[Path]) -> Any:
    """Return the table of some Arrow files, mapped into memory."""
    import pyarrow.ipc  # which `datasets` brings

    streams = (pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) for file in files)
    return pyarrow.concat_tables([stream.read_all() for stream in streams])


def require_rows(table: Any, columns: Columns, place: str, field: str = "path") -> None:
    """Refuse a table with a row that cannot be trained on: one without an image, or without one of the classes.

    No image is read, so an image that cannot be decoded is found later.

    Args:
        table: the `pyarrow.Table` of all rows.
        place: the name of the table in messages.
        field: the setting that names the table, for errors.

    Raises:
        DataError: the table has no rows, or such a row, which the message names.
    """
    import pyarrow
    from pyarrow import compute

    def refuse(column: str, rows: Sequence[int], reason: Callable[[int], str]) -> None:
        if rows:
            others = f" ({len(rows):,} such rows)" if len(rows) > 1 else ""
            raise DataError(field, f"'{place}', row {rows[0]}, column '{column}': {reason(rows[0])}{others}")

    def where(condition: Any) -> list[int]:
        rows: list[int] = compute.indices_nonzero(condition).to_pylist()
        return rows

    if not table.num_rows:
        raise _no_rows(place, field)
    if pyarrow.types.is_struct(table[columns.image].type):
        content, path = (compute.struct_field(table[columns.image], name) for name in ("bytes", "path"))
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


def load_rows(folder: Path) -> Any:
    """Load the rows of a saved data set, a map-style `datasets.Dataset`; of several splits, those of ``train``.

    Raises:
        DataError: `datasets` is not installed, or the folder holds something else.
    """
    _require_datasets()
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(folder))
    except IndexError:  # there is no file, because there is no row
        raise _no_rows(str(folder)) from None
    except (OSError, ValueError) as error:
        raise _not_saved(folder, _first_line(error)) from None
    if isinstance(rows, DatasetDict):
        if _SPLIT not in rows:
            raise _no_split(folder, rows)
        return rows[_SPLIT]
    return rows


@dataclass(frozen=True)
class HubData:
    """A split of a data set of the hub at a commit.

    Attributes:
        name: the id of the data set, ``owner/name``.
        config: its configuration (subset); None is the default one.
        split: the split, or a slice of one such as ``train[:1000]``.
        commit: 40 hexadecimal digits.
    """

    name: str
    config: str | None
    split: str
    commit: str

    def fingerprint(self, resolution: int, buckets: Buckets | None = None) -> str:
        """Return a digest of what is read and of the resolution; a commit stands for its content."""
        shape = {"resolution": resolution, "buckets": asdict(buckets) if buckets else None}
        return digest({"source": "hub", **asdict(self), **shape})

    def count(self) -> int | None:
        """Return the number of rows that the hub's card of the data set gives, or None if it gives none."""
        first = _FIRST_ROWS.fullmatch(self.split)
        if first:
            return int(first[2])
        try:
            rows = _hub_facts(self.name, self.commit).rows
        except DataError:
            return None
        configs = {config for config, _ in rows}
        config = self.config or (configs.pop() if len(configs) == 1 else "default")
        return rows.get((config, self.split))


def resolve_commit(name: str, revision: str | None) -> str:
    """Return the commit of a branch, a tag or a commit; None is the main branch. A commit is not looked up.

    The hub's answer stays for as long as the process, so that a branch that moves does not part a sweep.

    Raises:
        DataError: the hub cannot be reached, or has no such data set or revision.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    return _hub_facts(name, revision).commit


def load_hub_rows(data: HubData) -> Any:
    """Load the rows of a split of a data set of the hub, at exactly its commit.

    A commit never changes, so a copy in the cache of `datasets` is taken without asking the hub.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or there is no such split.
    """
    _require_datasets()
    from datasets import load_dataset_builder

    try:
        builder = _cached_builder(data)
        if builder is None:
            _hub_facts(data.name, data.commit)  # asks once; `datasets` would ask for minutes
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
    """Return the builder of a data set in the cache of `datasets`, whose folder is named by the commit, or None."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, last = data.name.split("/")
    name = camelcase_to_snakecase(last)
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, name])
    places = [path for path in root.glob(f"{data.config or '*'}/*/{data.commit}") if path.is_dir()]
    if len(places) != 1:  # of several configs the hub says which is the default
        return None
    config, version = places[0].parts[-3:-1]
    return Cache(repo_id=data.name, dataset_name=name, config_name=config, version=version, hash=data.commit)


@dataclass(frozen=True)
class _HubFacts:
    """What the hub says of a data set: its commit, and the number of rows by configuration and split."""

    commit: str
    rows: Mapping[tuple[str, str], int]


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
        return _HubFacts(str(info.sha), _rows_by_split(card and card.get("dataset_info")))
    except HFValidationError as error:
        return DataError("name", f"'{name}' is no id of a data set: {_shortened(error)}")
    except GatedRepoError:
        return DataError("name", f"'{name}' is gated: ask for access on its page, then run `hf auth login`")
    except RepositoryNotFoundError:
        return DataError("name", f"the hub has no data set '{name}'; if it is private, run `hf auth login`")
    except RevisionNotFoundError:
        return DataError("revision", f"'{name}' has no revision '{revision}'")
    except HfHubHTTPError as error:
        return DataError("name", f"the hub refuses '{name}': {_shortened(error)}")
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses
        advice = "go online, or give as data.revision the commit of a copy in the local cache"
        return DataError("name", f"the hub cannot be reached for '{name}' ({_shortened(error)}): {advice}")


def _rows_by_split(infos: Any) -> dict[tuple[str, str], int]:
    """Return the numbers of rows in a card's ``dataset_info``: a mapping, or a list of one for each configuration."""
    rows = {}
    for info in infos if isinstance(infos, list) else [infos] if isinstance(infos, dict) else []:
        for split in info.get("splits") or []:
            if isinstance(split.get("num_examples"), int):
                rows[info.get("config_name", "default"), split["name"]] = split["num_examples"]
    return rows


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise _datasets_missing() from None


def _datasets_missing() -> DataError:
    return DataError("source", "the library `datasets` is missing: pip install repa-lab[datasets]")


def _not_saved(folder: Path, reason: str) -> DataError:
    return DataError("path", f"'{folder}' is not what Dataset.save_to_disk writes: {reason}")


def _no_rows(place: str, field: str = "path") -> DataError:
    return DataError(field, f"'{place}' has no rows")


def _no_split(folder: Path, splits: Any) -> DataError:
    return DataError("path", f"no split '{_SPLIT}' in '{folder}'; there are: {', '.join(splits)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
