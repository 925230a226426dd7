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
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.files import digest

CLIP_SUFFIXES = (".gif", ".webp", ".npy")
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
class Clip:
    """A clip of a folder.

    Attributes:
        path: a folder of frames, or an animated file.
        files: the frames in their order, or the file.
    """

    path: Path
    files: Sequence[Path]

    @property
    def length(self) -> int:
        """The number of frames."""
        if self.path.is_dir():
            return len(self.files)
        try:
            if self.path.suffix == ".npy":
                array = np.load(self.path, mmap_mode="r")
                if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
                    found = f"{array.dtype} of shape {array.shape}"
                    raise DataError("path", f"'{self.path}' must be uint8 of (frames, height, width, 3), got {found}")
                return len(array)
            with Image.open(self.path) as animation:
                return getattr(animation, "n_frames", 1)
        except (OSError, ValueError) as error:
            raise DataError("path", f"cannot read the clip '{self.path}': {error}") from None


@dataclass(frozen=True)
class ClipList:
    """The clips of a folder.

    Attributes:
        folder: the folder.
        clips: the clips, sorted by their path.
        captions: a caption for each clip, or empty if no clip has one.
        notes: what was left out, a sentence each.
    """

    folder: Path
    clips: Sequence[Clip]
    captions: Sequence[str]
    notes: tuple[str, ...]


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
    listing = fingerprint_images(images, resolution, buckets)
    return digest({"listing": listing, "contents": _contents(images.files)})


def fingerprint_clips(
    clips: ClipList, resolution: int, buckets: Buckets | None, frames: int, step: int, content: bool = False
) -> str:
    """Return a digest of the names and sizes of the frames, their captions, and how they are read.

    Args:
        clips: the clips.
        resolution: pixels along each side.
        buckets: sizes of several aspects.
        frames: frames that are read of each clip.
        step: frames from one to the next.
        content: whether the digest is also of the content of up to 256 files, evenly spaced, as that of caches.
    """
    files = [file for clip in clips.clips for file in clip.files]
    named = [(file.relative_to(clips.folder).as_posix(), file.stat().st_size) for file in files]
    captions = digest(list(clips.captions)) if clips.captions else None
    about = {"source": "clips", "files": named, "captions": captions, "resolution": resolution}
    listing = digest({**about, "frames": frames, "step": step, **({"buckets": asdict(buckets)} if buckets else {})})
    return digest({"listing": listing, "contents": _contents(files)}) if content else listing


def _contents(files: Sequence[Path]) -> list[str]:
    """Return the digests of the content of up to 256 files, evenly spaced."""
    sample = files[:: -(-len(files) // _CONTENT_SAMPLE)]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sample]


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
    files, captions, unlisted = _captioned(tree, images, "images", caption_column)
    return ImageList(folder, files, captions, (*_repeated(tree), *unlisted, *caption_notes(captions)))


def read_clips(folder: Path, frames: int, caption_column: str | None = None) -> ClipList:
    """List the clips of a folder with their captions.

    A subfolder with images is a clip: its images are the frames, in the order of their names, where numbers count as
    numbers. An animated file directly in the folder is a clip too, or an array ``(frames, height, width, 3)`` of uint8.
    Captions are as in :func:`read_image_folder`, by the name of the subfolder or file.

    Args:
        folder: the folder.
        frames: frames that a clip must have.
        caption_column: the column of captions.

    Raises:
        DataError: no folder, no clips, a clip that is too short, a link that leads nowhere, or metadata that cannot be
            used: with file and line.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    tree = walk(folder)
    require_targets(tree.files)
    of_folders: dict[Path, list[Path]] = {}
    for path in tree.files:
        if path.parent != folder and path.suffix.lower() in IMAGE_SUFFIXES:
            of_folders.setdefault(path.parent, []).append(path)
    files = [path for path in tree.files if path.parent == folder and path.suffix.lower() in CLIP_SUFFIXES]
    clips = [
        *(Clip(path, sorted(inner, key=_natural)) for path, inner in of_folders.items()),
        *(Clip(p, (p,)) for p in files),
    ]
    if not clips:
        expected = f"expected subfolders of images, or files in it ({', '.join(CLIP_SUFFIXES)})"
        raise DataError("path", f"no clips in '{folder}'; {expected}")
    by_path = {clip.path: clip for clip in sorted(clips, key=lambda clip: clip.path)}
    listed, captions, unlisted = _captioned(tree, list(by_path), "clips", caption_column)
    for path in listed:
        if (length := by_path[path].length) < frames:
            message = f"the clip '{path}' has {length} frames, and {frames} are asked for"
            raise DataError("frames", f"{message}: lower frames or frame_step, or leave the clip out")
    notes = (*_repeated(tree), *unlisted, *caption_notes(captions, "clips"))
    return ClipList(folder, [by_path[path] for path in listed], captions, notes)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers: 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _captioned(
    tree: Tree, items: Sequence[Path], kind: str, caption_column: str | None
) -> tuple[list[Path], list[str], list[str]]:
    """Return the items that metadata files list, their captions or nothing, and notes on items that are left out."""
    tables = sorted(path for path in tree.files if path.stem == "metadata" and path.suffix in _READERS)
    rows = _read_tables(tables)
    column = find_caption_column(list(dict.fromkeys(name for row in rows for name in row.values)), caption_column)
    listed = _listed_images(rows, items, column) if tables else dict.fromkeys(items, "")
    chosen = [path for path in items if path in listed]
    captions = [listed[path] if column else _caption_beside(path) for path in chosen]
    notes = list[str]()
    if unlisted := len(items) - len(chosen):
        notes.append(f"{unlisted:,} of {len(items):,} {kind} have no row in {tables[0].name} and are left out")
    return chosen, captions if any(captions) else [], notes


def _repeated(tree: Tree) -> list[str]:
    """Return a sentence on folders that are reached twice."""
    if not tree.repeated:
        return []
    count = len(tree.repeated)
    folders = "1 folder is" if count == 1 else f"{count:,} folders are"
    return [f"{folders} reached twice through links and read once ('{tree.repeated[0]}' is left out)"]


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


def _shown(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "NaN" if math.isnan(value) else f"the number {value}"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
