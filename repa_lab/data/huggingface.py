"""Tables of images and captions of Hugging Face: metadata files, saved data sets, the hub. Imports no torch.

- A file called ``metadata`` lists the images of a folder by their path from its own folder, and the data set is what
  such files list (`datasets`, `folder_based_builder.py`).
- `Dataset.save_to_disk` writes a folder with the rows of each split.
- A data set of the hub is loaded at a commit.

What `plan` asks is answered without loading `datasets`, an image or, for the hub, any data.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import json
import posixpath
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.data import DataError
from repa_lab.timm_models import reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Where captions are looked for if `data.caption_column` names no column, in every source that has columns.
CAPTION_COLUMNS = ("text", "caption", "prompt")
_FILE, _FILES = "file_name", "_file_name"  # the column of paths, and the end of the name of another such column
_SHOWN = 50  # characters of a value in messages
_SPLIT = "train"
_TEXT = ("string", "large_string")
_LABELS = ("label", "labels")  # columns that look like classes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST_ROWS = re.compile(r"(.+?)\[:(\d+)\]")  # a split's first rows, as `datasets` writes them
_NOT_SAVED = "is not what Dataset.save_to_disk writes"
_TIMEOUT_S = 5
_REMEMBERED_S = 60
_Numbered = Iterator[tuple[int, Mapping[str, Any]]]  # rows, with their line or number
_HubFacts = tuple[str, Mapping[tuple[str, str], int]]  # commit, and number of rows by configuration and split


def find_caption_column(columns: Sequence[str], asked: str | None) -> str | None:
    """Return the column of captions: the one asked for, else the first of the usual names, else None.

    Raises:
        DataError: there is no column of the name asked for.
    """
    if asked is not None and asked not in columns:
        raise DataError("caption_column", f"no column '{asked}'; there are: {', '.join(columns) or 'none'}")
    return asked or next((name for name in CAPTION_COLUMNS if name in columns), None)


def caption_notes(captions: Sequence[str], kind: str = "images") -> list[str]:
    """Return a sentence on images (or clips) without a caption, if some have one and some have none."""
    empty = sum(not caption.strip() for caption in captions)
    note = f"{empty:,} of {len(captions):,} {kind} have no caption: they are trained with the empty one"
    return [note] if empty else []


def read_metadata(
    files: Sequence[Path], items: Sequence[Path], kind: str, caption_column: str | None
) -> tuple[list[Path], list[str], list[str]]:
    """Read the captions of images or clips from metadata files, or else from a text file beside each.

    Args:
        files: the files of the folder.
        items: the images or clips.
        kind: what to call them in messages.

    Returns:
        The items that metadata files list; a caption for each, or nothing if none has one; sentences on what is left
        out or empty.

    Raises:
        DataError: metadata that cannot be used: with file and line.
    """
    tables = sorted(path for path in files if path.stem == "metadata" and path.suffix in _READERS)
    if other := next((path for path in tables if path.suffix != tables[0].suffix), None):
        raise DataError("path", f"'{tables[0]}' and '{other}' are of two formats: keep the metadata of a folder in one")
    rows = [_Row(path, number, values) for path in tables for number, values in _READERS[path.suffix](path)]
    if tables and not rows:
        raise DataError("path", f"'{tables[0]}' has no rows; list images in it, or remove it")
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    column = find_caption_column(columns, caption_column)
    listed = _listed(rows, columns, items) if tables else {}
    chosen = [path for path in items if path in listed] if tables else list(items)
    captions = [listed[path].text(column) if column else _caption_beside(path) for path in chosen]
    captions = captions if any(captions) else []
    notes = caption_notes(captions, kind)
    if left_out := len(items) - len(chosen):
        notes = [f"{left_out:,} of {len(items):,} {kind} have no row in {tables[0].name} and are left out", *notes]
    return chosen, captions, notes


@dataclass(frozen=True)
class _Row:
    """A row of a metadata file; ``number`` is its line, or in Parquet its number from 1."""

    file: Path
    number: int
    values: Mapping[str, Any]

    def refuse(self, message: str) -> NoReturn:
        raise DataError("path", f"{self.file}:{self.number}: {message}")

    def text(self, column: str) -> str:
        value = self.values.get(column)
        if not isinstance(value, str):
            shown = json.dumps(value, default=str)[:_SHOWN] if column in self.values else "nothing"
            self.refuse(f"'{column}' must be text, got {shown}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            self.refuse(f"'{column}' holds half a surrogate pair, which is not text")
        return value

    def path(self, column: str) -> Path:
        """Return the path in a column, without ``.`` and ``..``; it may not lead out of the folder of the file."""
        name = self.text(column)
        relative = posixpath.normpath(name.replace("\\", "/"))
        if "://" in name or relative.startswith(("/", "../")) or relative in ("..", "."):
            self.refuse(f"'{name}' must be the path of an image below '{self.file.parent}'")
        return self.file.parent / relative


def _listed(rows: Sequence[_Row], columns: Sequence[str], items: Sequence[Path]) -> dict[Path, _Row]:
    """Return the row of each image or clip that the rows list."""
    others = [name for name in columns if name.endswith(_FILES)]
    if _FILE not in columns and len(others) > 1:
        rows[0].refuse(f"no column '{_FILE}', and several others of paths: {', '.join(others)}")
    name = others[0] if others and _FILE not in columns else _FILE
    listed = dict[Path, _Row]()
    for row in rows:
        path = row.path(name)
        if path in listed:
            first = f"{listed[path].file}:{listed[path].number}"
            row.refuse(f"'{row.values[name]}' has a row already ({first}): give each image one row")
        listed[path] = row
    if missing := listed.keys() - set(items):
        path = next(path for path in listed if path in missing)
        reason = f"is not read as an image ({', '.join(IMAGE_SUFFIXES)})" if path.exists() else "is not in the folder"
        listed[path].refuse(f"'{listed[path].values[name]}' {reason} ({len(missing)} such)")
    return listed


def _jsonl(path: Path) -> _Numbered:
    # A caption may hold U+2028 and its like, at which splitlines would cut a row in two.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            expected = json.dumps({_FILE: "1.png", CAPTION_COLUMNS[0]: "a cat"})
            raise DataError("path", f"{path}:{number}: no JSON object; expected {expected}")
        yield number, values


def _csv(path: Path) -> _Numbered:
    reader, number = csv.DictReader(io.StringIO(_read_text(path)), strict=True), 1
    try:
        for values in reader:
            if None in values:
                message = "more cells than columns; quote captions that hold commas"
                raise DataError("path", f"{path}:{number + 1}: {message}")
            yield number + 1, {name: value for name, value in values.items() if value is not None}
            number = reader.line_num
    except csv.Error as error:
        raise DataError("path", f"{path}:{number + 1}: {error}") from None


def _parquet(path: Path) -> _Numbered:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("path", f"reading '{path}' takes pyarrow: pip install repa-lab[datasets]") from None
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError("path", f"cannot read '{path}': {str(error).splitlines()[0]}") from None


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _caption_beside(item: Path) -> str:
    path = item.with_name(f"{item.name}.txt") if item.is_dir() else item.with_suffix(".txt")
    return _read_text(path).strip() if path.is_file() else ""


def _read_text(path: Path) -> str:
    """Return the content of a file of UTF-8, without the mark with which Windows' editors begin it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError("path", f"{path}:{line}: not UTF-8 ({error.reason}): save the file as UTF-8") from None
    except OSError as error:
        raise DataError("path", f"cannot read '{path}': {error.strerror}") from None


