"""The files of a data set on disk: images of a folder with their captions, and fingerprints. Imports no torch.

The rules are those of Hugging Face's image folders (`datasets`, `folder_based_builder.py`): a file called ``metadata``
lists images by their path from its own folder, and the data set is what such files list.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from repa_lab.data import DataError
from repa_lab.files import digest

CLIP_SUFFIXES = (".gif", ".webp", ".npy")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Where captions are looked for if `data.caption_column` names no column, in every source that has columns.
CAPTION_COLUMNS = ("text", "caption", "prompt")
_FILE, _FILES = "file_name", "_file_name"  # the column of paths, and the end of the name of another such column
_SHOWN = 50  # characters of a value in messages
_CONTENT_SAMPLE = 256
_END_BYTES = 1 << 20


@dataclass(frozen=True)
class FileList:
    """The images of a folder, or its clips: animated files, and subfolders of frames.

    Attributes:
        folder: the folder.
        items: the images or clips, sorted by their path in the folder.
        classes: the class of each item: the first folder on an image's path, or an empty name.
        captions: a caption for each item, or empty if no item has one.
        notes: what was left out, a sentence each.
        frames: the frames of each clip that is a subfolder, in order.
    """

    folder: Path
    items: Sequence[Path]
    classes: Sequence[str]
    captions: Sequence[str]
    notes: tuple[str, ...]
    frames: Mapping[Path, Sequence[Path]]

    @property
    def files(self) -> list[Path]:
        """The files of all items, in order."""
        return [file for item in self.items for file in self.frames.get(item, (item,))]

    def fingerprint(self, read_as: Mapping[str, Any], content: bool = False) -> str:
        """Return a digest of the names and sizes of the files, their captions, and how they are read.

        Args:
            read_as: how the files are read, as JSON: the source, the resolution.
            content: whether the digest is also of the content of up to 256 files, evenly spaced. Caches are found by
                such a digest: uncompressed images of two data sets have the same sizes, and features of one must not
                pass for those of the other. `plan` does not wait for the content to be read.
        """
        files, captions = self.files, digest(list(self.captions)) if self.captions else None
        named = [(file.relative_to(self.folder).as_posix(), file.stat().st_size) for file in files]
        listing = digest({**read_as, "files": named, "captions": captions})
        if not content:
            return listing
        sample = files[:: -(-len(files) // _CONTENT_SAMPLE)]
        return digest(
            {"listing": listing, "contents": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sample]}
        )

    def copy_few(self, target: Path, count: int, caption_column: str | None) -> None:
        """Copy evenly spaced items, so that all classes are among them, with their captions."""
        chosen = range(0, len(self.items), max(1, len(self.items) // count))[:count]
        for item in (self.items[index] for index in chosen):
            for file in self.frames.get(item, (item,)):
                copy = target / file.relative_to(self.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        if self.captions:
            named = {self.items[index].relative_to(self.folder).as_posix(): self.captions[index] for index in chosen}
            write_captions(target, named, caption_column or CAPTION_COLUMNS[0])


def write_captions(folder: Path, captions: Mapping[str, str], column: str) -> None:
    """Write the captions of images, by their names in the folder, as an image folder has them."""
    lines = (json.dumps({_FILE: name, column: caption}) + "\n" for name, caption in captions.items())
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the files below a folder, following links, and the folders that are reached twice and read once.

    The folder itself is read before the targets of links, so that a folder in it keeps its own name. A link to a folder
    around ``folder`` is not followed. Hidden files and folders are left out.

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
    return files, repeated


def list_files(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """List the files below a folder, following links, with a sentence on folders that are reached twice.

    Raises:
        DataError: no folder, or a link that leads nowhere, which the message names.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    files, repeated = _walk(folder)
    dangling = min((path for path in files if not path.exists()), default=None)
    if dangling is not None:
        target = f" to '{dangling.readlink()}'" if dangling.is_symlink() else ""
        raise DataError("path", f"'{dangling}' is a link{target}, which is not there: mend or remove the link")
    if not repeated:
        return files, ()
    folders = "1 folder is" if len(repeated) == 1 else f"{len(repeated):,} folders are"
    return files, (f"{folders} reached twice through links and read once ('{repeated[0]}' is left out)",)


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

    files = sorted(path for path in _walk(folder)[0] if path.is_file() and not (but and path.match(but)))
    return digest([(path.relative_to(folder).as_posix(), path.stat().st_size, ends(path)) for path in files])


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


