"""The target of alignment for a batch: from the cache, or from the encoder itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from repa_lab.align.tokens import Grid, Tokens
from repa_lab.data.cache import ArrayCache, Progress, dtype_name, open_cache
from repa_lab.data.reconstruct import Reconstructions
from repa_lab.data.sources import ImageSource, groups
from repa_lab.encoders.encoder import Encoder, EncoderOptions, load_encoder, require_patch_tokens
from repa_lab.encoders.registry import token_identity
from repa_lab.files import file_digest

_PREFLIGHT_IMAGES = 4
_MIN_STD = 1e-6
_IMAGES_AT_ONCE = 64
_PLAIN = EncoderOptions()


Reader = Callable[[torch.Tensor], torch.Tensor]


class Targets(Protocol):
    """Encoder tokens of images of the source.

    Attributes:
        dim: width of a token.
        reader: loads what the tokens of images ``(B,)`` are made from, in whatever process, so that a data loader can
            do it ahead of time; None if only this process can.
    """

    dim: int
    reader: Reader | None

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        """Tokens of the images ``index`` ``(B,)`` on ``device``, float32; ``loaded`` is what the reader gave for them."""
        ...


class CachedTargets:
    """Features from the cache, ``(h, w, D)`` of each image in whatever precision they are kept, optionally with every
    channel standardised over all images and places."""

    def __init__(self, features: ArrayCache, source: ImageSource, standardize: bool) -> None:
        self.dim = features.shape(torch.tensor([0]))[-1]
        self._moments = _channel_moments(features, source) if standardize else None
        self._read: Reader = features.__getitem__
        self.reader: Reader | None = self._read

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        """See :class:`Targets`."""
        kept = self._read(index) if loaded is None else loaded
        grid: Grid = (kept.shape[1], kept.shape[2])
        values = kept.to(device, non_blocking=True).float().flatten(1, 2)
        if self._moments is not None:
            mean, std = (moment.to(device) for moment in self._moments)
            values = (values - mean) / std
        return Tokens(values, grid)


class OnlineTargets:
    """Features computed anew for every batch, for data sets whose features would not fit on disk."""

    def __init__(self, encoder: Encoder, name: str, source: ImageSource, device: torch.device) -> None:
        self._encoder = encoder.to(device)
        self.dim = require_patch_tokens(self._encoder, name, _sample(source).to(device)).dim
        self._read: Reader = _Pixels(source)
        # Latents are decoded on the device, which a data loader's process has no access to.
        self.reader: Reader | None = None if isinstance(source, Reconstructions) else self._read

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        """See :class:`Targets`."""
        pixels = self._read(index) if loaded is None else loaded
        tokens: Tokens = self._encoder(pixels.to(device, non_blocking=True))
        return tokens


@dataclass(frozen=True)
class _Pixels:
    """Reads pixels of a source by a tensor of indices; goes to other processes without the encoder."""

    source: ImageSource

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        return self.source.read(index.tolist())


def feature_identity(
    source: ImageSource,
    name: str,
    image_size: int | None,
    weights: str | None,
    storage: torch.dtype = torch.float16,
    precision: str = "fp32",
) -> Mapping[str, Any]:
    """Return all that decides a feature: pixels, encoder, weights, input size, precision, final norm or not, and storage."""
    named = {"name": name, "image_size": image_size, "resolution": source.side, "precision": precision}
    content = None if weights is None else file_digest(Path(weights))
    kept = {"storage": dtype_name(storage)}
    return {
        "kind": "features/2",
        "data": source.fingerprint,
        **named,
        "weights": content,
        **kept,
        **token_identity(name),
    }


def cached_targets(
    source: ImageSource,
    name: str,
    image_size: int | None,
    weights: str | None,
    standardize: bool,
    cache: Path,
    device: torch.device,
    progress: Progress | None = None,
    storage: torch.dtype = torch.float16,
    options: EncoderOptions = _PLAIN,
) -> CachedTargets:
    """Features of all images from the cache; the encoder is loaded, and must pass the preflight, only if some are
    missing.

    Args:
        source: what the encoder looks at.
        name: of the encoder.
        image_size: pixels along each side of its input; None derives it from the images.
        weights: a local file of weights.
        standardize: whether every channel is given mean 0 and standard deviation 1.
        cache: where features are kept.
        device: where the encoder runs.
        progress: told how many of how many images are done.
        storage: float16, or float32 for features that are bit for bit the encoder's.
        options: how the encoder runs; of these, the precision decides what its features are.

    Raises:
        EncoderError: the encoder cannot be loaded or does not give patch tokens.
        DataError: the cache holds something else or is damaged, or a feature is too large for the storage.
    """

    @functools.cache
    def ready() -> Encoder:
        encoder = load_encoder(name, image_size, source.side, weights, options).to(device)
        require_patch_tokens(encoder, name, _sample(source).to(device))
        return encoder

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        tokens: Tokens = ready()(pixels.to(device))
        features: torch.Tensor = tokens.values.unflatten(1, tokens.grid)
        return features

    identity = feature_identity(source, name, image_size, weights, storage, options.precision)
    features = open_cache(cache / "features", identity, source, encode, progress=progress, dtype=storage)
    return CachedTargets(features, source, standardize)


def _sample(source: ImageSource) -> torch.Tensor:
    return source.read(groups(source.sizes)[0][:_PREFLIGHT_IMAGES].tolist())


def _channel_moments(features: ArrayCache, source: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
    dim = features.shape(torch.tensor([0]))[-1]
    total, squares, tokens = torch.zeros(dim).double(), torch.zeros(dim).double(), 0
    for index in (part for group in groups(source.sizes) for part in group.split(_IMAGES_AT_ONCE)):
        values = features[index].double().flatten(0, 2)
        total, squares, tokens = total + values.sum(0), squares + values.square().sum(0), tokens + len(values)
    mean = total / tokens
    return mean.float(), (squares / tokens - mean.square()).clamp_min(_MIN_STD**2).sqrt().float()
