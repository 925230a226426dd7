"""The real images that samples are compared with: their statistics and features, computed once and cached."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from repa_lab.files import digest, replace_atomically
from repa_lab.metrics.extractor import Extractor, Features
from repa_lab.metrics.npz import StatisticsError, images_shape, read_images, read_statistics, write_statistics
from repa_lab.metrics.protocol import METRICS, SPATIAL, layer_of, layers
from repa_lab.metrics.quality import Moments, Statistics

FOLDER = "reference"
KEPT = 10_000
_KEY_LENGTH = 16
_OF_REAL = ("statistics", "features")


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
class ComparedImages:
    """What the metrics of an extractor compare of a set of images, real or generated.

    Attributes:
        extractor: name of the extractor.
        statistics: statistics of all images, by layer.
        features: features of all images, or of evenly spaced ones if there are many real ones; None if no metric needs
            them.
    """

    extractor: str
    statistics: Mapping[str, Statistics]
    features: Features | None

    def of(self, metric: str) -> Statistics:
        """Return the statistics that ``frechet`` or ``sfid`` compares."""
        return self.statistics[layer_of(self.extractor, metric)]


class Collector:
    """Collects what metrics compare of images that arrive in batches; only the metrics that need features keep them.

    Args:
        compares: the sides of :attr:`MetricFacts.compares` for which features are kept.

    Attributes:
        moments: of all images, by layer.
        kept: features on the CPU, with the number of the first image.
    """

    def __init__(self, extractor: Extractor, metrics: Iterable[str], compares: Container[str]) -> None:
        metrics, self._name = tuple(metrics), extractor.name
        self.moments = {
            layer: Moments(extractor.widths[layer], extractor.device)
            for layer in _layers(extractor.name, metrics, ("statistics",))
        }
        self._kept_layers = _layers(extractor.name, metrics, compares)
        self.kept: list[tuple[int, Features]] = []

    def add(self, features: Features, start: int, rows: slice | NDArray[np.int64] = slice(None)) -> None:
        """Add the features of a batch.

        Args:
            features: of the batch.
            start: number of its first image.
            rows: the images whose features are kept.
        """
        for layer, moments in self.moments.items():
            moments.add(features.layers[layer])
        if self._kept_layers:
            kept = {layer: features.layers[layer][rows].cpu() for layer in self._kept_layers}
            self.kept.append((start, Features(self._name, kept)))

    @property
    def images(self) -> ComparedImages:
        """What was collected, with features in the order of the images."""
        statistics = {layer: moments.statistics for layer, moments in self.moments.items()}
        in_order = [features for _, features in sorted(self.kept, key=lambda batch: batch[0])]
        return ComparedImages(self._name, statistics, Features.cat(in_order) if in_order else None)


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
    keys = {layer: digest({**of, "count": images.count})[:_KEY_LENGTH] for layer, of in identities.items()}
    folder = cache / FOLDER
    by_statistics, by_features = (_layers(extractor.name, extractor.metrics, (kind,)) for kind in _OF_REAL)
    of_statistics = {layer: folder / f"{keys[layer]}.npz" for layer in by_statistics}
    of_features = {layer: folder / f"{keys[layer]}-{keep}.npy" for layer in by_features}
    if not all(path.is_file() for path in (*of_statistics.values(), *of_features.values())):
        computed = _one_pass(extractor, images, keep)
        for layer, path in of_statistics.items():
            write_statistics(path, computed.statistics[layer], identities[layer])
        for layer, path in of_features.items():
            assert computed.features is not None
            replace_atomically(path, partial(_save, values=computed.features.layers[layer].numpy()))
    by_layer = {}
    for layer, path in of_statistics.items():
        try:
            by_layer[layer] = read_statistics(path, identities[layer])
        except StatisticsError:
            raise _damaged(path) from None
    features = Features(extractor.name, {layer: _load(path, keep) for layer, path in of_features.items()})
    return ComparedImages(extractor.name, by_layer, features if of_features else None)


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
    for layer in _layers(extractor.name, extractor.metrics, ("statistics",)):
        identity = {**extractor.identity, "layer": layer}
        by_layer[layer] = read_statistics(path, identity, extractor.widths[layer], layer == SPATIAL)
    shape = images_shape(path)
    if size and shape and shape[1:] != size:
        sides = " and the run's ".join(f"{height}x{width} px" for height, width in (shape[1:], size))
        raise StatisticsError(f"the images of '{path}' have {sides}: give a reference of the run's size")
    if not (compared := [metric for metric in extractor.metrics if METRICS[metric].compares == "features"]):
        return ComparedImages(extractor.name, by_layer, None)
    if shape:
        _require_enough(compared, shape[0], f"'{path}'")
    features = Features.cat([extractor.features(batch) for batch in read_images(path)])
    return ComparedImages(extractor.name, by_layer, features)


def measure(metric: str, generated: ComparedImages, real: ComparedImages) -> tuple[float, ...]:
    """Return the values of a metric, in the order of :data:`repa_lab.metrics.protocol.METRICS`.

    Args:
        metric: one of the metrics that were collected.
        real: the same extractor's reference.

    Raises:
        ValueError: too few samples, features that are not finite, or a metric that was not collected.
    """
    facts = METRICS[metric]
    if facts.compares == "statistics":
        values = facts.compute(generated.of(metric), real.of(metric))
    elif facts.compares == "features":
        values = facts.compute(_features_of(generated, metric, "samples"), _features_of(real, metric, "real images"))
    else:
        values = facts.compute(_features_of(generated, metric, "samples"))
    return values if isinstance(values, tuple) else (float(values),)


def _features_of(images: ComparedImages, metric: str, name: str) -> NDArray[np.float32]:
    if images.features is None:
        raise ValueError(f"{metric} needs features of {name}: name it when the extractor is made")
    features: NDArray[np.float32] = images.features.of(metric).cpu().numpy()
    return features


def _require_enough(metrics: Iterable[str], count: int, where: str) -> None:
    """Refuse, before training, a reference that is too small for a metric."""
    for metric in metrics:
        if count < METRICS[metric].least_real:
            needed = f"{metric} needs at least {METRICS[metric].least_real} real images"
            raise StatisticsError(f"{needed}, and there are {count} in {where}: give more, or leave it out of metrics")


def _layers(extractor: str, metrics: Iterable[str], compares: Container[str]) -> tuple[str, ...]:
    """Return the layers of an extractor for those of the metrics whose :attr:`MetricFacts.compares` is given."""
    return layers(extractor, (metric for metric in metrics if METRICS[metric].compares in compares))


def _save(path: Path, values: NDArray[np.float32]) -> None:
    with path.open("wb") as file:  # np.save appends .npy to a path
        np.save(file, values)


def _load(path: Path, count: int) -> torch.Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f" ({error})") from None
    if values.ndim != 2 or len(values) != count or not np.isfinite(values).all():
        raise _damaged(path)
    return torch.from_numpy(values.astype(np.float32, copy=False))


def _damaged(path: Path, reason: str = "") -> StatisticsError:
    return StatisticsError(f"the cache file '{path}' is damaged{reason}; delete it, and it is computed again")
