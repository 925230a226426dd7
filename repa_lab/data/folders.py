"""The files of data sets on disk: images and clips of a folder, prepared folders, and fingerprints. Imports no torch.

Prepared folders have the layout that REPA's preprocessing and `repa-lab data prepare` write. The image
``images/00000/img00000000.png`` and its latents ``vae-sd/00000/img-mean-std-00000000.npy`` belong together by the
number in their names, and by nothing else. Labels are in the ``dataset.json`` of either tree or of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets
from repa_lab.data.huggingface import CAPTION_COLUMNS, IMAGE_SUFFIXES, read_metadata, write_captions
from repa_lab.files import digest

CLIP_SUFFIXES = (".gif", ".webp", ".npy")
LABELS, MANIFEST = "dataset.json", "manifest.json"
SAMPLE = 64  # images of a prepared folder whose content is part of its fingerprint
_CONTENT_SAMPLE = 256
_END_BYTES = 1 << 20
_CACHE = "cache-*.arrow"  # what `datasets` leaves beside a data set that it maps or filters


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
        """Return a digest of the names and sizes of the files, their captions, and ``read_as``: how they are read.

        With ``content``, the digest is also of the content of up to 256 files, evenly spaced. Caches are found by it:
        uncompressed images of two data sets have the same sizes, and features of one must not pass for those of the
        other. `plan` does not wait for the content to be read.
        """
        files, captions = self.files, digest(list(self.captions)) if self.captions else None
        named = [(file.relative_to(self.folder).as_posix(), file.stat().st_size) for file in files]
        listing = digest({**read_as, "files": named, "captions": captions})
        if not content:
            return listing
        sample = files[:: -(-len(files) // _CONTENT_SAMPLE)]
        contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sample]
        return digest({"listing": listing, "contents": contents})

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


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the files below a folder, following links, and the folders that are reached twice and read once.

    The folder itself is read before the targets of links, so that a folder in it keeps its own name. A link to a folder
    around ``folder`` is not followed. Hidden files and folders are left out.
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

    It stands for a local folder of weights in a run's identity, wherever the folder lies. Files whose name matches the
    pattern ``but`` are left out.

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


def fingerprint_saved(folder: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """Return a digest of the files of a saved data set and of the resolution that its images are read at.

    Raises:
        DataError: there is no such folder, or a link in it leads nowhere.
    """
    list_files(folder)
    content = {"source": "datasets", "files": fingerprint_files(folder, but=_CACHE), "resolution": resolution}
    return digest({**content, "buckets": asdict(buckets) if buckets else None})


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
    images, captions, more = read_metadata(files, images, "images", caption_column)
    parts = [path.parts[len(folder.parts) :] for path in images]
    classes = [first if others else "" for first, *others in parts]
    return FileList(folder, images, classes, captions, (*notes, *more), {})


def read_clips(folder: Path, length: int, caption_column: str | None = None) -> FileList:
    """List the clips of a folder, of ``length`` frames at least, with their captions.

    A subfolder with images is a clip: its images are the frames, in the order of their names, where numbers count as
    numbers. An animated file directly in the folder is a clip too, or an array ``(frames, height, width, 3)`` of uint8.
    Captions are as in :func:`read_image_folder`, by the name of the subfolder or file.

    Raises:
        DataError: no folder, no clips, a clip that is too short, a link that leads nowhere, or metadata that cannot be
            used: with file and line.
    """
    files, notes = list_files(folder)
    frames: dict[Path, list[Path]] = {}
    for path in files:
        if path.parent != folder and path.suffix.lower() in IMAGE_SUFFIXES:
            frames.setdefault(path.parent, []).append(path)
    for images in frames.values():
        images.sort(key=_natural)
    animated = [path for path in files if path.parent == folder and path.suffix.lower() in CLIP_SUFFIXES]
    if not (frames or animated):
        expected = f"expected subfolders of images, or files in it ({', '.join(CLIP_SUFFIXES)})"
        raise DataError("path", f"no clips in '{folder}'; {expected}")
    clips, captions, more = read_metadata(files, sorted([*frames, *animated]), "clips", caption_column)
    for clip in clips:
        if (count := len(frames[clip]) if clip in frames else _count_frames(clip)) < length:
            message = f"the clip '{clip}' has {count} frames, and {length} are asked for"
            raise DataError("frames", f"{message}: lower frames or frame_step, or leave the clip out")
    return FileList(folder, clips, [""] * len(clips), captions, (*notes, *more), frames)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers: 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


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


@dataclass(frozen=True)
class Kind:
    """One of the two trees of files: a thousand files to a folder, named by their number."""

    tree: str
    stem: str
    suffix: str

    def name(self, number: int) -> str:
        """Return a file's path in its tree, which is its key in ``dataset.json``."""
        digits = f"{number:08d}"
        return f"{digits[:5]}/{self.stem}{digits}{self.suffix}"

    def path(self, folder: Path, number: int) -> Path:
        """Return a file's path in a prepared folder."""
        return folder / self.tree / self.name(number)

    def numbers(self, folder: Path) -> set[int]:
        """Return the numbers of all files of this kind; other files are ignored.

        Raises:
            DataError: a file is not in the folder that its number belongs to.
        """
        root, numbers = folder / self.tree, set[int]()
        for place in root.iterdir() if root.is_dir() else ():
            for file in os.listdir(place) if place.is_dir() else ():  # noqa: PTH208  a million paths take long to make
                digits = file.removeprefix(self.stem).removesuffix(self.suffix)
                if not digits.isdigit() or file != f"{self.stem}{digits}{self.suffix}":
                    continue
                if self.name(int(digits)) != f"{place.name}/{file}":
                    raise DataError("path", f"'{place / file}' should be '{self.path(folder, int(digits))}'")
                numbers.add(int(digits))
        return numbers

    def labels(self, folder: Path, numbers: Sequence[int]) -> list[int] | None:
        """Return the classes of files from the tree's ``dataset.json``, or None without such a file or without classes.

        Raises:
            DataError: the content is not ``{"labels": [[name, class], ...]}``, or not of these files.
        """
        file = folder / self.tree / LABELS
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["labels"]
            if rows is None:
                return None
            labels = {str(name): label for name, label in rows}
            if not all(type(label) is int and label >= 0 for label in labels.values()):
                raise ValueError("classes are numbers from 0")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            message = f'\'{file}\' is not of the form {{"labels": [["{self.name(0)}", 0], ...]}} with classes from 0'
            raise DataError("path", message) from None
        names = [self.name(number) for number in numbers]
        if unlabelled := [name for name in names if name not in labels]:
            raise DataError("path", f"'{file}' has no class for '{unlabelled[0]}' ({len(unlabelled)} such)")
        if missing := sorted(labels.keys() - set(names)):
            message = f"'{file}' names '{missing[0]}', which is not there ({len(missing)} such)"
            raise DataError("path", f"{message}; was the preparation interrupted?")
        return [labels[name] for name in names]


