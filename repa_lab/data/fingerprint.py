"""What a data set is, in a few bytes and without torch: part of every run's identity and of every cache's key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.data.listing import ImageList, read_image_folder, require_targets, walk
from repa_lab.files import digest

_CONTENT_SAMPLE = 256
_END_BYTES = 1 << 20
_DATASETS_CACHE = "cache-*.arrow"  # what `datasets` leaves beside a data set that it maps or filters


def fingerprint_digits() -> str:
    """The digits ship with scikit-learn and never change."""
    return digest({"source": "digits", "images": 1797})


def fingerprint_folder(
    folder: Path, resolution: int, buckets: Buckets | None = None, caption_column: str | None = None
) -> str:
    """Return :func:`fingerprint_images` of the images of a folder.

    Raises:
        DataError: see :func:`read_image_folder`.
    """
    return fingerprint_images(read_image_folder(folder, caption_column), resolution, buckets)


def fingerprint_images(images: ImageList, resolution: int, buckets: Buckets | None = None) -> str:
    """Return a digest of the names and sizes of the images, their captions, and the resolution they are read at."""
    files = [(path.relative_to(images.folder).as_posix(), path.stat().st_size) for path in images.files]
    captions = digest(list(images.captions)) if images.captions else None
    held = {"source": "imagefolder", "files": files, "captions": captions, "resolution": resolution}
    return digest({**held, **({"buckets": asdict(buckets)} if buckets else {})})


def fingerprint_content(images: ImageList, resolution: int, buckets: Buckets | None = None) -> str:
    """As :func:`fingerprint_folder`, and what is in the images: in all of up to 256, in as many of more, evenly spaced.

    Caches hang on it. Reading files takes too long for what `plan` knows of a run, and there a mistake costs less:
    uncompressed images of two data sets have the same sizes, and features of one must not pass for the other's.
    """
    contents = [_sha256(path) for path in _evenly(images.files)]
    return digest({"listing": fingerprint_images(images, resolution, buckets), "contents": contents})


def fingerprint_saved(folder: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """The files of a data set that `Dataset.save_to_disk` wrote, and the resolution they are read at.

    Raises:
        DataError: there is no such folder, or a link in it leads nowhere.
    """
    if not folder.is_dir():
        raise DataError("path", f"no folder '{folder}'")
    require_targets(walk(folder).files)
    held = {"source": "datasets", "files": fingerprint_files(folder, but=_DATASETS_CACHE), "resolution": resolution}
    return digest({**held, "buckets": asdict(buckets) if buckets else None})


def fingerprint_files(folder: Path, but: str | None = None) -> str:
    """Any folder: the names and sizes of its files, and the first and last mebibyte of each.

    It stands for a local folder of weights in a run's identity: wherever it lies, and even if it is filled anew. Files
    whose names match the pattern ``but`` are left out.

    Raises:
        OSError: the folder cannot be read.
    """
    files = sorted(path for path in walk(folder).files if path.is_file() and not (but and path.match(but)))
    return digest([(path.relative_to(folder).as_posix(), path.stat().st_size, _ends(path)) for path in files])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _evenly(files: Sequence[Path]) -> Sequence[Path]:
    return files[:: -(-len(files) // _CONTENT_SAMPLE)]


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(_END_BYTES)
        file.seek(max(len(start), path.stat().st_size - _END_BYTES))
        return hashlib.sha256(start + file.read()).hexdigest()