def caption_notes(captions: Sequence[str], kind: str = "images") -> list[str]:
    """Return a sentence on images (or clips) without a caption, if some have one and some have none."""
    empty = sum(not caption.strip() for caption in captions)
    note = f"{empty:,} of {len(captions):,} {kind} have no caption: they are trained with the empty one"
    return [note] if empty else []


def read_image_folder(folder: Path, caption_column: str | None = None) -> FileList:
    """List the images of a folder with their captions.

    If there are ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` files, in the folder or below it, the
    images are those they list. Captions are in their column ``caption_column`` or else ``text``, ``caption`` or
    ``prompt``; without such a column, or without metadata, in a text file beside each image (``cat.png``, ``cat.txt``).

    Raises:
        DataError: no folder, no images, a link that leads nowhere, or metadata that cannot be used: with file and line.
    """
    files, notes = list_files(folder)
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError("path", f"no images in '{folder}'; expected {', '.join(IMAGE_SUFFIXES)}")
    images, captions, more = _captioned(files, images, "images", caption_column)
    parts = [path.parts[len(folder.parts) :] for path in images]
    classes = [first if others else "" for first, *others in parts]
    return FileList(folder, images, classes, captions, (*notes, *more), {})


def read_clips(folder: Path, length: int, caption_column: str | None = None) -> FileList:
    """List the clips of a folder with their captions.

    A subfolder with images is a clip: its images are the frames, in the order of their names, where numbers count as
    numbers. An animated file directly in the folder is a clip too, or an array ``(frames, height, width, 3)`` of uint8.
    Captions are as in :func:`read_image_folder`, by the name of the subfolder or file.

    Args:
        length: frames that a clip must have.

    Raises:
        DataError: no folder, no clips, a clip that is too short, a link that leads nowhere, or metadata that cannot be
            used: with file and line.
    """
    files, notes = list_files(folder)
    frames: dict[Path, list[Path]] = {}
    for path in files:
        if path.parent != folder and path.suffix.lower() in IMAGE_SUFFIXES:
            frames.setdefault(path.parent, []).append(path)
    for images in frames.values():  # 2.png before 10.png
        images.sort(
            key=lambda path: [(int(n), "") if n.isdecimal() else (-1, n) for n in re.split(r"(\d+)", path.name)]
        )
    animated = [path for path in files if path.parent == folder and path.suffix.lower() in CLIP_SUFFIXES]
    if not (frames or animated):
        expected = f"expected subfolders of images, or files in it ({', '.join(CLIP_SUFFIXES)})"
        raise DataError("path", f"no clips in '{folder}'; {expected}")
    clips, captions, more = _captioned(files, sorted([*frames, *animated]), "clips", caption_column)
    for clip in clips:
        if (count := len(frames[clip]) if clip in frames else _count_frames(clip)) < length:
            message = f"the clip '{clip}' has {count} frames, and {length} are asked for"
            raise DataError("frames", f"{message}: lower frames or frame_step, or leave the clip out")
    return FileList(folder, clips, [""] * len(clips), captions, (*notes, *more), frames)


def _count_frames(file: Path) -> int:
    """Return the number of frames of an animated file, or of an array."""
    try:
        if file.suffix != ".npy":
            with Image.open(file) as animation:
                return getattr(animation, "n_frames", 1)
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError("path", f"cannot read the clip '{file}': {error}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        expected = f"must be uint8 of (frames, height, width, 3), got {array.dtype} of shape {array.shape}"
        raise DataError("path", f"'{file}' {expected}")
    return len(array)


def _captioned(
    files: Sequence[Path], items: Sequence[Path], kind: str, caption_column: str | None
) -> tuple[list[Path], list[str], list[str]]:
    """Return the items that metadata files list, their captions or nothing, and notes on what is left out or empty."""
    tables = sorted(path for path in files if path.stem == "metadata" and path.suffix in _READERS)
    rows = _read_tables(tables)
    column = find_caption_column(list(dict.fromkeys(name for row in rows for name in row.values)), caption_column)
    listed = _listed_images(rows, items, column) if tables else dict.fromkeys(items, "")
    chosen = [path for path in items if path in listed]
    captions = [listed[path] if column else _caption_beside(path) for path in chosen]
    captions = captions if any(captions) else []
    unlisted = len(items) - len(chosen)
    notes = (
        [f"{unlisted:,} of {len(items):,} {kind} have no row in {tables[0].name} and are left out"] if unlisted else []
    )
    return chosen, captions, [*notes, *caption_notes(captions, kind)]


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
