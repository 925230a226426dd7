"""The files of a folder of images, and their captions. Imports no torch, so that `plan` can read them.

The rules are those of Hugging Face's image folders (`datasets`, `folder_based_builder.py`), which users have: a file
called ``metadata`` lists images by their path from its own folder, and the data set is what such files list.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.data.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Where captions are looked for if `data.caption_column` names no column, in every source that has columns.
CAPTION_COLUMNS = ("text", "caption", "prompt")
_FILE, _FILES = "file_name", "_file_name"  # the column of paths, and the end of the name of another such column
_NOTHING = object()


@dataclass(frozen=True)
class Tree:
    """The files below a folder.

    Attributes:
        files: every file, hidden ones left out.
        repeated: folders that were not entered because they had been already: links, as a rule.
    """

    files: Sequence[Path]
    repeated: Sequence[Path]


@dataclass(frozen=True)
class ImageList:
    """The images of a folder.

    Attributes:
        folder: the folder.
        files: the images, sorted by their path in the folder.
        captions: a caption for each image, or empty if none has one.
        notes: what was left out, a sentence each.
    """

    folder: Path
    files: Sequence[Path]
    captions: Sequence[str]
    notes: tuple[str, ...]


def walk(folder: Path) -> Tree:
    """List the files below a folder, following links; a folder that is reached twice is read once.

    The folder itself is read before the targets of links, so that a folder in it keeps its own name. A link to a folder
    around ``folder`` is not followed.

    Raises:
        OSError: a folder cannot be read.
    """
    files, repeated, seen = list[Path](), list[Path](), set[Path]()
    root, links = folder.resolve(), deque([folder])
    while links:
        start = links.popleft()
        if start != folder and root.is_relative_to(start.resolve()):
            repeated.append(start)
            continue
        for place, folders, names in os.walk(start, onerror=_raise):
            here = Path(place)
            if (real := here.resolve()) in seen:
                repeated.append(here)
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [here / name for name in folders if (here / name).is_symlink()]
            files += [here / name for name in names if not name.startswith(".")]
    return Tree(files, repeated)


def require_targets(files: Iterable[Path]) -> None:
    """Refuse links that lead nowhere.

    Raises:
        DataError: naming the first such link.
    """
    dangling = min((path for path in files if not path.exists()), default=None)
    if dangling is not None:
        target = f" to '{dangling.readlink()}'" if dangling.is_symlink() else ""
        raise DataError("path", f"'{dangling}' is a link{target}, which is not there: mend or remove the link")


def find_caption_column(columns: Sequence[str], asked: str | None) -> str | None:
    """Return the column of captions: the one asked for, else the first of the usual names, else None.

    Args:
        columns: all columns that can hold captions.
        asked: ``data.caption_column``.

    Raises:
        DataError: there is no column of the name asked for.
    """
    if asked is not None and asked not in columns:
        raise DataError("caption_column", f"no column '{asked}'; there are: {', '.join(columns) or 'none'}")
    return asked or next((name for name in CAPTION_COLUMNS if name in columns), None)


def caption_notes(captions: Sequence[str]) -> list[str]:
    """Return a sentence on images without a caption, if some have one and some have none."""
    empty = sum(not caption.strip() for caption in captions)
    return (
        [f"{empty:,} of {len(captions):,} images have no caption: they are trained with the empty one"] if empty else []
    )


def read_image_folder(folder: Path, caption_column: str | None = None) -> ImageList:
    """List the images of a folder with their captions.

    If there are ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` files, in the folder or below it, the
    images are those they list. Captions stand in their column ``caption_column`` or else ``text``, ``caption`` or
    ``prompt``; without such a column, or without metadata, in text files named as the images are (``cat.png``,
    ``cat.txt``).

    Raises:
        DataError: no folder, no images, a link that leads nowhere, or metadata that cannot be used: with file and line.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    tree = walk(folder)
    require_targets(tree.files)
    images = sorted(path for path in tree.files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError("path", f"no images in '{folder}'; expected {', '.join(IMAGE_SUFFIXES)}")
    tables = sorted(path for path in tree.files if path.stem == "metadata" and path.suffix in _READERS)
    rows = _rows(tables)
    column = find_caption_column(list(dict.fromkeys(name for row in rows for name in row.values)), caption_column)
    listed = _listed(rows, images, column) if tables else dict.fromkeys(images, "")
    files = [path for path in images if path in listed]
    captions = [listed[path] if column else _beside(path) for path in files]
    captions = captions if any(captions) else []
    notes = [*_link_notes(tree.repeated), *_left_out(images, files, tables), *caption_notes(captions)]
    return ImageList(folder, files, captions, tuple(notes))


@dataclass(frozen=True)
class _Row:
    """A row of a metadata file; ``number`` is its line, or in Parquet its number from 1."""

    file: Path
    number: int
    values: Mapping[str, Any]

    def refuse(self, message: str) -> NoReturn:
        raise DataError("path", f"{self.file}:{self.number}: {message}")

    def text(self, column: str) -> str:
        value = self.values.get(column, _NOTHING)
        if not isinstance(value, str):
            self.refuse(f"'{column}' must be text, got {_shown(value)}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            self.refuse(f"'{column}' holds half a surrogate pair, which is not text")
        return value

    def path(self, column: str) -> Path:
        """The path that a row gives, without ``.`` and ``..``; a path may not lead out of the folder of the file."""
        name = self.text(column)
        relative = posixpath.normpath(name.replace("\\", "/"))
        if "://" in name or relative.startswith(("/", "../")) or relative in ("..", "."):
            self.refuse(f"'{name}' must be the path of an image below '{self.file.parent}'")
        return self.file.parent / relative


def _rows(tables: Sequence[Path]) -> list[_Row]:
    if len({path.suffix for path in tables}) > 1:
        first, other = tables[0], next(path for path in tables if path.suffix != tables[0].suffix)
        raise DataError("path", f"'{first}' and '{other}' are of two formats: keep the metadata of a folder in one")
    rows = [_Row(path, number, values) for path in tables for number, values in _READERS[path.suffix](path)]
    if tables and not rows:
        raise DataError("path", f"'{tables[0]}' has no rows; list images in it, or remove it")
    return rows


def _listed(rows: Sequence[_Row], images: Sequence[Path], column: str | None) -> dict[Path, str]:
    """The images that the rows list, each with its caption if there is a column of captions."""
    known, found, missing = set(images), dict[Path, _Row](), list[tuple[_Row, Path]]()
    name = _path_column(rows)
    for row in rows:
        path = row.path(name)
        if path in found:
            first = f"{found[path].file}:{found[path].number}"
            row.refuse(f"'{row.values[name]}' has a row already ({first}): give each image one row")
        found[path] = row
        if path not in known:
            missing.append((row, path))
    if missing:
        row, path = missing[0]
        of = f"is not read as an image ({', '.join(IMAGE_SUFFIXES)})" if path.exists() else "is not in the folder"
        row.refuse(f"'{row.values[name]}' {of} ({len(missing)} such)")
    return {path: row.text(column) if column else "" for path, row in found.items()}


def _path_column(rows: Sequence[_Row]) -> str:
    columns = dict.fromkeys(name for row in rows for name in row.values)
    others = [name for name in columns if name.endswith(_FILES)]
    if _FILE not in columns and len(others) > 1:
        rows[0].refuse(f"no column '{_FILE}', and several others of paths: {', '.join(others)}")
    return others[0] if others and _FILE not in columns else _FILE


def _left_out(images: Sequence[Path], files: Sequence[Path], tables: Sequence[Path]) -> list[str]:
    count = len(images) - len(files)
    return [f"{count:,} of {len(images):,} images have no row in {tables[0].name} and are left out"] if count else []


def _link_notes(repeated: Sequence[Path]) -> list[str]:
    if not repeated:
        return []
    what = "1 folder is" if len(repeated) == 1 else f"{len(repeated):,} folders are"
    return [f"{what} reached twice through links and read once ('{repeated[0]}' is left out)"]


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader, number = csv.DictReader(io.StringIO(_read_text(path)), strict=True), 1
    try:
        for values in reader:
            if None in values:
                raise DataError(
                    "path", f"{path}:{number + 1}: more cells than columns; quote captions that hold commas"
                )
            yield number + 1, {name: value for name, value in values.items() if value is not None}
            number = reader.line_num
    except csv.Error as error:
        raise DataError("path", f"{path}:{number + 1}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("path", f"reading '{path}' takes pyarrow: pip install repa-lab[datasets]") from None
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError("path", f"cannot read '{path}': {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _beside(image: Path) -> str:
    path = image.with_suffix(".txt")
    return _read_text(path).strip() if path.is_file() else ""


def _read_text(path: Path) -> str:
    """A file of UTF-8; Windows' editors begin it with a mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError("path", f"{path}:{line}: not UTF-8 ({error.reason}): save the file as UTF-8") from None
    except OSError as error:
        raise DataError("path", f"cannot read '{path}': {error.strerror}") from None


def _shown(value: object) -> str:
    if value is _NOTHING:
        return "nothing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "NaN" if math.isnan(value) else f"the number {value}"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def _raise(error: OSError) -> NoReturn:
    raise error
