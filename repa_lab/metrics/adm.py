"""Batches of images in the npz form of ADM's evaluator (guided-diffusion, `evaluations`): ``arr_0``, uint8
``(N, H, W, 3)``.

Samples are written so that anyone can measure them again; reference batches are read. Neither is held in memory.
"""

from __future__ import annotations

import itertools
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repa_lab.metrics.arrays import on_host
from repa_lab.metrics.reference import StatisticsError

Pixels = NDArray[np.uint8]
_MEMBER = "arr_0.npy"


def write_images(path: Path, batches: Iterable[ArrayLike], count: int) -> None:
    """Write images as an npz file, whole or not at all.

    Args:
        path: the file.
        batches: uint8 pixels ``(B, 1 or 3, H, W)`` of one size, arrays or tensors; grey is repeated.
        count: how many images there are in all.

    Raises:
        ValueError: no images, others than were announced, of several sizes, or not uint8.
    """
    waiting = iter(batches)
    first = next(waiting, None)
    if first is None or not count:
        raise ValueError("there are no images to write")
    shape = (count, *_last_channels(first).shape[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with (
                zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
                archive.open(_MEMBER, "w", force_zip64=True) as out,
            ):
                _write(out, itertools.chain([first], waiting), shape)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_images(path: Path, batch_size: int = 64) -> Iterator[Pixels]:
    """The images of a file, ``(B, 3, H, W)`` at a time.

    Raises:
        StatisticsError: no such file, or it holds no images, fewer than it says, or others than uint8 ``(N, H, W, 3)``.
    """
    with _opened(path) as (file, (count, height, width)):
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            values = np.frombuffer(file.read(size * height * width * 3), np.uint8)
            yield values.reshape(size, height, width, 3).transpose(0, 3, 1, 2).copy()


def images_shape(path: Path) -> tuple[int, int, int] | None:
    """How many images a file has, their height and their width, without reading them; None where it has none."""
    try:
        with _opened(path) as (_, shape):
            return shape
    except StatisticsError:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int]]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as file:
            yield file, _shape(path, file)
    except StatisticsError:
        raise
    except KeyError:
        raise StatisticsError(
            f"'{path}' holds no images under arr_0: give a file that has them, as ADM's have"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise StatisticsError(f"'{path}' holds no images under arr_0 that can be read: {error}; get it anew") from None


def _write(out: IO[bytes], batches: Iterable[ArrayLike], shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    written = 0
    for batch in batches:
        pixels = _last_channels(batch)
        if pixels.shape[1:] != shape[1:]:
            raise ValueError(f"images of one size are needed, got {shape[1:]} and {pixels.shape[1:]}")
        out.write(np.ascontiguousarray(pixels).tobytes())
        written += len(pixels)
    if written != shape[0]:
        raise ValueError(f"{shape[0]} images were announced and {written} came")


def _last_channels(batch: ArrayLike) -> Pixels:
    pixels: Any = np.asarray(on_host(batch))
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"need uint8 pixels (B, 1 or 3, H, W), got {pixels.dtype} {pixels.shape}")
    last: Pixels = np.broadcast_to(pixels.transpose(0, 2, 3, 1), (len(pixels), *pixels.shape[2:], 3))
    return last


def _shape(path: Path, file: IO[bytes]) -> tuple[int, int, int]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise StatisticsError(f"'{path}' holds {dtype} {shape} under arr_0; allowed: uint8 (N, H, W, 3)")
    return shape[:3]
