"""What samples are measured against: statistics, and where a metric needs them features, of real images; made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from repa_lab.encoders.extractor import Extractor, Features
from repa_lab.encoders.extractor_facts import SPATIAL, layer_of, layers
from repa_lab.files import digest, replace_atomically
from repa_lab.metrics.adm import images_shape, read_images
from repa_lab.metrics.frechet import Moments, Statistics, frechet_distance, statistics
from repa_lab.metrics.protocol import METRICS
from repa_lab.metrics.quality import inception_score, kid, precision_recall
from repa_lab.metrics.reference import StatisticsError, read_statistics, write_statistics

FOLDER = "reference"
KEPT = 10_000
_KEY_LENGTH = 16


@dataclass(frozen=True)
class RealImages:
    """Images to compare with.

    Attributes:
        source: digest of what they are and which, their order included; the images themselves are not looked at if what
            is wanted of this source is kept.
        count: how many.
        batches: yields them all, uint8 ``(B, 1 or 3, H, W)``; called when they are needed.
        size: height and width in pixels, None where they differ.
    """

    source: str
    count: int
    batches: Callable[[], Iterable[torch.Tensor]]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reference:
    """The real side of every metric of an extractor.

    Attributes:
        extractor: whose.
        statistics: of all images, by layer.
        features: of all images or, of more than were to be kept, of evenly spaced ones; None if no metric needs them.
    """

    extractor: str
    statistics: Mapping[str, Statistics]
    features: Features | None

    def of(self, metric: str) -> Statistics:
        """The statistics that ``frechet`` or ``sfid`` compares with."""
        return self.statistics[layer_of(self.extractor, metric)]


def reference(extractor: Extractor, images: RealImages, cache: Path, keep: int = KEPT) -> Reference:
    """What the extractor's metrics need of real images: from the cache, or by one pass over the images for all of it.

    Files lie in ``cache/reference`` by a digest of the images, of the extractor's identity and of the layer. Where KID
    or precision and recall are among the metrics, float32 features lie beside the statistics.

    Args:
        extractor: made for the metrics.
        images: the real ones.
        cache: the folder of all caches.
        keep: images whose features are kept at most. KID's mean does not depend on it; precision and recall do (ADM's
            evaluator takes 10,000).

    Raises:
        StatisticsError: a file in the cache is damaged, or there are too few images for the metrics.
        ValueError: features that are not finite.
    """
    _require_enough(extractor.metrics, images.count, "the training images")
    wanted = _Kept(extractor, images, cache / FOLDER, min(keep, images.count))
    if not wanted.are_there:
        wanted.compute()
    return wanted.read()


def read_reference(extractor: Extractor, path: Path, size: tuple[int, int] | None = None) -> Reference:
    """A reference that others made: a file of ADM's (VIRTUAL_*.npz), of pytorch-fid, or the lab's own.

    ADM's hold statistics of the whole training set, for FID and sFID, and images, whose features are computed where KID
    or precision and recall are measured.

    Args:
        extractor: made for the metrics.
        path: the file.
        size: height and width that its images must have if it has any, or None.

    Raises:
        StatisticsError: the file lacks what the extractor's metrics need, or is of another extractor or of another
            size.
    """
    blank = extractor.features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    found = {}
    for layer in layers(extractor.name, _asked(extractor, "statistics")):
        identity = {**extractor.identity, "layer": layer}
        found[layer] = read_statistics(path, identity, blank.layers[layer].shape[1], layer == SPATIAL)
    shape = images_shape(path)
    if size and shape and shape[1:] != size:
        sides = " and the run's ".join(f"{height}x{width} px" for height, width in (shape[1:], size))
        raise StatisticsError(f"the images of '{path}' have {sides}: give a reference of the run's size")
    if not _asked(extractor, "features"):
        return Reference(extractor.name, found, None)
    if shape:
        _require_enough(_asked(extractor, "features"), shape[0], f"'{path}'")
    parts = [extractor.features(torch.from_numpy(pixels)) for pixels in read_images(path)]
    return Reference(extractor.name, found, Features.cat(parts))


def measure(metric: str, generated: Features, against: Reference) -> tuple[float, ...]:
    """What a metric yields, in the order of :data:`repa_lab.metrics.protocol.METRICS`.

    Args:
        metric: one of those that the extractor was made for.
        generated: features of the samples.
        against: the same extractor's reference.

    Raises:
        ValueError: too few samples, features that are not finite, or a metric that the extractor was not made for.
    """
    compute = METRICS[metric].compute
    if compute is not None:
        return (float(compute(generated.of(metric), _features(metric, against))),)
    return _MEASURES[metric](metric, generated, against)


def _frechet(metric: str, generated: Features, against: Reference) -> tuple[float, ...]:
    found, real = statistics(generated.of(metric)), against.of(metric)
    return (frechet_distance(found.mu, found.sigma, real.mu, real.sigma),)


def _kid(metric: str, generated: Features, against: Reference) -> tuple[float, ...]:
    return (kid(generated.of(metric), _features(metric, against)).value,)


def _inception_score(metric: str, generated: Features, against: Reference) -> tuple[float, ...]:
    return (inception_score(generated.of(metric)).value,)


def _precision_recall(metric: str, generated: Features, against: Reference) -> tuple[float, ...]:
    found = precision_recall(generated.of(metric), _features(metric, against))
    return found.precision, found.recall


_MEASURES: dict[str, Callable[[str, Features, Reference], tuple[float, ...]]] = {
    "frechet": _frechet,
    "sfid": _frechet,
    "kid": _kid,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
}


def _features(metric: str, against: Reference) -> NDArray[np.float32]:
    if against.features is None:
        raise ValueError(f"{metric} needs features of real images: name it when the extractor is made")
    return against.features.of(metric)


def _require_enough(metrics: Iterable[str], count: int, where: str) -> None:
    """Refuse, before anything is trained, what a metric could not be computed against."""
    for metric in metrics:
        if count < METRICS[metric].least_real:
            needed = f"{metric} needs at least {METRICS[metric].least_real} real images"
            raise StatisticsError(f"{needed}, and there are {count} in {where}: give more, or leave it out of metrics")


def _asked(extractor: Extractor, compared: str) -> tuple[str, ...]:
    """Return the metrics of an extractor that compare ``statistics`` or ``features``."""
    return tuple(metric for metric in extractor.metrics if METRICS[metric].compares == compared)


class _Kept:
    """The files of what an extractor's metrics need of some images, by layer."""

    def __init__(self, extractor: Extractor, images: RealImages, folder: Path, keep: int) -> None:
        self._extractor, self._images, self._keep = extractor, images, keep
        by_statistics, by_features = (layers(extractor.name, _asked(extractor, m)) for m in ("statistics", "features"))
        self._statistics = {layer: folder / f"{self._key(layer)}.npz" for layer in by_statistics}
        self._features = {layer: folder / f"{self._key(layer)}-{keep}.npy" for layer in by_features}

    @property
    def are_there(self) -> bool:
        """Whether nothing is left to compute."""
        return all(path.is_file() for path in (*self._statistics.values(), *self._features.values()))

    def compute(self) -> None:
        """One pass over the images; of their features only those to be kept stay in memory."""
        count, start = self._images.count, 0
        moments, kept = {layer: Moments() for layer in self._statistics}, []
        spaced = np.arange(self._keep) * count // max(self._keep, 1)
        for pixels in self._images.batches():
            found = self._extractor.features(pixels)
            for layer, moment in moments.items():
                moment.add(found.layers[layer])
            here = spaced[(spaced >= start) & (spaced < start + len(pixels))] - start
            kept.append(Features(found.extractor, {layer: found.layers[layer][here] for layer in self._features}))
            start += len(pixels)
        if start != count:
            raise ValueError(f"{count} real images were announced and {start} came")
        self._write(moments, Features.cat(kept))

    def read(self) -> Reference:
        """What the files hold.

        Raises:
            StatisticsError: one is damaged.
        """
        found = {layer: self._statistics_of(layer, path) for layer, path in self._statistics.items()}
        features = {layer: _load(path, self._keep) for layer, path in self._features.items()}
        name = self._extractor.name
        return Reference(name, found, Features(name, features) if features else None)

    def _statistics_of(self, layer: str, path: Path) -> Statistics:
        try:
            return read_statistics(path, self._identity(layer))
        except StatisticsError:
            raise StatisticsError(f"the cache file '{path}' is damaged; delete it, and it is computed again") from None

    def _write(self, moments: Mapping[str, Moments], kept: Features) -> None:
        for layer, path in self._statistics.items():
            found, identity = moments[layer].statistics, self._identity(layer)
            replace_atomically(path, partial(write_statistics, found=found, identity=identity))
        for layer, path in self._features.items():
            replace_atomically(path, partial(_save, values=kept.layers[layer]))

    def _identity(self, layer: str) -> dict[str, str]:
        return {**self._extractor.identity, "layer": layer, "source": self._images.source}

    def _key(self, layer: str) -> str:
        return digest({**self._identity(layer), "count": self._images.count})[:_KEY_LENGTH]


def _save(path: Path, values: NDArray[np.float32]) -> None:
    with path.open("wb") as file:
        np.save(file, values)


def _load(path: Path, count: int) -> NDArray[np.float32]:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StatisticsError(
            f"the cache file '{path}' is damaged ({error}); delete it, and it is computed again"
        ) from None
    if values.ndim != 2 or len(values) != count or not np.isfinite(values).all():
        raise StatisticsError(f"the cache file '{path}' is damaged; delete it, and it is computed again")
    return np.asarray(values, dtype=np.float32)
