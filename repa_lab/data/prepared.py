"""Prepared folders: cropped images and their latents, which `repa-lab data prepare` writes and runs train on.

Images are numbered in the order of their paths. They are encoded in fixed batches, so that the latents do not depend on
the number of processes that share the work, or on interruptions. A file is written whole or not at all, and only once.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.autoencoder import Autoencoder, load_autoencoder
from repa_lab.data.cache import Progress, encode_batches
from repa_lab.data.layout import (
    IMAGES,
    KINDS,
    LABELS,
    LATENTS,
    MANIFEST,
    SAMPLE,
    Kind,
    Listing,
    open_image,
    read_listing,
    read_manifest,
)
from repa_lab.data.settings import PreparedSettings
from repa_lab.data.sources import CroppedImages, ImageFolder, remembered, stamps
from repa_lab.files import digest

_PROBES = 4
# TF32 or half precision change latents by a hundredth at most; another VAE, or another image, by as much as they are.
_TOLERANCE = 0.05
_SHOWN = 20  # characters of a hash in messages
_LOCK, _TEMPORARY = ".lock", ".tmp"
# What may differ when a preparation is taken up again: the name of the same VAE, and what follows from its config.
_INFORMATIVE = ("vae", "scaling")


def open_prepared(settings: PreparedSettings, cache: Path | None = None) -> Prepared:
    """Open a prepared folder."""
    return Prepared(settings.folder, settings.side, cache)


class Prepared(CroppedImages):
    """Images of a folder in the layout of :mod:`repa_lab.data.layout`, without captions.

    Args:
        resolution: pixels along each side of its images.
        cache: folder of all caches; images that it knows are not opened before their pixels are needed.

    Raises:
        DataError: the folder is incomplete, or its images have another size.
    """

    def __init__(self, folder: Path, resolution: int, cache: Path | None = None) -> None:
        self._listing, self._cache = read_listing(folder), cache
        super().__init__(len(self._listing), resolution)
        self._originals[:] = resolution
        self.labels = torch.tensor(self._listing.labels)
        self.num_classes = int(self.labels.max()) + 1
        listed = [self._listing.numbers, self._listing.labels, resolution]
        sampled = stamps(self._listing.path(kind, index) for index in self._listing.sample(SAMPLE) for kind in KINDS)
        key = {"kind": "prepared/1", "of": digest([sampled, listed])}
        self.fingerprint = remembered(cache, key, lambda: self._listing.fingerprint(resolution))

    def open(self, index: int) -> Image.Image:
        """Return an image; see :class:`CroppedImages`."""
        return open_image(self._listing.path(IMAGES, index), self.side)

    def name(self, index: int) -> str:
        """Return an image's file; see :class:`CroppedImages`."""
        return f"'{self._listing.path(IMAGES, index)}'"

    def latents(self, vae: Autoencoder, device: torch.device) -> PreparedLatents:
        """Return the latents beside the images, if they are those of ``vae``: four images are encoded and compared.

        No name is trusted: REPA's tool writes none, and autoencoders of different names may share an encoder, as Stable
        Diffusion's ft-mse and ft-ema do.

        Raises:
            DataError: the latents are of another VAE, or of other images.
        """
        latents = PreparedLatents(self._listing, self.frames)

        def compare() -> bool:
            vae.model.to(device)
            for index in self._listing.sample(_PROBES):
                stored, encoded = latents.read(index), vae.moments(self.read([index])).cpu()[0]
                if not _are_alike(encoded, stored):
                    raise DataError("vae", self._other_latents(index, encoded, stored))
            return True

        key = {"kind": "probes/1", "of": self.fingerprint, "vae": digest(vae.identity)}
        remembered(self._cache, key, compare)
        return latents

    def _other_latents(self, index: int, encoded: torch.Tensor, stored: torch.Tensor) -> str:
        path, manifest = self._listing.path(LATENTS, index), read_manifest(self._listing.folder)
        shapes = "" if encoded.shape == stored.shape else f" of shape {tuple(stored.shape)}, not {tuple(encoded.shape)}"
        maker = f"the folder was prepared with '{manifest.get('vae')}'" if manifest else "it was made by another VAE"
        return f"'{path}' holds other latents{shapes} than this VAE makes of the image: {maker}, or files are mixed up"


