"""What a data set is, in a few bytes and without torch: part of every run's identity and of every cache's key."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CONTENT_SAMPLE = 256
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DataError(ValueError):
    """The data cannot be used; :attr:`field` names the setting at fault: one of ``data``, or the encoder's ``tae``, or the
    run's ``encoder_storage``."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted by their path in it; hidden folders are left out.

    Raises:
        DataError: the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    found = sorted(path for path in _walk(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError("path", f"no images in '{folder}'; expected {', '.join(IMAGE_SUFFIXES)}")
    return found


def fingerprint_digits() -> str:
    """The digits ship with scikit-learn and never change."""
    return digest({"source": "digits", "images": 1797})


def fingerprint_folder(folder: Path, resolution: int) -> str:
    """Names and sizes of the images, the captions, and the resolution they are read at.

    Raises:
        DataError: see :func:`image_files`.
    """
    files = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in image_files(folder)]
    metadata = folder / "metadata.jsonl"
    captions = hashlib.sha256(metadata.read_bytes()).hexdigest() if metadata.is_file() else None
    return digest({"source": "imagefolder", "files": files, "captions": captions, "resolution": resolution})


def fingerprint_content(folder: Path, resolution: int) -> str:
    """As :func:`fingerprint_folder`, and what is in the images: in all of up to 256, in as many of more, evenly spaced.

    Caches hang on it. Reading files takes too long for what `plan` knows of a run, and there a mistake costs less: uncompressed
    images of two data sets have the same sizes, and features of one must not pass for the other's.

    Raises:
        DataError: see :func:`image_files`.
    """
    files = image_files(folder)
    step = -(-len(files) // _CONTENT_SAMPLE)
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files[::step]]
    return digest({"listing": fingerprint_folder(folder, resolution), "contents": contents})


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON: keys sorted, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.cache
def file_digest(path: Path) -> str:
    """SHA-256 of a file, computed once a process: a file of weights does not change under a running sweep."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path
