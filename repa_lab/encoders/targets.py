"""The target of alignment for a batch: from the cache, or from the encoder itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from repa_lab.align.tokens import Grid, Tokens
from repa_lab.data.fingerprint import file_digest
from repa_lab.data.sources import ImageSource
from repa_lab.data.store import ArrayStore, Progress, is_built, open_or_build
from repa_lab.encoders.encoder import Encoder, load_encoder, require_patch_tokens

_PREFLIGHT_IMAGES = 4
_MIN_STD = 1e-6


class Targets(Protocol):
    """Encoder tokens of images of the source; ``dim`` is their width."""

    dim: int

    def __call__(self, index: torch.Tensor, device: torch.device) -> Tokens:
        """Tokens of the images ``index`` ``(B,)`` on ``device``."""
        ...


class CachedTargets:
    """Features from the cache, ``(n, h, w, D)``; optionally with every channel standardised over all images and places."""

    def __init__(self, store: ArrayStore, count: int, standardize: bool) -> None:
        self._store = store
        height, width, self.dim = store.shape
        self._grid: Grid = (height, width)
        self._moments = _channel_moments(store, count) if standardize else None

    def __call__(self, index: torch.Tensor, device: torch.device) -> Tokens:
        """See :class:`Targets`."""
        values = self._store[index].flatten(1, 2)
        if self._moments is not None:
            mean, std = self._moments
            values = (values - mean) / std
        return Tokens(values.to(device, non_blocking=True), self._grid)


class OnlineTargets:
    """Features computed anew for every batch, for data sets whose features would not fit on disk."""

    def __init__(self, encoder: Encoder, name: str, source: ImageSource, device: torch.device) -> None:
        self._encoder, self._source = encoder.to(device), source
        self.dim = require_patch_tokens(self._encoder, name, _sample(source).to(device)).dim

    def __call__(self, index: torch.Tensor, device: torch.device) -> Tokens:
        """See :class:`Targets`."""
        tokens: Tokens = self._encoder(self._source.read(index.tolist()).to(device))
        return tokens


def feature_identity(source: ImageSource, name: str, image_size: int | None, weights: str | None) -> Mapping[str, Any]:
    """All that decides a feature: the images, the encoder, its weights and its input size."""
    named = {"name": name, "image_size": image_size, "resolution": source.side}
    content = None if weights is None else file_digest(Path(weights))
    return {"kind": "features/1", "data": source.fingerprint, **named, "weights": content}


def cached_targets(
    source: ImageSource,
    name: str,
    image_size: int | None,
    weights: str | None,
    standardize: bool,
    cache: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> CachedTargets:
    """Features of all images from the cache; the encoder is loaded, and must pass the preflight, only if some are missing.

    Raises:
        EncoderError: the encoder cannot be loaded or does not give patch tokens.
    """
    identity = feature_identity(source, name, image_size, weights)
    root = cache / "features"
    if is_built(root, identity, len(source)):
        store = open_or_build(root, identity, len(source), _refuse)
        return CachedTargets(store, len(source), standardize)
    encoder = load_encoder(name, image_size, source.side, weights).to(device)
    grid = require_patch_tokens(encoder, name, _sample(source).to(device)).grid

    def compute(index: torch.Tensor) -> torch.Tensor:
        tokens: Tokens = encoder(source.read(index.tolist()).to(device))
        features: torch.Tensor = tokens.values.unflatten(1, grid)
        return features

    store = open_or_build(root, identity, len(source), compute, progress=progress)
    return CachedTargets(store, len(source), standardize)


def _refuse(index: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a built store computes nothing")


def _sample(source: ImageSource) -> torch.Tensor:
    return source.read(range(min(_PREFLIGHT_IMAGES, len(source))))


def _channel_moments(store: ArrayStore, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    total, squares, tokens = torch.zeros(store.shape[-1]).double(), torch.zeros(store.shape[-1]).double(), 0
    for start in range(0, count, 1024):
        values = store[torch.arange(start, min(start + 1024, count))].double().flatten(0, 2)
        total, squares, tokens = total + values.sum(0), squares + values.square().sum(0), tokens + len(values)
    mean = total / tokens
    return mean.float(), (squares / tokens - mean.square()).clamp_min(_MIN_STD**2).sqrt().float()
