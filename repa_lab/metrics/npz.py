"""npz files of statistics and images, as published by pytorch-fid and ADM's evaluator (guided-diffusion)."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from repa_lab.errors import InputError
from repa_lab.files import replace_atomically
from repa_lab.metrics.quality import Statistics

# The extractor of ADM's reference batches (VIRTUAL_*.npz), and their names for sFID's statistics.
_ADM = {"extractor": "inception", "preprocessing": "tf1-bilinear-299"}
_SPATIAL = {"mu": "mu_s", "sigma": "sigma_s"}
_IMAGES = "arr_0"


class StatisticsError(InputError):
    """A file lacks the requested statistics or images; the message is one line that names file, problem and fix."""


def write_statistics(path: Path, statistics: Statistics, identity: Mapping[str, str]) -> None:
    """Write ``mu``, ``sigma``, ``count`` and the words of ``identity`` atomically, as npz.

    Args:
        path: the file, with any name.
        identity: what was measured: extractor, weights, preprocessing, layer, source.
    """
    fields: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma, "count": statistics.count, **identity}
    replace_atomically(path, partial(_savez, fields=fields))


def _savez(path: Path, fields: Mapping[str, Any]) -> None:
    with path.open("wb") as file:  # np.savez appends .npz to a path
        np.savez(file, **fields)


def read_statistics(
    path: Path, identity: Mapping[str, str], width: int | None = None, spatial: bool = False
) -> Statistics:
    """Read ``mu`` and ``sigma`` from an npz file of repa-lab, ADM, pytorch-fid or torch-fidelity.

    Args:
        identity: what must have been measured. A word that the file lacks is not checked; ADM's files are Inception's.
        width: the number of features, or None for any.
        spatial: whether to read sFID's statistics, ``mu_s`` and ``sigma_s``, from a file of ADM's.

    Raises:
        StatisticsError: the file is missing or damaged, or holds no statistics or those of something else.
    """
    fields = _fields(path)
    is_adm = "mu_s" in fields
    names = _SPATIAL if is_adm and spatial else {key: key for key in _SPATIAL}
    if missing := [name for name in names.values() if name not in fields]:
        raise StatisticsError(f"'{path}' has no {' and no '.join(missing)}: give an npz file with mu and sigma")
    words = {name: str(value) for name, value in {**fields, **(_ADM if is_adm else {})}.items() if name in identity}
    if wrong := [f"{name} {words[name]}, not {identity[name]}" for name in words if words[name] != identity[name]]:
        fix = "compute them again, or use the extractor they are of"
        raise StatisticsError(f"'{path}' has statistics of {' and '.join(wrong)}: {fix}")
    mu, sigma, count = (_real(path, name, fields.get(name, 0)) for name in (*names.values(), "count"))
    if count.size != 1:
        raise StatisticsError(f"'{path}' has counts {count.shape}: give one number of images, or none")
    if "count" in fields and count.item() < 2:
        raise StatisticsError(f"'{path}' has statistics of {int(count.item())} images: compute them of two or more")
    _require_mean_and_covariance(path, mu, sigma, width)
    return Statistics(mu, sigma, int(count.item()))


def _fields(path: Path) -> dict[str, Any]:
    """Return the arrays of an npz file except its images, which can be gigabytes."""
    if not path.is_file():
        raise StatisticsError(f"no file '{path}'")
    if not zipfile.is_zipfile(path):  # NumPy would try to unpickle the file
        raise StatisticsError(f"'{path}' is not an npz file of arrays, or is cut short; download it again")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name != _IMAGES}
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())
        raise StatisticsError(f"'{path}' is not an npz file of arrays: {reason}; download it again") from None


def _real(path: Path, name: str, value: Any) -> NDArray[np.float64]:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise StatisticsError(f"'{path}' has {name} of {array.dtype}: give real numbers")
    return array.astype(np.float64)


def _require_mean_and_covariance(path: Path, mu: Any, sigma: Any, width: int | None) -> None:
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise StatisticsError(f"'{path}' has mu {mu.shape} and sigma {sigma.shape}; allowed: (d,) and (d, d)")
    if width not in (None, len(mu)):
        fix = "compute them with this extractor"
        raise StatisticsError(f"'{path}' has {len(mu)} features and the extractor {width}: {fix}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise StatisticsError(f"'{path}' has statistics that are not finite: compute them again")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        what = "a sigma that is no covariance: it is not symmetric, or has variances below 0"
        raise StatisticsError(f"'{path}' has {what}; compute it again")


def write_images(path: Path, batches: Iterable[torch.Tensor], count: int) -> None:
    """Write images atomically as ``arr_0``, uint8 ``(N, H, W, 3)``, as ADM's evaluator reads them.

    Only one batch is in memory at a time.

    Args:
        batches: uint8 pixels ``(B, 1 or 3, H, W)`` of one size; grey images get three equal channels.
        count: number of images in all batches.

    Raises:
        ValueError: there are no images or not ``count``, they differ in size, or are not uint8.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None or not count:
        raise ValueError("there are no images to write")
    replace_atomically(path, partial(_write_images, batches=itertools.chain([first], iterator), count=count))


def _write_images(path: Path, batches: Iterable[torch.Tensor], count: int) -> None:
    size, written = None, 0
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open(f"{_IMAGES}.npy", "w", force_zip64=True) as file,
    ):
        for pixels in map(_channels_last, batches):
            if size is None:
                size = pixels.shape[1:]
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size)}
                np.lib.format.write_array_header_1_0(file, header)
            if pixels.shape[1:] != size:
                raise ValueError(f"images of one size are needed, got {size} and {pixels.shape[1:]}")
            file.write(pixels.tobytes())
            written += len(pixels)
    if written != count:
        raise ValueError(f"{count} images were announced and {written} arrived")


def _channels_last(pixels: torch.Tensor) -> NDArray[np.uint8]:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"need uint8 pixels (B, 1 or 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    array: NDArray[np.uint8] = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return array


def read_images(path: Path, batch_size: int = 64) -> Iterator[torch.Tensor]:
    """Read the images of an npz file in batches, uint8 ``(B, 3, H, W)``.

    Raises:
        StatisticsError: the file is missing or damaged, or holds no uint8 images ``(N, H, W, 3)``.
    """
    with _opened(path) as (file, (count, height, width)):
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            values = np.frombuffer(file.read(size * height * width * 3), np.uint8)
            yield torch.tensor(values.reshape(size, height, width, 3)).permute(0, 3, 1, 2).contiguous()


def images_shape(path: Path) -> tuple[int, int, int] | None:
    """Return the number, height and width of the images of an npz file without reading them; None if it has none."""
    try:
        with _opened(path) as (_, shape):
            return shape
    except StatisticsError:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int]]]:
    """Open the images of an npz file behind their header; yield the file and the images' number, height and width."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{_IMAGES}.npy") as file:
            is_version_1 = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if is_version_1 else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            if is_fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise StatisticsError(f"'{path}' holds {dtype} {shape} under arr_0; allowed: uint8 (N, H, W, 3)")
            yield file, shape[:3]
    except StatisticsError:
        raise
    except KeyError:
        message = f"'{path}' holds no images under arr_0: give a file with images, such as ADM's"
        raise StatisticsError(message) from None
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise StatisticsError(
            f"'{path}' holds no images under arr_0 that can be read: {error}; download it again"
        ) from None
