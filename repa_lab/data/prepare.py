"""Prepares a folder of images for training, in the layout of REPA's preprocessing: cropped once, encoded once.

Images are numbered in the order of their paths. They are encoded in fixed batches, so that the latents do not depend on
how many processes share the work or how often it was interrupted. A file is written whole or not at all, and is not
written again.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from repa_lab.data.autoencoder import Autoencoder, load_autoencoder
from repa_lab.data.cache import Progress
from repa_lab.data.errors import DataError
from repa_lab.data.folder import ImageFolder
from repa_lab.data.layout import IMAGES, KINDS, LABELS, LATENTS, MANIFEST, Kind, read_manifest
from repa_lab.files import digest

_BATCHES_AHEAD = 2
_SHOWN = 20  # characters, of hashes
_LOCK, _TEMPORARY = ".lock", ".tmp"
# What may differ when a preparation is taken up again: the name of the same VAE, and what follows from its config.
_INFORMATIVE = ("vae", "scaling")


@dataclass(frozen=True)
class Preparation:
    """What is made of what.

    Attributes:
        source: a folder of images, one class per subfolder.
        folder: where the prepared ones go.
        resolution: pixels along each side.
        vae: an autoencoder of diffusers: a hub id or a folder.
        batch_size: images that are encoded at a time.
    """

    source: Path
    folder: Path
    resolution: int
    vae: str
    batch_size: int = 64


@dataclass(frozen=True)
class Part:
    """The share of one of several processes: every ``world``-th batch from the ``rank``-th on."""

    rank: int = 0
    world: int = 1


def prepare(
    wanted: Preparation,
    device: torch.device,
    part: Part | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> int:
    """Write what is missing of a part of the prepared folder; the number of images in this part.

    Args:
        wanted: what to make.
        device: where to encode.
        part: the share of this process; None is all.
        threads: that read and crop, and on a CPU encode.
        progress: told how many of how many images are done.

    Raises:
        DataError: the images or the VAE cannot be used, the folder is another preparation's, or it cannot be written.
    """
    part = part or Part()
    _require_apart(wanted)
    images, vae = ImageFolder(wanted.source, wanted.resolution), load_autoencoder(wanted.vae, "vae")
    vae.model.to(device)
    sizes = _file_sizes(vae, wanted.resolution)
    try:
        _begin(wanted, images, vae)
        at_once = threads if device.type == "cpu" else 1
        with (
            _Files(wanted.folder, part) as files,
            ThreadPoolExecutor(threads) as readers,
            _one_core_each(at_once) as encoders,
        ):
            worker = _Worker(images, vae, files, sizes, readers, encoders)
            return worker.carry_out(_batches(len(images), wanted.batch_size, part), at_once + _BATCHES_AHEAD, progress)
    except torch.OutOfMemoryError:
        message = f"batches of {wanted.batch_size} images do not fit in memory: give a smaller --batch-size"
        raise DataError("batch_size", message) from None
    except OSError as error:
        raise DataError("path", f"cannot write to '{wanted.folder}': {error.strerror or error}") from None


class _Files:
    """Writes files whole or not at all: beside the folder's own, then renamed. What a killed process left is cleared away."""

    def __init__(self, folder: Path, part: Part) -> None:
        self._folder, self._part = folder, part
        self._temporary = folder / _TEMPORARY / str(part.rank)

    def __enter__(self) -> _Files:
        self._clear()
        self._temporary.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()
        with suppress(OSError):  # others are not done
            self._temporary.parent.rmdir()

    def write(self, kind: Kind, number: int, content: bytes) -> None:
        path = kind.path(self._folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content, self._temporary / f"{os.getpid()}-{path.name}")

    def is_whole(self, kind: Kind, number: int, size: int) -> bool:
        """Whether the file is there; a power cut may have left an empty one."""
        try:
            return kind.path(self._folder, number).stat().st_size == size
        except FileNotFoundError:
            return False

    def _clear(self) -> None:
        """What this process or one of an earlier, larger number of processes left."""
        for left in self._temporary.parent.glob("*"):
            if left.name.isdigit() and int(left.name) % self._part.world == self._part.rank:
                shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class _Worker:
    images: ImageFolder
    vae: Autoencoder
    files: _Files
    sizes: Mapping[Kind, int]
    readers: ThreadPoolExecutor
    encoders: ThreadPoolExecutor

    def carry_out(self, batches: list[range], ahead: int, progress: Progress | None) -> int:
        """Write what is missing of these batches, with so many begun at a time; the number of their images."""
        total, begun = sum(map(len, batches)), deque[Future[int]]()
        done = 0
        for batch in batches:
            reading = [] if self._is_done(batch) else [self.readers.submit(self._picture, i) for i in batch]
            begun.append(self.encoders.submit(self._encode, batch, reading))
            done += begun.popleft().result() if len(begun) > ahead else 0
            if progress:
                progress(done, total)
        for one in begun:
            done += one.result()
            if progress:
                progress(done, total)
        return done

    def _is_done(self, batch: range) -> bool:
        return all(self.files.is_whole(kind, i, self.sizes[kind]) for i in batch for kind in KINDS)

    def _picture(self, number: int) -> torch.Tensor:
        pixels = self.images.read([number])[0]
        self._write(IMAGES, number, _png, pixels.numpy())
        return pixels

    def _encode(self, batch: range, reading: list[Future[torch.Tensor]]) -> int:
        """Write the latents of a batch, if there is anything to do; the number of its images."""
        if reading:
            moments = self.vae.moments(torch.stack([pixels.result() for pixels in reading])).cpu().numpy()
            for number, values in zip(batch, moments, strict=True):
                self._write(LATENTS, number, _npy, values)
        return len(batch)

    def _write(self, kind: Kind, number: int, encode: Callable[[np.ndarray], bytes], values: np.ndarray) -> None:
        if not self.files.is_whole(kind, number, self.sizes[kind]):
            self.files.write(kind, number, encode(values))