def write_captions(folder: Path, captions: Mapping[str, str], column: str) -> None:
    """Write the captions of images, by their names in the folder, as an image folder has them."""
    lines = (json.dumps({_FILE: name, column: caption}) + "\n" for name, caption in captions.items())
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read: the first of images and of class labels, and that of captions.

    Attributes:
        classes: number of classes, 1 without labels.
        notes: what is not read though its name suggests it, a sentence each.
    """

    image: str
    label: str | None
    classes: int
    captions: str | None
    notes: tuple[str, ...]


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

    def where(condition: Any) -> list[int]:
        rows: list[int] = compute.indices_nonzero(condition).to_pylist()
        return rows

    def refusal(column: str, rows: Sequence[int], problem: str) -> DataError:
        others = f" ({len(rows):,} such rows)" if len(rows) > 1 else ""
        return DataError(field, f"'{name}', row {rows[0]}, column '{column}': {problem}{others}")

    if not table.num_rows:
        raise DataError(field, f"'{name}' has no rows")
    if pyarrow.types.is_struct(table[columns.image].type):
        content, path = (compute.struct_field(table[columns.image], part) for part in ("bytes", "path"))
        is_filled = compute.fill_null(compute.greater(compute.binary_length(content), 0), False)
        is_file = compute.and_(compute.is_null(content), compute.is_valid(path))
        if empty := where(compute.invert(compute.or_(is_filled, is_file))):
            raise refusal(columns.image, empty, "no image")
        files = {row: path[row].as_py() for row in where(is_file)}
        if missing := [row for row, file in files.items() if "://" not in file and not Path(file).is_file()]:
            raise refusal(columns.image, missing, f"no file '{files[missing[0]]}'")
    if columns.label:
        labels = table[columns.label]
        is_class = compute.and_(compute.greater_equal(labels, 0), compute.less(labels, columns.classes))
        if unlabelled := where(compute.invert(compute.fill_null(is_class, False))):
            problem = f"{json.dumps(labels[unlabelled[0]].as_py())} is none of the {columns.classes:,} classes"
            advice = "leave such rows out, or remove the column to train without classes"
            raise refusal(columns.label, unlabelled, f"{problem}, which are numbered from 0: {advice}")


def read_saved(folder: Path, captions: str | None = None) -> tuple[int, Columns]:
    """Return the number of rows of a saved data set and its columns; of several splits, those of ``train``.

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
    except DataError:
        raise
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
    """Return what the hub says of a data set; see :func:`resolve_commit` for errors."""
    answer = _ask_hub(name, revision, int(time.monotonic() // _REMEMBERED_S))
    if isinstance(answer, DataError):
        raise answer
    return answer


@functools.lru_cache(maxsize=64)
def _ask_hub(name: str, revision: str | None, minute: int) -> _HubFacts | DataError:
    """Ask the hub once; a refusal is remembered for about a minute, because every arm of a sweep asks."""
    from huggingface_hub import HfApi, errors

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
    except errors.HFValidationError as error:
        return DataError("name", f"'{name}' is no id of a data set: {reason(error)}")
    except errors.GatedRepoError:
        return DataError("name", f"'{name}' is gated: ask for access on its page, then run `hf auth login`")
    except errors.RepositoryNotFoundError:
        return DataError("name", f"the hub has no data set '{name}'; if it is private, run `hf auth login`")
    except errors.RevisionNotFoundError:
        return DataError("revision", f"'{name}' has no revision '{revision}'")
    except errors.HfHubHTTPError as error:
        return DataError("name", f"the hub refuses '{name}': {reason(error)}")
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses
        advice = "go online, or give as data.revision the commit of a copy in the local cache"
        return DataError("name", f"the hub cannot be reached for '{name}' ({reason(error)}): {advice}")


def _require_datasets() -> None:
    if importlib.util.find_spec("datasets") is None:
        raise DataError("source", "the library `datasets` is missing: pip install repa-lab[datasets]")
