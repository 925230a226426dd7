"""The real images that samples are compared with: their statistics and features, computed once and cached.

Statistics and images are npz files, as published by pytorch-fid and ADM's evaluator (guided-diffusion).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from repa_lab.errors import InputError
from repa_lab.files import digest, replace_atomically
from repa_lab.metrics.extractor import Extractor
from repa_lab.metrics.protocol import METRICS, SPATIAL, layer_of, layers
from repa_lab.metrics.quality import Moments, Statistics

if TYPE_CHECKING:
    from repa_lab.metrics.protocol import Features

FOLDER = "reference"
KEPT = 10_000
_KEY_LENGTH = 16
# The extractor of ADM's reference batches (VIRTUAL_*.npz).
_ADM = {"extractor": "inception", "preprocessing": "tf1-bilinear-299"}
_IMAGES = "arr_0"


class StatisticsError(InputError):
    """A file lacks the requested statistics or images; the message is one line that names file, problem and fix."""


@dataclass(frozen=True)
class RealImages:
    """Real images to compare samples with."""

    source: str  # digest of the images and their order; with a cached reference of this source no image is read
    count: int
    batches: Callable[[], Iterable[torch.Tensor]]  # all images, uint8 (B, 1 or 3, H, W) at a time; called if needed
    size: tuple[int, int] | None = None  # height and width in pixels; None if the images differ in size


@dataclass(frozen=True)
class ComparedImages:
    """What the metrics of an extractor compare of a set of images, real or generated."""

    extractor: str
    statistics: Mapping[str, Statistics]  # of all images, by layer
    features: Mapping[str, Features]  # by layer, if a metric needs them: of all images, or of evenly spaced real ones

    def of(self, metric: str) -> Any:
        """Return the :class:`Statistics` or the features, float32 ``(n, d)``, that a metric compares.

        Raises:
            ValueError: they were not collected, or the metric is not defined for the extractor.
        """
        layer, compares = layer_of(self.extractor, metric), METRICS[metric].compares
        collected: Mapping[str, Any] = self.statistics if compares == "statistics" else self.features
        if layer not in collected:
            raise ValueError(f"no features of {self.extractor} for {metric}: name it when the extractor is made")
        return collected[layer]


class Collector:
    """Collects what metrics compare of images that arrive in batches; only the metrics that need features keep them.

    Args:
        compares: the sides of :attr:`MetricFacts.compares` for which features are kept.

    Attributes:
        moments: of all images, by layer.
        kept: features of batches by layer, on the CPU, each with the number of its first image.
    """

    def __init__(self, extractor: Extractor, metrics: Iterable[str], compares: Container[str]) -> None:
        metrics, self._name = tuple(metrics), extractor.name
        self.moments = {
            layer: Moments(extractor.widths[layer], extractor.device)
            for layer in layers(extractor.name, metrics, ("statistics",))
        }
        self._kept_layers = layers(extractor.name, metrics, compares)
        self.kept: list[tuple[int, dict[str, Features]]] = []

    def add(
        self, features: Mapping[str, torch.Tensor], start: int, rows: slice | NDArray[np.int64] = slice(None)
    ) -> None:
        """Add the features of a batch by layer.

        Args:
            start: number of the batch's first image.
            rows: the images whose features are kept.
        """
        for layer, moments in self.moments.items():
            moments.add(features[layer])
        if self._kept_layers:
            self.kept.append((start, {layer: features[layer][rows].cpu().numpy() for layer in self._kept_layers}))

    @property
    def images(self) -> ComparedImages:
        """What was collected, with features in the order of the images."""
        statistics = {layer: moments.statistics for layer, moments in self.moments.items()}
        batches = [features for _, features in sorted(self.kept, key=lambda batch: batch[0])]
        joined = {layer: np.concatenate([batch[layer] for batch in batches]) for layer in self._kept_layers}
        return ComparedImages(self._name, statistics, joined)


def reference(extractor: Extractor, images: RealImages, cache: Path, keep: int = KEPT) -> ComparedImages:
    """Return what the extractor's metrics need of real images, from the cache or by one pass over the images.

    Files lie in ``cache/reference``, named by a digest of the images, the extractor's identity and the layer. Where KID
    or precision and recall are among the metrics, float32 features lie beside the statistics.

    Args:
        extractor: made for the metrics.
        keep: maximum number of images whose features are kept. KID's mean does not depend on it; precision and recall
            do (ADM's evaluator takes 10,000).

    Raises:
        StatisticsError: a file in the cache is damaged, or there are too few images for the metrics.
        ValueError: features are not finite.
    """
    _require_enough(extractor.metrics, images.count, "the training images")
    keep = min(keep, images.count)
    identities = {layer: extractor.identity | {"layer": layer, "source": images.source} for layer in extractor.layers}

    def files(compares: str, ending: str) -> dict[str, Path]:
        keys = {layer: identities[layer] for layer in layers(extractor.name, extractor.metrics, (compares,))}
        names = {layer: digest({**key, "count": images.count})[:_KEY_LENGTH] for layer, key in keys.items()}
        return {layer: cache / FOLDER / f"{name}{ending}" for layer, name in names.items()}

    of_statistics, of_features = files("statistics", ".npz"), files("features", f"-{keep}.npy")
    if not all(path.is_file() for path in (*of_statistics.values(), *of_features.values())):
        computed = _one_pass(extractor, images, keep)
        for layer, path in of_statistics.items():
            write_statistics(path, computed.statistics[layer], identities[layer])
        for layer, path in of_features.items():
            _write(path, partial(np.save, arr=computed.features[layer]))
    by_layer = {}
    for layer, path in of_statistics.items():
        try:
            by_layer[layer] = read_statistics(path, identities[layer])
        except StatisticsError:
            raise _damaged(path) from None
    return ComparedImages(extractor.name, by_layer, {layer: _load(path, keep) for layer, path in of_features.items()})


def _one_pass(extractor: Extractor, images: RealImages, keep: int) -> ComparedImages:
    """Return the statistics of all images, and the features of ``keep`` evenly spaced images."""
    collector, start = Collector(extractor, extractor.metrics, ("features",)), 0
    spaced = np.arange(keep) * images.count // max(keep, 1)
    for pixels in images.batches():
        rows = spaced[(spaced >= start) & (spaced < start + len(pixels))] - start
        collector.add(extractor.features(pixels), start, rows)
        start += len(pixels)
    if start != images.count:
        raise ValueError(f"{images.count} real images were announced and {start} arrived")
    return collector.images


def _load(path: Path, count: int) -> Features:
    try:
        values: Features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f" ({error})") from None
    if values.ndim != 2 or len(values) != count or not np.isfinite(values).all():
        raise _damaged(path)
    return values.astype(np.float32, copy=False)


def _damaged(path: Path, reason: str = "") -> StatisticsError:
    return StatisticsError(f"the cache file '{path}' is damaged{reason}; delete it, and it is computed again")


def read_reference(extractor: Extractor, path: Path, size: tuple[int, int] | None = None) -> ComparedImages:
    """Read a published reference: a file of ADM's (VIRTUAL_*.npz), of pytorch-fid, or one that repa-lab wrote.

    ADM's files hold statistics of the whole training set, for FID and sFID, and images, whose features are computed if
    KID or precision and recall are measured.

    Args:
        extractor: made for the metrics.
        size: height and width in pixels that the file's images must have, or None for any.

    Raises:
        StatisticsError: the file lacks what the extractor's metrics need, or is of another extractor or image size.
    """
    by_layer = {}
    for layer in layers(extractor.name, extractor.metrics, ("statistics",)):
        identity = {**extractor.identity, "layer": layer}
        by_layer[layer] = read_statistics(path, identity, extractor.widths[layer], layer == SPATIAL)
    shape = images_shape(path)
    if size and shape and shape[1:] != size:
        sides = " and the run's ".join(f"{height}x{width} px" for height, width in (shape[1:], size))
        raise StatisticsError(f"the images of '{path}' have {sides}: give a reference of the run's size")
    if not (compared := [metric for metric in extractor.metrics if METRICS[metric].compares == "features"]):
        return ComparedImages(extractor.name, by_layer, {})
    if shape:
        _require_enough(compared, shape[0], f"'{path}'")
    collector = Collector(extractor, compared, ("features",))
    for number, batch in enumerate(read_images(path)):
        collector.add(extractor.features(batch), number)
    return ComparedImages(extractor.name, by_layer, collector.images.features)


def _require_enough(metrics: Iterable[str], count: int, where: str) -> None:
    """Refuse, before training, a reference that is too small for a metric."""
    for metric in metrics:
        if count < METRICS[metric].least_real:
            needed = f"{metric} needs at least {METRICS[metric].least_real} real images"
            raise StatisticsError(f"{needed}, and there are {count} in {where}: give more, or leave it out of metrics")


def measure(metric: str, generated: ComparedImages, real: ComparedImages) -> tuple[float, ...]:
    """Return the values of a metric, in the order of :data:`repa_lab.metrics.protocol.METRICS`.

    Args:
        real: the same extractor's reference.

    Raises:
        ValueError: too few samples, features that are not finite, or a metric that was not collected.
    """
    facts = METRICS[metric]
    sides = (generated,) if facts.compares == "nothing" else (generated, real)
    values = facts.compute(*(side.of(metric) for side in sides))
    return values if isinstance(values, tuple) else (float(values),)


# ---- npz files


def _write(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Fill a file atomically; NumPy adds an ending to a path, but none to an open file."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            save(file)

    replace_atomically(path, fill)


def write_statistics(path: Path, statistics: Statistics, identity: Mapping[str, str]) -> None:
    """Write statistics atomically as npz, with what was measured: extractor, weights, preprocessing, layer, source."""
    fields: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma, "count": statistics.count, **identity}
    _write(path, lambda file: np.savez(file, **fields))


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
    names = ("mu_s", "sigma_s") if is_adm and spatial else ("mu", "sigma")
    if missing := [name for name in names if name not in fields]:
        raise StatisticsError(f"'{path}' has no {' and no '.join(missing)}: give an npz file with mu and sigma")
    found = {name: str(value) for name, value in {**fields, **(_ADM if is_adm else {})}.items() if name in identity}
    if wrong := [f"{name} {value}, not {identity[name]}" for name, value in found.items() if value != identity[name]]:
        fix = "compute them again, or use the extractor they are of"
        raise StatisticsError(f"'{path}' has statistics of {' and '.join(wrong)}: {fix}")
    mu, sigma, count = (_real(path, name, fields.get(name, 0)) for name in (*names, "count"))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise StatisticsError(f"'{path}' has mu {mu.shape} and sigma {sigma.shape}; allowed: (d,) and (d, d)")
    if count.size != 1 or ("count" in fields and count.item() < 2):
        raise StatisticsError(f"'{path}' has statistics of {fields['count']} images: compute them of two or more")
    if width not in (None, len(mu)):
        fix = "compute them with this extractor"
        raise StatisticsError(f"'{path}' has {len(mu)} features and the extractor {width}: {fix}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise StatisticsError(f"'{path}' has statistics that are not finite: compute them again")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
        what = "a sigma that is no covariance: it is not symmetric, or has variances below 0"
        raise StatisticsError(f"'{path}' has {what}; compute it again")
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


def write_images(path: Path, batches: Iterable[torch.Tensor], count: int) -> None:
    """Write images atomically as ``arr_0``, uint8 ``(N, H, W, 3)``, as ADM's evaluator reads them.

    Only one batch is in memory at a time.

    Args:
        batches: uint8 pixels ``(B, 1 or 3, H, W)`` of one size; grey images get three equal channels.
        count: number of images in all batches.

    Raises:
        ValueError: there are no images or not ``count``, they differ in size, or are not uint8.
    """

    def save(file: IO[bytes]) -> None:
        size, written = None, 0
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(f"{_IMAGES}.npy", "w", force_zip64=True) as member,
        ):
            for pixels in batches:
                if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
                    got = f"{pixels.dtype} {tuple(pixels.shape)}"
                    raise ValueError(f"need uint8 pixels (B, 1 or 3, H, W), got {got}")
                array = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
                if size is None:
                    size = array.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size)}
                    np.lib.format.write_array_header_1_0(member, header)
                if array.shape[1:] != size:
                    raise ValueError(f"images of one size are needed, got {size} and {array.shape[1:]}")
                member.write(array.tobytes())
                written += len(array)
        if not written or written != count:
            raise ValueError(f"{count} images were announced and {written} arrived")

    _write(path, save)


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
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        fix = "give a file with images, such as ADM's, or download it again"
        raise StatisticsError(f"'{path}' holds no images under arr_0 that can be read ({error}): {fix}") from None
