"""The files of a data set on disk: images of a folder with their captions, and fingerprints. Imports no torch.

The rules are those of Hugging Face's image folders (`datasets`, `folder_based_builder.py`): a file called ``metadata``
lists images by their path from its own folder, and the data set is what such files list.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.files import digest

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Where captions are looked for if `data.caption_column` names no column, in every source that has columns.
CAPTION_COLUMNS = ("text", "caption", "prompt")
_FILE, _FILES = "file_name", "_file_name"  # the column of paths, and the end of the name of another such column
_MISSING = object()
_CONTENT_SAMPLE = 256
_END_BYTES = 1 << 20


@dataclass(frozen=True)
class Tree:
    """The files below a folder.

    Attributes:
        files: every file except hidden ones.
        repeated: folders that were not entered a second time: links, as a rule.
    """

    files: Sequence[Path]
    repeated: Sequence[Path]


@dataclass(frozen=True)
class ImageList:
    """The images of a folder.

    Attributes:
        folder: the folder.
        files: the images, sorted by their path in the folder.
        captions: a caption for each image, or empty if no image has one.
        notes: what was left out, a sentence each.
    """

    folder: Path
    files: Sequence[Path]
    captions: Sequence[str]
    notes: tuple[str, ...]

    @property
    def classes(self) -> list[str]:
        """The class of each image: the first folder on its path, or an empty name directly in the folder."""
        paths = [path.parts[len(self.folder.parts) :] for path in self.files]
        return [parts[0] if len(parts) > 1 else "" for parts in paths]


def walk(folder: Path) -> Tree:
    """List the files below a folder, following links; a folder that is reached twice is read once.

    The folder itself is read before the targets of links, so that a folder in it keeps its own name. A link to a folder
    around ``folder`` is not followed.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    files, repeated, seen = list[Path](), list[Path](), set[Path]()
    root, starts = folder.resolve(), deque([folder])
    while starts:
        start = starts.popleft()
        if start != folder and root.is_relative_to(start.resolve()):
            repeated.append(start)
            continue
        for place, folders, names in os.walk(start, onerror=refuse):
            here = Path(place)
            if (real := here.resolve()) in seen:
                repeated.append(here)
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [here / name for name in folders if (here / name).is_symlink()]
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


def fingerprint_files(folder: Path, but: str | None = None) -> str:
    """Return a digest of any folder: the names and sizes of its files, and the first and last mebibyte of each.

    It stands for a local folder of weights in a run's identity, wherever the folder lies.

    Args:
        but: a pattern of names of files that are left out.

    Raises:
        OSError: the folder cannot be read.
    """

    def ends(path: Path) -> str:
        with path.open("rb") as file:
            start = file.read(_END_BYTES)
            file.seek(max(len(start), path.stat().st_size - _END_BYTES))
            return hashlib.sha256(start + file.read()).hexdigest()

    files = sorted(path for path in walk(folder).files if path.is_file() and not (but and path.match(but)))
    return digest([(path.relative_to(folder).as_posix(), path.stat().st_size, ends(path)) for path in files])


def fingerprint_images(images: ImageList, resolution: int, buckets: Buckets | None = None) -> str:
    """Return a digest of the names and sizes of the images, their captions, and the resolution they are read at."""
    files = [(path.relative_to(images.folder).as_posix(), path.stat().st_size) for path in images.files]
    captions = digest(list(images.captions)) if images.captions else None
    content = {"source": "imagefolder", "files": files, "captions": captions, "resolution": resolution}
    return digest({**content, **({"buckets": asdict(buckets)} if buckets else {})})


def fingerprint_content(images: ImageList, resolution: int, buckets: Buckets | None = None) -> str:
    """Return a digest as :func:`fingerprint_images`, and of the content of up to 256 images, evenly spaced.

    Caches are found by this digest: uncompressed images of two data sets have the same sizes, and features of one must
    not pass for those of the other. `plan` does not wait for the content to be read.
    """
    sample = images.files[:: -(-len(images.files) // _CONTENT_SAMPLE)]
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sample]
    return digest({"listing": fingerprint_images(images, resolution, buckets), "contents": contents})


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
    note = f"{empty:,} of {len(captions):,} images have no caption: they are trained with the empty one"
    return [note] if empty else []


def read_image_folder(folder: Path, caption_column: str | None = None) -> ImageList:
    """List the images of a folder with their captions.

    If there are ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` files, in the folder or below it, the
    images are those they list. Captions are in their column ``caption_column`` or else ``text``, ``caption`` or
    ``prompt``; without such a column, or without metadata, in a text file beside each image (``cat.png``, ``cat.txt``).

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
    rows = _read_tables(tables)
    column = find_caption_column(list(dict.fromkeys(name for row in rows for name in row.values)), caption_column)
    listed = _listed_images(rows, images, column) if tables else dict.fromkeys(images, "")
    files = [path for path in images if path in listed]
    captions = [listed[path] if column else _caption_beside(path) for path in files]
    captions, notes = captions if any(captions) else [], list[str]()
    if tree.repeated:
        count = len(tree.repeated)
        folders = "1 folder is" if count == 1 else f"{count:,} folders are"
        notes.append(f"{folders} reached twice through links and read once ('{tree.repeated[0]}' is left out)")
    if unlisted := len(images) - len(files):
        notes.append(f"{unlisted:,} of {len(images):,} images have no row in {tables[0].name} and are left out")
    return ImageList(folder, files, captions, (*notes, *caption_notes(captions)))


@dataclass(frozen=True)
class _Row:
    """A row of a metadata file; ``number`` is its line, or in Parquet its number from 1."""

    file: Path
    number: int
    values: Mapping[str, Any]

    def refuse(self, message: str) -> NoReturn:
        raise DataError("path", f"{self.file}:{self.number}: {message}")

    def text(self, column: str) -> str:
        value = self.values.get(column, _MISSING)
        if not isinstance(value, str):
            self.refuse(f"'{column}' must be text, got {_shown(value)}")
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


def _read_tables(tables: Sequence[Path]) -> list[_Row]:
    if len({path.suffix for path in tables}) > 1:
        first, other = tables[0], next(path for path in tables if path.suffix != tables[0].suffix)
        raise DataError("path", f"'{first}' and '{other}' are of two formats: keep the metadata of a folder in one")
    rows = [_Row(path, number, values) for path in tables for number, values in _READERS[path.suffix](path)]
    if tables and not rows:
        raise DataError("path", f"'{tables[0]}' has no rows; list images in it, or remove it")
    return rows


def _listed_images(rows: Sequence[_Row], images: Sequence[Path], column: str | None) -> dict[Path, str]:
    """Return the images that the rows list, each with its caption if there is a column of captions."""
    columns = dict.fromkeys(name for row in rows for name in row.values)
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
    if missing := listed.keys() - set(images):
        path = next(path for path in listed if path in missing)
        reason = f"is not read as an image ({', '.join(IMAGE_SUFFIXES)})" if path.exists() else "is not in the folder"
        listed[path].refuse(f"'{listed[path].values[name]}' {reason} ({len(missing)} such)")
    return {path: row.text(column) if column else "" for path, row in listed.items()}


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
                message = "more cells than columns; quote captions that hold commas"
                raise DataError("path", f"{path}:{number + 1}: {message}")
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


def _caption_beside(image: Path) -> str:
    path = image.with_suffix(".txt")
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


def _shown(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "NaN" if math.isnan(value) else f"the number {value}"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