@contextmanager
def _one_core_each(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of which each computes on one core: how many cores share a batch would show in the last digits."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _require_apart(wanted: Preparation) -> None:
    """What is prepared must not be among the images that are."""
    if wanted.folder.resolve().is_relative_to(wanted.source.resolve()):
        raise DataError("path", f"'{wanted.folder}' lies in '{wanted.source}'; name a folder elsewhere")


def _batches(count: int, size: int, part: Part) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)][part.rank :: part.world]


def _file_sizes(vae: Autoencoder, side: int) -> dict[Kind, int]:
    """How many bytes each file has: neither kind is compressed. An image that the VAE cannot take is refused here.

    Raises:
        DataError: it takes other channels, or this size is not a multiple of its own.
    """
    if vae.channels not in (ImageFolder.channels, None):
        raise DataError("vae", f"the VAE takes {vae.channels} channels, the images have {ImageFolder.channels}")
    blank = torch.zeros(1, ImageFolder.channels, side, side, dtype=torch.uint8)
    return {IMAGES: len(_png(blank[0].numpy())), LATENTS: len(_npy(vae.moments(blank).cpu().numpy()[0]))}


def _begin(wanted: Preparation, images: ImageFolder, vae: Autoencoder) -> None:
    """Claim the folder: the manifest and the labels, written by whichever process comes first.

    Raises:
        DataError: the folder is another preparation's, or none.
    """
    manifest = _manifest(wanted, images, vae)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(wanted.folder / _LOCK):
        held = read_manifest(wanted.folder)
        if held is None and any(not path.name.startswith(".") for path in wanted.folder.iterdir()):
            raise DataError(
                "path", f"'{wanted.folder}' is not empty, and no preparation was begun there; name a new folder"
            )
        if held is not None and (differing := _differing(held, manifest)):
            raise DataError("path", f"'{wanted.folder}' is another preparation: {differing}; name a new folder")
        if held is None:
            _write_json(wanted.folder / MANIFEST, manifest)
        for kind in KINDS:
            if not (wanted.folder / kind.tree / LABELS).is_file():
                labels = [[kind.name(i), label] for i, label in enumerate(images.labels.tolist())]
                _write_json(wanted.folder / kind.tree / LABELS, {"labels": labels}, indent=None)


def _manifest(wanted: Preparation, images: ImageFolder, vae: Autoencoder) -> dict[str, Any]:
    return {
        "vae": wanted.vae,
        "vae_hash": digest(vae.identity),
        "scaling": asdict(vae.scaling),
        "resolution": wanted.resolution,
        "crop": "center-crop-dhariwal",
        "count": len(images),
        "source": images.fingerprint,
    }


def _differing(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The entries in which a preparation is not as wanted, in words."""
    names = [name for name in wanted if name not in _INFORMATIVE and held.get(name) != wanted[name]]
    return "; ".join(f"{name} is {_short(held.get(name))}, not {_short(wanted[name])}" for name in names)


def _short(value: Any) -> str:
    return str(value)[:_SHOWN]


def _png(pixels: np.ndarray) -> bytes:
    """``(3, h, w)`` as a PNG without compression: it is read in half the time."""
    held = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(held, format="png", compress_level=0)
    return held.getvalue()


def _npy(moments: np.ndarray) -> bytes:
    held = io.BytesIO()
    np.save(held, moments)
    return held.getvalue()


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    _write(path, (json.dumps(value, indent=indent) + "\n").encode(), path.with_name(f".{path.name}.tmp"))


def _write(path: Path, content: bytes, temporary: Path) -> None:
    temporary.write_bytes(content)
    temporary.replace(path)
