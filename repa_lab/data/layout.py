"""The folders that REPA's preprocessing writes, and `repa-lab data prepare`: numbered images, their latents, labels. No
torch.

``images/00000/img00000000.png`` and ``vae-sd/00000/img-mean-std-00000000.npy`` belong together by their number, which
is in their names, and by nothing else. Labels are in ``dataset.json`` of either tree or of both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.files import digest

LABELS = "dataset.json"
MANIFEST = "manifest.json"
_CONTENT_SAMPLE = 64


@dataclass(frozen=True)
class Kind:
    """One of the two trees of files: a thousand to a folder, called after their number."""

    tree: str
    stem: str
    suffix: str

    def name(self, number: int) -> str:
        """A file's path in its tree, which is its key in ``dataset.json``."""
        digits = f"{number:08d}"
        return f"{digits[:5]}/{self.stem}{digits}{self.suffix}"

    def path(self, folder: Path, number: int) -> Path:
        """A file's path."""
        return folder / self.tree / self.name(number)

    def numbers(self, folder: Path) -> set[int]:
        """The numbers of all files; others are left alone.

        Raises:
            DataError: a file is not in the folder that its number belongs to.
        """
        root, found = folder / self.tree, set[int]()
        for place in root.iterdir() if root.is_dir() else ():
            for file in os.listdir(place) if place.is_dir() else ():  # noqa: PTH208  a million paths take long to make
                digits = file.removeprefix(self.stem).removesuffix(self.suffix)
                if not digits.isdigit() or file != f"{self.stem}{digits}{self.suffix}":
                    continue
                if self.name(int(digits)) != f"{place.name}/{file}":
                    raise DataError("path", f"'{place / file}' should be '{self.path(folder, int(digits))}'")
                found.add(int(digits))
        return found

    def labels(self, folder: Path) -> dict[str, int] | None:
        """What ``dataset.json`` of the tree says of its files; None if there is none, or it says nothing.

        Raises:
            DataError: it is not of the form ``{"labels": [[name, class], ...]}``.
        """
        file = folder / self.tree / LABELS
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["labels"]
            return None if rows is None else _by_name(rows)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            message = f'\'{file}\' is not of the form {{"labels": [["{self.name(0)}", 0], ...]}} with classes from 0'
            raise DataError("path", message) from None


IMAGES = Kind("images", "img", ".png")
LATENTS = Kind("vae-sd", "img-mean-std-", ".npy")
KINDS = (IMAGES, LATENTS)


