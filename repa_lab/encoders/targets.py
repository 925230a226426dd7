"""Targets of alignment, the encoder's tokens of a batch of images: read from the cache, or computed online.

The cache holds tokens as float32 (``fp32``), as float16 (``fp16``), or in a byte for each value: ``fp8`` (e4m3) and
``int8`` divide each token by a scale of its own, so that its largest magnitude is the largest code. The scale follows
the codes of its token as the four bytes of a float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from repa_lab.align.regularizer import Attention
from repa_lab.align.settings import EncoderSettings
from repa_lab.align.tokens import Tokens
from repa_lab.data import DataError
from repa_lab.data.cache import READERS, ArrayCache, Progress, open_cache
from repa_lab.data.latents import PixelSpace, Reconstructions
from repa_lab.data.rows import dtype_name
from repa_lab.data.sources import LatentFrames, Source, as_images, groups
from repa_lab.encoders.encoder import Encoder, EncoderOptions, load_encoder, require_patch_tokens
from repa_lab.encoders.registry import token_identity
from repa_lab.files import file_digest
from repa_lab.timm_models import EncoderError

_PREFLIGHT_IMAGES = 4
_MIN_STD = 1e-6
_IMAGES_AT_ONCE = 64
_ENCODED_AT_ONCE = 128
_PLAIN = EncoderOptions()
_SCALE_BYTES = 4
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_CODES = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}  # dtype, largest code

Reader = Callable[[torch.Tensor], torch.Tensor]
Storage = Literal["fp32", "fp16", "fp8", "int8"]


def packed(values: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Return tokens ``(..., D)`` as they are stored; in a byte for each value, uint8 ``(..., D + 4)``.

    A token with a value that is not finite becomes NaN in a byte for each value.

    Raises:
        DataError: a value is too large for float16.
    """
    if storage in _DTYPES:
        stored = values.to(_DTYPES[storage])
        lost = values[values.isfinite() & ~stored.isfinite()]
        if len(lost):
            name, largest, limit = dtype_name(stored.dtype), lost.abs().max().item(), torch.finfo(stored.dtype).max
            message = f"a value of {largest:g} is too large to be stored as {name} (up to {limit:g})"
            raise DataError("encoder_storage", f"{message}; set run.encoder_storage: fp32")
        return stored
    dtype, largest = _CODES[storage]
    scale = values.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * largest) / largest
    codes = values / scale
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpacked(stored: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Return the tokens ``(..., D)`` in float32 that :func:`packed` stored."""
    if storage in _DTYPES:
        return stored.float()
    codes, scale = stored[..., :-_SCALE_BYTES], stored[..., -_SCALE_BYTES:].contiguous()
    return codes.view(_CODES[storage][0]).float() * scale.view(torch.float32)


class CachedTargets:
    """Encoder tokens of a source's images from the cache, optionally standardised.

    Args:
        features: the cache of all images, ``(h, w, D)`` per image or ``(F, h, w, D)`` per clip.
        standardize: whether each channel gets mean 0 and standard deviation 1 over all images and places.

    Attributes:
        dim: width of a token.
        reader: loads the input of :meth:`__call__` for image indices ``(B,)`` and can run ahead in a data loader's
            process; None if the input can only be loaded in this process.
    """

    def __init__(self, features: ArrayCache, source: Source, standardize: bool, storage: Storage) -> None:
        self.dim = features.shape(torch.tensor([0]))[-1] - (_SCALE_BYTES if storage in _CODES else 0)
        self._storage: Storage = storage
        self._read: Reader = features.__getitem__
        self.reader: Reader | None = self._read
        self._moments = self._channel_moments(source) if standardize else None

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        """Return the tokens of images ``index`` ``(B,)`` on ``device`` in float32.

        Args:
            index: indices of images of one size.
            loaded: what ``reader`` returned for ``index``; None reads it now.
        """
        features = self._read(index) if loaded is None else loaded
        _, *frames, height, width, _ = features.shape
        values = unpacked(features.to(device, non_blocking=True), self._storage).flatten(1, -2)
        if self._moments is not None:
            mean, std = self._moments = (self._moments[0].to(device), self._moments[1].to(device))  # copied once
            values = (values - mean) / std
        return Tokens(values, (height, width), math.prod(frames))

    def attention(self, block: int) -> Attention:
        """Refuse: the cache holds no attention."""
        raise EncoderError("cache", "attention is not cached: set cache: false")

    def _channel_moments(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and standard deviation ``(D,)`` of each channel over all images and places, in float32."""
        total, squares, tokens = torch.zeros(self.dim).double(), torch.zeros(self.dim).double(), 0
        for index in (batch for group in groups(source.sizes) for batch in group.split(_IMAGES_AT_ONCE)):
            values = unpacked(self._read(index), self._storage).double().flatten(0, -2)
            total, squares, tokens = total + values.sum(0), squares + values.square().sum(0), tokens + len(values)
        mean = total / tokens
        return mean.float(), (squares / tokens - mean.square()).clamp_min(_MIN_STD**2).sqrt().float()


class OnlineTargets:
    """Encoder tokens computed for every batch, for data sets whose features do not fit on disk; see `CachedTargets`.

    Raises:
        EncoderError: the encoder does not give patch tokens.
    """

    def __init__(self, encoder: Encoder, name: str, source: Source, device: torch.device) -> None:
        self._encoder = encoder.to(device)
        self.dim = require_patch_tokens(self._encoder, name, _sample(source).to(device)).dim
        self._read: Reader = PixelSpace(source).read
        # Reconstructions are decoded on the device, which a data loader's process cannot use.
        self.reader: Reader | None = None if _is_decoded(source) else self._read

    def __call__(self, index: torch.Tensor, device: torch.device, loaded: torch.Tensor | None = None) -> Tokens:
        """Return the encoder's tokens; see :meth:`CachedTargets.__call__`."""
        pixels = self._read(index) if loaded is None else loaded
        return _encoded(self._encoder, pixels.to(device, non_blocking=True))

    def attention(self, block: int) -> Attention:
        """Return the encoder's queries and keys in a block for the images of the latest call: `Encoder.attention`."""
        return self._encoder.attention(block)


Targets = CachedTargets | OnlineTargets


def cached_targets(
    source: Source,
    encoder: EncoderSettings,
    cache: Path,
    device: torch.device,
    progress: Progress | None = None,
    storage: Storage = "fp16",
    options: EncoderOptions = _PLAIN,
) -> CachedTargets:
    """Return the features of all images from the cache; the encoder is loaded and checked only if some are missing.

    Args:
        storage: how features are stored; ``fp32`` keeps the encoder's bit for bit.
        options: how the encoder runs; only the precision is part of the cache's identity.

    Raises:
        EncoderError: the encoder cannot be loaded or does not give patch tokens.
        DataError: the cache holds something else or is damaged, or a feature is too large for the storage.
    """

    @functools.cache
    def checked_encoder() -> Encoder:
        loaded = load_encoder(encoder.name, encoder.image_size, source.side, encoder.weights, options).to(device)
        require_patch_tokens(loaded, encoder.name, _sample(source).to(device))
        return loaded

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        tokens = _encoded(checked_encoder(), pixels.to(device))
        return packed(tokens.values.unflatten(1, (*pixels.shape[2:-2], *tokens.grid)), storage)

    identity = {
        "kind": "features/2",
        "data": source.fingerprint,
        "name": encoder.name,
        "image_size": encoder.image_size,
        "resolution": source.side,
        "precision": options.precision,
        "weights": None if encoder.weights is None else file_digest(Path(encoder.weights)),
        "storage": dtype_name(_DTYPES[storage]) if storage in _DTYPES else storage,
        **token_identity(encoder.name),
    }
    features = open_cache(
        cache / "features",
        identity,
        source,
        encode,
        batch_size=max(1, _ENCODED_AT_ONCE // max(source.clip_frames, 1)),
        progress=progress,
        readers=1 if _is_decoded(source) else READERS,  # reconstructions are decoded on the device
    )
    return CachedTargets(features, source, encoder.standardize, storage)


def _encoded(encoder: Encoder, pixels: torch.Tensor) -> Tokens:
    """Return the tokens of images ``(B, C, H, W)``, or of clips ``(B, C, F, H, W)``, frame by frame."""
    tokens: Tokens = encoder(as_images(pixels))
    return tokens.as_clips(math.prod(pixels.shape[2:-2]))


def _is_decoded(source: Source) -> bool:
    """Return whether a source is decoded on the device as it is read."""
    return isinstance(source.base if isinstance(source, LatentFrames) else source, Reconstructions)


def _sample(source: Source) -> torch.Tensor:
    return as_images(source.read(groups(source.sizes)[0][:_PREFLIGHT_IMAGES].tolist()))
