"""Prepared folders: cropped images and their latents, which `repa-lab data prepare` writes and runs train on.

Images are numbered in the order of their paths. They are encoded in fixed batches, so that the latents do not depend on
the number of processes that share the work, or on interruptions. A file is written whole or not at all, and only once.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from typing_extensions import override

from repa_lab.data import DataError
from repa_lab.data.cache import Progress, encode_batches
from repa_lab.data.folders import (
    IMAGES,
    KINDS,
    LABELS,
    LATENTS,
    MANIFEST,
    SAMPLE,
    Kind,
    open_image,
    read_listing,
    read_manifest,
)
from repa_lab.data.latents import Autoencoder, load_vae
from repa_lab.data.settings import ImageFolderSettings, PreparedSettings
from repa_lab.data.sources import CroppedImages, ImageFolder, remembered, stamps
from repa_lab.files import digest

_PROBES = 4
# TF32 or half precision change latents by a hundredth at most; another VAE, or another image, by as much as they are.
_TOLERANCE = 0.05
_SHOWN = 20  # characters of a hash in messages
_LOCK, _TEMPORARY = ".lock", ".tmp"
# What may differ when a preparation is taken up again: the name of the same VAE, and what follows from its config.
_INFORMATIVE = ("vae", "scaling")


class Prepared(CroppedImages):
    """Images of a folder in the layout of :mod:`repa_lab.data.folders`, without captions.

    Images that are known in ``cache``, the folder of all caches, are not opened before their pixels are needed.

    Raises:
        DataError: the folder is incomplete, or its images have another size.
    """

    def __init__(self, settings: PreparedSettings, cache: Path | None = None) -> None:
        self.listing, self._cache = read_listing(settings.folder), cache
        super().__init__(settings, len(self.listing))
        self._originals[:] = self.side
        self.labels = torch.tensor(self.listing.labels)
        self.num_classes = int(self.labels.max()) + 1
        listed = [self.listing.numbers, self.listing.labels, self.side]
        sampled = stamps(self.listing.path(kind, index) for index in self.listing.sample(SAMPLE) for kind in KINDS)
        key = {"kind": "prepared/1", "of": digest([sampled, listed])}
        self.fingerprint = remembered(cache, key, lambda: self.listing.fingerprint(self.side))

    @override
    def open(self, index: int) -> Image.Image:
        return open_image(self.listing.path(IMAGES, index), self.side)

    @override
    def name(self, index: int) -> str:
        return f"'{self.listing.path(IMAGES, index)}'"

    def latents(self, vae: Autoencoder, device: torch.device) -> PreparedLatents:
        """Return the latents beside the images, if they are those of ``vae``: four images are encoded and compared.

        No name is trusted: REPA's tool writes none, and autoencoders of different names may share an encoder, as Stable
        Diffusion's ft-mse and ft-ema do.

        Raises:
            DataError: the latents are of another VAE, or of other images.
        """
        latents = PreparedLatents(self)

        def compare() -> bool:
            vae.model.to(device)
            for index in self.listing.sample(_PROBES):
                stored, encoded = latents.read(index), vae.moments(self.read([index])).cpu()[0]
                if not _are_alike(encoded, stored):
                    shapes = f" of shape {tuple(stored.shape)}, not {tuple(encoded.shape)}"
                    other = f"other latents{shapes if encoded.shape != stored.shape else ''}"
                    maker = "it was made by another VAE"
                    if manifest := read_manifest(self.listing.folder):
                        maker = f"the folder was prepared with '{manifest.get('vae')}'"
                    message = f"{other} than this VAE makes of the image: {maker}, or files are mixed up"
                    raise DataError("vae", f"'{self.listing.path(LATENTS, index)}' holds {message}")
            return True

        key = {"kind": "probes/1", "of": self.fingerprint, "vae": digest(vae.identity)}
        remembered(self._cache, key, compare)
        return latents


class PreparedLatents:
    """Mean and standard deviation of every image's latents, ``(2 * c, h, w)`` or ``(1, 2 * c, h, w)`` in a file each.

    Raises:
        DataError: the first file cannot be read.
    """

    def __init__(self, images: Prepared) -> None:
        self._images = images
        self._shape = _load_latents(images.listing.path(LATENTS, 0)).shape

    def shape(self, index: torch.Tensor) -> torch.Size:
        """Return the shape of all tensors."""
        return self._shape

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return how the images ``index`` were cut, ``(n, 6)``."""
        return self._images.frames(index.tolist())

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.read(number) for number in index.tolist()])

    def read(self, index: int) -> torch.Tensor:
        """Return the tensor of one image, ``(2 * c, h, w)`` in float32.

        Raises:
            DataError: the file cannot be read, or differs in shape from the first.
        """
        path = self._images.listing.path(LATENTS, index)
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

    Raises:
        DataError: the images or the VAE cannot be used, the folder is another preparation's, or it cannot be written.
    """
    if folder.resolve().is_relative_to(source.resolve()):
        raise DataError("path", f"'{folder}' lies in '{source}'; name a folder elsewhere")
    images = ImageFolder(ImageFolderSettings(path=str(source), resolution=resolution))
    autoencoder = load_vae(vae, images)
    autoencoder.model.to(device)
    preparation = _Preparation(folder, images, autoencoder, rank, world)
    numbers = range(len(images))
    share = [numbers[start : start + batch_size] for start in range(0, len(images), batch_size)][rank::world]
    encoders = threads if device.type == "cpu" else 1
    try:
        preparation.claim(vae)  # first, because another's folder must stay as it is
        with preparation, _single_core_threads(encoders) as pool:
            missing = [batch for batch in share if not preparation.is_done(batch)]
            done, total = sum(map(len, share)) - sum(map(len, missing)), sum(map(len, share))
            stages = preparation.read, autoencoder.moments, preparation.write
            if progress:
                progress(done, total)
            for batch in encode_batches(missing, *stages, threads, (pool, encoders)):
                done += len(batch)
                if progress:
                    progress(done, total)
        return total
    except torch.OutOfMemoryError:
        message = f"batches of {batch_size} images do not fit in memory: give a smaller --batch-size"
        raise DataError("batch_size", message) from None
    except OSError as error:
        raise DataError("path", f"cannot write to '{folder}': {error.strerror or error}") from None


class _Preparation:
    """Writes a prepared folder, every file whole or not at all, by way of temporary files.

    Raises:
        DataError: the VAE takes images of other sizes.
    """

    def __init__(self, folder: Path, images: ImageFolder, vae: Autoencoder, rank: int, world: int) -> None:
        self._folder, self._images, self._vae, self._rank, self._world = folder, images, vae, rank, world
        self._temporary = folder / _TEMPORARY / str(rank)
        blank = torch.zeros(1, images.channels, images.side, images.side, dtype=torch.uint8)
        of_blank = {IMAGES: blank, LATENTS: vae.moments(blank).cpu()}
        self._sizes = {kind: len(_content(kind, values[0].numpy())) for kind, values in of_blank.items()}

    def __enter__(self) -> _Preparation:
        self._clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()
        with suppress(OSError):  # other processes are not done
            self._temporary.parent.rmdir()

    def _clear(self) -> None:
        """Remove what this process, or a process of an earlier, larger number of them, left."""
        for left in self._temporary.parent.glob("*"):
            if left.name.isdigit() and int(left.name) % self._world == self._rank:
                shutil.rmtree(left, ignore_errors=True)

    def claim(self, vae: str) -> None:
        """Write the manifest and the labels, if no other process has.

        Raises:
            DataError: the folder belongs to another preparation, or holds something else.
        """
        manifest = {
            "vae": vae,
            "vae_hash": digest(self._vae.identity),
            "scaling": asdict(self._vae.scaling),
            "resolution": self._images.side,
            "crop": "center-crop-dhariwal",
            "count": len(self._images),
            "source": self._images.fingerprint,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / _LOCK):
            present = read_manifest(self._folder)
            if present is None and any(not path.name.startswith(".") for path in self._folder.iterdir()):
                message = f"'{self._folder}' is not empty, and no preparation was begun there; name a new folder"
                raise DataError("path", message)
            if present is None:
                present = json.loads(json.dumps(manifest))
                self._write(self._folder / MANIFEST, json.dumps(present, indent=2).encode() + b"\n")
            if names := [name for name in manifest if name not in _INFORMATIVE and present.get(name) != manifest[name]]:
                differing = "; ".join(
                    f"{name} is {str(present.get(name))[:_SHOWN]}, not {str(manifest[name])[:_SHOWN]}" for name in names
                )
                raise DataError("path", f"'{self._folder}' is another preparation: {differing}; name a new folder")
            for kind in KINDS:
                if not (self._folder / kind.tree / LABELS).is_file():
                    rows = [[kind.name(number), label] for number, label in enumerate(self._images.labels.tolist())]
                    content = json.dumps({"labels": rows}).encode() + b"\n"
                    self._write(self._folder / kind.tree / LABELS, content)

    def is_done(self, batch: range) -> bool:
        """Return whether all files of a batch are there."""
        return all(self._is_whole(kind, number) for number in batch for kind in KINDS)

    def read(self, batch: range) -> torch.Tensor:
        """Return the images of a batch, after writing those that are missing."""
        pixels = self._images.read(batch)
        self._write_missing(IMAGES, batch, pixels)
        return pixels

    def write(self, batch: range, moments: torch.Tensor) -> None:
        """Write the latents of a batch that are missing."""
        self._write_missing(LATENTS, batch, moments.cpu())

    def _is_whole(self, kind: Kind, number: int) -> bool:
        """Return whether a file is there; a power cut may have left an empty one."""
        try:
            return kind.path(self._folder, number).stat().st_size == self._sizes[kind]
        except FileNotFoundError:
            return False

    def _write_missing(self, kind: Kind, batch: range, tensors: torch.Tensor) -> None:
        for number, values in zip(batch, tensors.numpy(), strict=True):
            if not self._is_whole(kind, number):
                self._write(kind.path(self._folder, number), _content(kind, values))

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary / f"{os.getpid()}-{path.name}"
        temporary.write_bytes(content)
        temporary.replace(path)


@contextmanager
def _single_core_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute on one core: the number of cores that share a batch would change the last digits."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _content(kind: Kind, values: np.ndarray) -> bytes:
    """Return the content of a file; an image is a PNG without compression, which is read in half the time."""
    stream = io.BytesIO()
    if kind == IMAGES:
        Image.fromarray(values.transpose(1, 2, 0)).save(stream, format="png", compress_level=0)
    else:
        np.save(stream, values)
    return stream.getvalue()