class PreparedLatents:
    """Mean and standard deviation of every image's latents, ``(2 * c, h, w)`` or ``(1, 2 * c, h, w)`` in a file each.

    Raises:
        DataError: the first file cannot be read.
    """

    def __init__(self, listing: Listing, frames: Callable[[Sequence[int]], torch.Tensor]) -> None:
        self._listing, self._frames = listing, frames
        self._shape = _load_latents(listing.path(LATENTS, 0)).shape

    def shape(self, index: torch.Tensor) -> torch.Size:
        """Return the shape of all tensors; see :class:`repa_lab.data.space.Moments`."""
        return self._shape

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return the frames of images that are not cut; see :class:`repa_lab.data.space.Moments`."""
        return self._frames(index.tolist())

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tensors of the images ``index``; see :class:`repa_lab.data.space.Moments`.

        Raises:
            DataError: a file cannot be read, or differs in shape from the first.
        """
        return torch.stack([self.read(number) for number in index.tolist()])

    def read(self, index: int) -> torch.Tensor:
        """Return the tensor of one image, ``(2 * c, h, w)`` in float32.

        Raises:
            DataError: the file cannot be read, or differs in shape from the first.
        """
        path = self._listing.path(LATENTS, index)
        values = _load_latents(path)
        if values.shape != self._shape:
            message = f"'{path}' is {tuple(values.shape)}, the first is {tuple(self._shape)}"
            raise DataError("path", f"the latents of one folder must be of one shape: {message}")
        return values


def _load_latents(path: Path) -> torch.Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError("path", f"cannot read '{path}': {error}") from None
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim != 3 or len(values) % 2 or values.dtype.kind != "f":
        message = f"'{path}' holds {values.dtype} of shape {values.shape}"
        raise DataError("path", f"{message}, not means and deviations (2 * channels, height, width)")
    return torch.from_numpy(values).float()


def _are_alike(encoded: torch.Tensor, stored: torch.Tensor) -> bool:
    """Return whether means and deviations are the same up to rounding, each by the root of the mean square."""
    if encoded.shape != stored.shape:
        return False
    pairs = zip(encoded.chunk(2), stored.chunk(2), strict=True)
    return all(bool((a - b).square().mean() <= _TOLERANCE**2 * a.square().mean()) for a, b in pairs)


def prepare(
    source: Path,
    folder: Path,
    resolution: int,
    vae: str,
    batch_size: int = 64,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    threads: int = 1,
    progress: Progress | None = None,
) -> int:
    """Write what is missing of this process's share of a prepared folder; return the number of images in the share.

    Args:
        source: a folder of images, one class per subfolder.
        resolution: pixels along each side.
        vae: an autoencoder of diffusers: a hub id or a folder.
        batch_size: images that are encoded at a time.
        rank: number of this process; its share is every ``world``-th batch from the ``rank``-th on.
        threads: number of threads that read and crop, and on a CPU encode.
        progress: told how many images are done, of how many.

    Raises:
        DataError: the images or the VAE cannot be used, the folder is another preparation's, or it cannot be written.
    """
    if folder.resolve().is_relative_to(source.resolve()):
        raise DataError("path", f"'{folder}' lies in '{source}'; name a folder elsewhere")
    images, autoencoder = ImageFolder(source, resolution), load_autoencoder(vae, "vae")
    autoencoder.model.to(device)
    sizes = _file_sizes(autoencoder, resolution)
    manifest = {
        "vae": vae,
        "vae_hash": digest(autoencoder.identity),
        "scaling": asdict(autoencoder.scaling),
        "resolution": resolution,
        "crop": "center-crop-dhariwal",
        "count": len(images),
        "source": images.fingerprint,
    }
    numbers = range(len(images))
    batches = [numbers[start : start + batch_size] for start in range(0, len(images), batch_size)][rank::world]
    total, done = sum(map(len, batches)), 0
    try:
        _claim(folder, manifest, images.labels.tolist())
        with _FileWriter(folder, sizes, rank, world) as files:
            for batch in _written(batches, files, images, autoencoder, threads, threads if device.type == "cpu" else 1):
                done += len(batch)
                if progress:
                    progress(done, total)
        return total
    except torch.OutOfMemoryError:
        message = f"batches of {batch_size} images do not fit in memory: give a smaller --batch-size"
        raise DataError("batch_size", message) from None
    except OSError as error:
        raise DataError("path", f"cannot write to '{folder}': {error.strerror or error}") from None


