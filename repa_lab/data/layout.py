"""The layout of prepared folders: numbered images, their latents and labels. Imports no torch.

REPA's preprocessing and `repa-lab data prepare` write it. ``images/00000/img00000000.png`` and
``vae-sd/00000/img-mean-std-00000000.npy`` belong together by the number in their names, and by nothing else. Labels are
in the ``dataset.json`` of either tree or of both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repa_lab.data import DataError
from repa_lab.files import digest

LABELS = "dataset.json"
MANIFEST = "manifest.json"
SAMPLE = 64


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
            labels = None if rows is None else {str(name): label for name, label in rows}
            if not all(type(label) is int and label >= 0 for label in (labels or {}).values()):
                raise ValueError("classes are numbers from 0")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            message = f'\'{file}\' is not of the form {{"labels": [["{self.name(0)}", 0], ...]}} with classes from 0'
            raise DataError("path", message) from None
        if labels is None:
            return None
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
