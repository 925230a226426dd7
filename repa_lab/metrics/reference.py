"""The real images that samples are compared with: their statistics and features, computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repa_lab.files import digest, replace_atomically
from repa_lab.metrics.extractor import Extractor, Features
from repa_lab.metrics.frechet import Moments, Statistics
from repa_lab.metrics.npz import StatisticsError, images_shape, read_images, read_statistics, write_statistics
from repa_lab.metrics.protocol import METRICS, SPATIAL, layer_of, layers

FOLDER = "reference"
KEPT = 10_000
_KEY_LENGTH = 16


@dataclass(frozen=True)
class RealImages:
    """Real images to compare samples with.

    Attributes:
        source: digest of the images and their order; with a cached reference of this source no image is read.
        count: number of images.
        batches: returns all images, uint8 ``(B, 1 or 3, H, W)`` at a time; called only if they are needed.
        size: height and width in pixels, or None if the images differ in size.
    """

    source: str
    count: int
    batches: Callable[[], Iterable[torch.Tensor]]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reference:
    """The real side of every metric of an extractor.

    Attributes:
        extractor: name of the extractor.
        statistics: statistics of all images, by layer.
        features: features of all images, or of evenly spaced ones if there are many; None if no metric needs them.
    """

    extractor: str
    statistics: Mapping[str, Statistics]
    features: Features | None

    def of(self, metric: str) -> Statistics:
        """Return the statistics that ``frechet`` or ``sfid`` compares with."""
        return self.statistics[layer_of(self.extractor, metric)]


def reference(extractor: Extractor, images: RealImages, cache: Path, keep: int = KEPT) -> Reference:
    """Return what the extractor's metrics need of real images, from the cache or by one pass over the images.

    Files lie in ``cache/reference``, named by a digest of the images, the extractor's identity and the layer. Where KID
    or precision and recall are among the metrics, float32 features lie beside the statistics.

    Args:
        extractor: made for the metrics.
        images: the real images.
        cache: the folder of all caches.
        keep: maximum number of images whose features are kept. KID's mean does not depend on it; precision and recall
            do (ADM's evaluator takes 10,000).

    Raises:
        StatisticsError: a file in the cache is damaged, or there are too few images for the metrics.
        ValueError: features are not finite.
    """
    _require_enough(extractor.metrics, images.count, "the training images")
    keep = min(keep, images.count)
    identities = {layer: extractor.identity | {"layer": layer, "source": images.source} for layer in extractor.layers}
    keys = {layer: digest({**of, "count": images.count})[:_KEY_LENGTH] for layer, of in identities.items()}
    folder = cache / FOLDER
    of_statistics = {layer: folder / f"{keys[layer]}.npz" for layer in _layers(extractor, "statistics")}
    of_features = {layer: folder / f"{keys[layer]}-{keep}.npy" for layer in _layers(extractor, "features")}
    if not all(path.is_file() for path in (*of_statistics.values(), *of_features.values())):
        moments, kept = _one_pass(extractor, images, keep)
        for layer, path in of_statistics.items():
            write_statistics(path, moments[layer].statistics, identities[layer])
        for layer, path in of_features.items():
            replace_atomically(path, partial(_save, values=kept.layers[layer]))
    by_layer = {}
    for layer, path in of_statistics.items():
        try:
            by_layer[layer] = read_statistics(path, identities[layer])
        except StatisticsError:
            raise _damaged(path) from None
    features = Features(extractor.name, {layer: _load(path, keep) for layer, path in of_features.items()})
    return Reference(extractor.name, by_layer, features if of_features else None)


def _one_pass(extractor: Extractor, images: RealImages, keep: int) -> tuple[dict[str, Moments], Features]:
    """Return the moments of all images by layer, and the features of ``keep`` evenly spaced images."""
    moments = {layer: Moments() for layer in _layers(extractor, "statistics")}
    kept, start = [], 0
    spaced = np.arange(keep) * images.count // max(keep, 1)
    for pixels in images.batches():
        features = extractor.features(pixels)
        for layer, moment in moments.items():
            moment.add(features.layers[layer])
        rows = spaced[(spaced >= start) & (spaced < start + len(pixels))] - start
        selected = {layer: features.layers[layer][rows] for layer in _layers(extractor, "features")}
        kept.append(Features(extractor.name, selected))
        start += len(pixels)
    if start != images.count:
        raise ValueError(f"{images.count} real images were announced and {start} arrived")
    return moments, Features.cat(kept)


def read_reference(extractor: Extractor, path: Path, size: tuple[int, int] | None = None) -> Reference:
    """Read a published reference: a file of ADM's (VIRTUAL_*.npz), of pytorch-fid, or one that repa-lab wrote.

    ADM's files hold statistics of the whole training set, for FID and sFID, and images, whose features are computed if
    KID or precision and recall are measured.

    Args:
        extractor: made for the metrics.
        path: the file.
        size: height and width in pixels that the file's images must have, or None for any.

    Raises:
        StatisticsError: the file lacks what the extractor's metrics need, or is of another extractor or image size.
    """
    black = extractor.features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    by_layer = {}
    for layer in _layers(extractor, "statistics"):
        identity = {**extractor.identity, "layer": layer}
        by_layer[layer] = read_statistics(path, identity, black.layers[layer].shape[1], layer == SPATIAL)
    shape = images_shape(path)
    if size and shape and shape[1:] != size:
        sides = " and the run's ".join(f"{height}x{width} px" for height, width in (shape[1:], size))
        raise StatisticsError(f"the images of '{path}' have {sides}: give a reference of the run's size")
    if not (compared := _comparing(extractor, "features")):
        return Reference(extractor.name, by_layer, None)
    if shape:
        _require_enough(compared, shape[0], f"'{path}'")
    return Reference(extractor.name, by_layer, Features.cat([extractor.features(batch) for batch in read_images(path)]))


def measure(metric: str, generated: Features, against: Reference) -> tuple[float, ...]:
    """Return the values of a metric, in the order of :data:`repa_lab.metrics.protocol.METRICS`.

    Args:
        metric: one of the metrics that the extractor was made for.
        generated: features of the samples.
        against: the same extractor's reference.

    Raises:
        ValueError: too few samples, features that are not finite, or a metric that the extractor was not made for.
    """
    facts = METRICS[metric]
    arguments: list[Any] = [generated.of(metric)]
    if facts.compares == "statistics":
        arguments.append(against.of(metric))
    elif facts.compares == "features":
        if against.features is None:
            raise ValueError(f"{metric} needs features of real images: name it when the extractor is made")
        arguments.append(against.features.of(metric))
    values = facts.compute(*arguments)
    return values if isinstance(values, tuple) else (float(values),)


def _require_enough(metrics: Iterable[str], count: int, where: str) -> None:
    """Refuse, before training, a reference that is too small for a metric."""
    for metric in metrics:
        if count < METRICS[metric].least_real:
            needed = f"{metric} needs at least {METRICS[metric].least_real} real images"
            raise StatisticsError(f"{needed}, and there are {count} in {where}: give more, or leave it out of metrics")


def _comparing(extractor: Extractor, compared: str) -> tuple[str, ...]:
    """Return the metrics of an extractor that compare ``statistics`` or ``features``."""
    return tuple(metric for metric in extractor.metrics if METRICS[metric].compares == compared)


def _layers(extractor: Extractor, compared: str) -> tuple[str, ...]:
    return layers(extractor.name, _comparing(extractor, compared))


def _save(path: Path, values: NDArray[np.float32]) -> None:
    with path.open("wb") as file:  # np.save appends .npy to a path
        np.save(file, values)


def _load(path: Path, count: int) -> NDArray[np.float32]:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f" ({error})") from None
    if values.ndim != 2 or len(values) != count or not np.isfinite(values).all():
        raise _damaged(path)
    return np.asarray(values, dtype=np.float32)


def _damaged(path: Path, reason: str = "") -> StatisticsError:
    return StatisticsError(f"the cache file '{path}' is damaged{reason}; delete it, and it is computed again")