@dataclass(frozen=True)
class Listing:
    """A prepared folder: the numbers of its images, ascending, and the class of each."""

    folder: Path
    numbers: Sequence[int]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def path(self, kind: Kind, index: int) -> Path:
        """The file of the image that is the ``index``-th in order."""
        return kind.path(self.folder, self.numbers[index])

    def sample(self, count: int) -> range:
        """At most so many indices, evenly spaced."""
        return range(0, len(self), -(-len(self) // count))

    def fingerprint(self, side: int) -> str:
        """Numbers and classes of all images, and the content of 64 images and their latents.

        All files of a tree have one size, so their sizes tell nothing.

        Raises:
            DataError: one of these images is not ``side`` pixels wide and high, or a file cannot be read.
        """
        sample = self.sample(_CONTENT_SAMPLE)
        for index in sample:
            open_image(self.path(IMAGES, index), side).close()
        contents = [[_content(self.path(kind, index)) for kind in KINDS] for index in sample]
        listed = _sha256(np.array([self.numbers, self.labels], dtype="<i8").tobytes())
        return digest({"source": "repa", "listed": listed, "contents": contents})


def read_listing(folder: Path) -> Listing:
    """What is in a prepared folder, if it is complete.

    Raises:
        DataError: there is no such folder, an image or its latents have no partner, or labels and files do not match.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    images, latents = (kind.numbers(folder) for kind in KINDS)
    if not images | latents:
        expected = " and ".join(f"{kind.tree}/{kind.name(0)}" for kind in KINDS)
        raise DataError("path", f"nothing prepared in '{folder}'; expected {expected}, ...")
    _require_partners(folder, IMAGES, images - latents, LATENTS)
    _require_partners(folder, LATENTS, latents - images, IMAGES)
    numbers = sorted(images)
    return Listing(folder, numbers, _labels(folder, numbers))


def fingerprint_prepared(folder: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """A prepared folder in a few bytes; see :meth:`Listing.fingerprint`. Its images are square: there are no
    ``buckets``.

    Raises:
        DataError: see :func:`read_listing`.
    """
    return read_listing(folder).fingerprint(resolution)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `repa-lab data prepare` wrote of a folder; None for those of others.

    Raises:
        DataError: it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return dict(held)
    except (OSError, ValueError, TypeError):
        raise DataError("path", f"cannot read '{file}'; is '{folder}' a prepared folder?") from None


def open_image(file: Path, side: int) -> Image.Image:
    """An image that is ``side`` pixels wide and high: another would have to be resized, and its latents could not be.

    Raises:
        DataError: it is not, or cannot be read.
    """
    try:
        image = Image.open(file)
    except OSError as error:
        raise unreadable(file, error) from None
    if image.size != (side, side):
        seen = f"'{file}' measures {image.width}x{image.height}, not {side}x{side}"
        raise DataError("resolution", f"{seen}: set the resolution that the folder was prepared for")
    return image


def unreadable(file: Path, error: Exception) -> DataError:
    """The error of a file that cannot be used."""
    return DataError("path", f"cannot read '{file}': {error}")


def _by_name(rows: Iterable[Any]) -> dict[str, int]:
    labels = {str(name): label for name, label in rows}
    if not all(type(label) is int and label >= 0 for label in labels.values()):
        raise ValueError("classes are numbers from 0")
    return labels


def _require_partners(folder: Path, kind: Kind, alone: set[int], other: Kind) -> None:
    if alone:
        message = f"'{kind.path(folder, min(alone))}' has no partner '{other.tree}/{other.name(min(alone))}'"
        raise DataError("path", f"{message} ({len(alone)} such); was the preparation interrupted?")


def _labels(folder: Path, numbers: Sequence[int]) -> list[int]:
    if not any((folder / kind.tree / LABELS).is_file() for kind in KINDS):
        wanted = " or ".join(f"{kind.tree}/{LABELS}" for kind in KINDS)
        raise DataError("path", f"no labels in '{folder}'; expected {wanted}")
    said = [(kind, labels) for kind in KINDS if (labels := kind.labels(folder)) is not None]
    found = [_in_order(folder, kind, labels, numbers) for kind, labels in said]
    if len(found) == 2 and (differing := np.flatnonzero(np.array(found[0]) != np.array(found[1]))).size:
        one, other = (kind.path(folder, numbers[differing[0]]) for kind in KINDS)
        raise DataError("path", f"'{one}' and '{other}' have different classes in {LABELS} ({differing.size} such)")
    return found[0] if found else [0] * len(numbers)


def _in_order(folder: Path, kind: Kind, labels: dict[str, int], numbers: Sequence[int]) -> list[int]:
    names, file = [kind.name(number) for number in numbers], folder / kind.tree / LABELS
    if unlabelled := [name for name in names if name not in labels]:
        raise DataError("path", f"'{file}' has no class for '{unlabelled[0]}' ({len(unlabelled)} such)")
    if missing := sorted(labels.keys() - set(names)):
        message = f"'{file}' names '{missing[0]}', which is not there ({len(missing)} such)"
        raise DataError("path", f"{message}; was the preparation interrupted?")
    return [labels[name] for name in names]


def _content(file: Path) -> str:
    try:
        return _sha256(file.read_bytes())
    except OSError as error:
        raise unreadable(file, error) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