def _written(
    batches: Sequence[range], files: _FileWriter, images: ImageFolder, vae: Autoencoder, readers: int, encoders: int
) -> Iterator[range]:
    """Write the files that batches of images lack, and yield every batch, in order, once its files are there."""

    def read(batch: range) -> tuple[range, torch.Tensor | None]:
        if all(files.is_whole(kind, number) for number in batch for kind in KINDS):
            return batch, None
        pixels = images.read(batch)
        for number, image in zip(batch, pixels.numpy(), strict=True):
            files.write_missing(IMAGES, number, image)
        return batch, pixels

    def encode(loaded: tuple[range, torch.Tensor | None]) -> tuple[range, np.ndarray | None]:
        batch, pixels = loaded
        return batch, None if pixels is None else vae.moments(pixels).cpu().numpy()

    def write(encoded: tuple[range, np.ndarray | None]) -> range:
        batch, moments = encoded
        if moments is not None:
            for number, values in zip(batch, moments, strict=True):
                files.write_missing(LATENTS, number, values)
        return batch

    with _single_core_threads(encoders) as pool:
        yield from encode_batches(batches, read, encode, write, readers, (pool, encoders))


class _FileWriter:
    """Writes files whole or not at all, by way of temporary files; those of a killed process are removed."""

    def __init__(self, folder: Path, sizes: Mapping[Kind, int], rank: int, world: int) -> None:
        self._folder, self._sizes, self._rank, self._world = folder, sizes, rank, world
        self._temporary = folder / _TEMPORARY / str(rank)

    def __enter__(self) -> _FileWriter:
        self._clear()
        self._temporary.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()
        with suppress(OSError):  # other processes are not done
            self._temporary.parent.rmdir()

    def is_whole(self, kind: Kind, number: int) -> bool:
        """Return whether a file is there; a power cut may have left an empty one."""
        try:
            return kind.path(self._folder, number).stat().st_size == self._sizes[kind]
        except FileNotFoundError:
            return False

    def write_missing(self, kind: Kind, number: int, values: np.ndarray) -> None:
        """Write a file unless it is there."""
        if not self.is_whole(kind, number):
            path = kind.path(self._folder, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary / f"{os.getpid()}-{path.name}"
            temporary.write_bytes(_content(kind, values))
            temporary.replace(path)

    def _clear(self) -> None:
        """Remove what this process, or a process of an earlier, larger number of them, left."""
        for left in self._temporary.parent.glob("*"):
            if left.name.isdigit() and int(left.name) % self._world == self._rank:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _single_core_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute on one core: the number of cores that share a batch would change the last digits."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _file_sizes(vae: Autoencoder, side: int) -> dict[Kind, int]:
    """Return the number of bytes of each kind of file; neither kind is compressed.

    Raises:
        DataError: the VAE takes other channels, or images of other sizes.
    """
    if vae.channels not in (ImageFolder.channels, None):
        raise DataError("vae", f"the VAE takes {vae.channels} channels, the images have {ImageFolder.channels}")
    blank = torch.zeros(1, ImageFolder.channels, side, side, dtype=torch.uint8)
    values = {IMAGES: blank, LATENTS: vae.moments(blank).cpu()}
    return {kind: len(_content(kind, tensor[0].numpy())) for kind, tensor in values.items()}


def _content(kind: Kind, values: np.ndarray) -> bytes:
    """Return the content of a file; an image is a PNG without compression, which is read in half the time."""
    stream = io.BytesIO()
    if kind == IMAGES:
        Image.fromarray(values.transpose(1, 2, 0)).save(stream, format="png", compress_level=0)
    else:
        np.save(stream, values)
    return stream.getvalue()


def _claim(folder: Path, manifest: Mapping[str, Any], labels: Sequence[int]) -> None:
    """Write the manifest and the labels, if no other process has.

    Raises:
        DataError: the folder is another preparation's, or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):
        present = read_manifest(folder)
        if present is None and any(not path.name.startswith(".") for path in folder.iterdir()):
            message = f"'{folder}' is not empty, and no preparation was begun there; name a new folder"
            raise DataError("path", message)
        if present is None:
            present = dict(manifest)
            _write_json(folder / MANIFEST, present, indent=2)
        names = [name for name in manifest if name not in _INFORMATIVE and present.get(name) != manifest[name]]
        if names:
            short = {name: (str(present.get(name))[:_SHOWN], str(manifest[name])[:_SHOWN]) for name in names}
            differing = "; ".join(f"{name} is {before}, not {now}" for name, (before, now) in short.items())
            raise DataError("path", f"'{folder}' is another preparation: {differing}; name a new folder")
        for kind in KINDS:
            if not (folder / kind.tree / LABELS).is_file():
                rows = [[kind.name(number), label] for number, label in enumerate(labels)]
                _write_json(folder / kind.tree / LABELS, {"labels": rows})


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a file whole or not at all, by way of a temporary file whose name every process gives it."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    temporary.replace(path)