IMAGES = Kind("images", "img", ".png")
LATENTS = Kind("vae-sd", "img-mean-std-", ".npy")
KINDS = (IMAGES, LATENTS)


@dataclass(frozen=True)
class Listing:
    """The content of a prepared folder: the numbers of its images, ascending, and the class of each."""

    folder: Path
    numbers: Sequence[int]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def path(self, kind: Kind, index: int) -> Path:
        """Return the file of the ``index``-th image in order."""
        return kind.path(self.folder, self.numbers[index])

    def sample(self, count: int) -> range:
        """Return at most ``count`` indices, evenly spaced."""
        return range(0, len(self), -(-len(self) // count))

    def fingerprint(self, side: int) -> str:
        """Return a digest of the numbers and classes of all images, and of the content of 64 images and their latents.

        All files of a tree have one size, so their sizes tell nothing.

        Raises:
            DataError: one of these images is not ``side`` pixels wide and high, or a file cannot be read.
        """
        contents = []
        for index in self.sample(SAMPLE):
            open_image(self.path(IMAGES, index), side).close()
            files = [self.path(kind, index) for kind in KINDS]
            try:
                contents.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
            except OSError as error:
                raise DataError("path", f"cannot read '{error.filename}': {error.strerror}") from None
        listed = hashlib.sha256(np.array([self.numbers, self.labels], dtype="<i8").tobytes()).hexdigest()
        return digest({"source": "repa", "listed": listed, "contents": contents})


def read_listing(folder: Path) -> Listing:
    """List the content of a prepared folder.

    Raises:
        DataError: there is no such folder, an image or its latents have no partner, or labels and files do not match.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    images, latents = (kind.numbers(folder) for kind in KINDS)
    if not images | latents:
        expected = " and ".join(f"{kind.tree}/{kind.name(0)}" for kind in KINDS)
        raise DataError("path", f"nothing prepared in '{folder}'; expected {expected}, ...")
    for kind, alone, other in ((IMAGES, images - latents, LATENTS), (LATENTS, latents - images, IMAGES)):
        if alone:
            message = f"'{kind.path(folder, min(alone))}' has no partner '{other.tree}/{other.name(min(alone))}'"
            raise DataError("path", f"{message} ({len(alone)} such); was the preparation interrupted?")
    numbers = sorted(images)
    return Listing(folder, numbers, _read_labels(folder, numbers))


def _read_labels(folder: Path, numbers: Sequence[int]) -> list[int]:
    if not any((folder / kind.tree / LABELS).is_file() for kind in KINDS):
        expected = " or ".join(f"{kind.tree}/{LABELS}" for kind in KINDS)
        raise DataError("path", f"no labels in '{folder}'; expected {expected}")
    of_images, of_latents = (kind.labels(folder, numbers) for kind in KINDS)
    if of_images and of_latents and (differing := np.flatnonzero(np.array(of_images) != np.array(of_latents))).size:
        image, latents = (kind.path(folder, numbers[differing[0]]) for kind in KINDS)
        raise DataError("path", f"'{image}' and '{latents}' have different classes in {LABELS} ({differing.size} such)")
    return of_images or of_latents or [0] * len(numbers)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what `repa-lab data prepare` wrote of a folder, or None for folders of other tools.

    Raises:
        DataError: the manifest is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise DataError("path", f"cannot read '{file}'; is '{folder}' a prepared folder?") from None


def open_image(file: Path, side: int) -> Image.Image:
    """Open an image that is ``side`` pixels wide and high; it cannot be resized, for its latents could not be.

    Raises:
        DataError: the image has another size or cannot be read.
    """
    try:
        image = Image.open(file)
    except OSError as error:
        raise DataError("path", f"cannot read '{file}': {error}") from None
    if image.size != (side, side):
        message = f"'{file}' measures {image.width}x{image.height}, not {side}x{side}"
        raise DataError("resolution", f"{message}: set the resolution that the folder was prepared for")
    return image
