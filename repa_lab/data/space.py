"""The space in which diffusion takes place: pixels in [-1, 1], or a VAE's latents scaled to unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from typing_extensions import override

from repa_lab.data import DataError
from repa_lab.data.autoencoder import Autoencoder, Rounding, load_autoencoder, to_uint8
from repa_lab.data.cache import Progress, open_cache
from repa_lab.data.sources import DerivedSource, ImageSource

_ENCODED_AT_ONCE = _DECODED_AT_ONCE = 8  # at full resolution an autoencoder takes far more memory than the pixels
_LARGE_SIDE = 1024  # pixels along each side of the images that a GPU is taken to encode eight of at once
_CPU = torch.device("cpu")


class Space(Protocol):
    """The way from images of a source to what is diffused, and back; images of one call are of one size."""

    channels: int

    def shape(self, index: torch.Tensor) -> tuple[int, ...]:
        """Return (channels, height, width) of each of the images ``index``; clips have their frames after channels."""
        ...

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return how the images ``index`` ``(B,)`` were cut, ``(B, 6)``; see :meth:`ImageSource.frames`."""
        ...

    def read(self, index: torch.Tensor) -> torch.Tensor:
        """Return the images ``index`` ``(B,)`` as they are stored, on the CPU: pixels, or moments of latents."""
        ...

    def draw(self, stored: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """Draw the randomness of encoding ``count`` images like ``stored`` ``(b, ...)``, on the generator's device.

        Returns:
            noise for :meth:`encode`, ``(count, ...)``; None, without a draw, if nothing is left to chance.
        """
        ...

    def encode(self, stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Return float32 ``(B, *shape)`` of what :meth:`read` returned, on its device; without noise, the mean."""
        ...

    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        """Return ``x`` ``(B, channels, h, w)`` as uint8 pixels ``(B, C, H, W)``, or None if a pixel is not finite."""
        ...


class Moments(Protocol):
    """Mean and deviation ``(2 * c, h, w)`` of the latents of every image; images of one call are of one size."""

    def shape(self, index: torch.Tensor) -> torch.Size:
        """Return the shape of one tensor of the images ``index``."""
        ...

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return how the images ``index`` were cut, ``(n, 6)``."""
        ...

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tensors ``(n, *shape)`` of the images ``index``."""
        ...


class PixelSpace(Space):
    """Pixels scaled from 0..255 to [-1, 1]; the way back clamps and rounds."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.channels = source.channels

    @override
    def shape(self, index: torch.Tensor) -> tuple[int, ...]:
        height, width = self._source.sizes[index[0]].tolist()
        return self.channels, height, width

    @override
    def frames(self, index: torch.Tensor) -> torch.Tensor:
        return self._source.frames(index.tolist())

    @override
    def read(self, index: torch.Tensor) -> torch.Tensor:
        return self._source.read(index.tolist())

    @override
    def draw(self, stored: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor | None:
        return None

    @override
    def encode(self, stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return stored.float() / 127.5 - 1

    @override
    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        return _levels(x, rounding)


class LatentSpace(Space):
    """Latents of an autoencoder, ``mean + std * noise``, scaled.

    Args:
        moments: mean and standard deviation of the latents of every image.
    """

    def __init__(self, vae: Autoencoder, moments: Moments) -> None:
        self.vae, self._moments = vae, moments
        self.channels = self.shape(torch.tensor([0]))[0]

    @override
    def shape(self, index: torch.Tensor) -> tuple[int, ...]:
        doubled, *size = self._moments.shape(index)
        return self.vae.scaling.shape(doubled // 2, *size)

    @override
    def frames(self, index: torch.Tensor) -> torch.Tensor:
        return self._moments.frames(index)

    @override
    def read(self, index: torch.Tensor) -> torch.Tensor:
        return self._moments[index]

    @override
    def draw(self, stored: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor | None:
        _, doubled, *size = stored.shape
        return torch.randn((count, doubled // 2, *size), generator=generator, device=generator.device)

    @override
    def encode(self, stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        mean, std = stored.chunk(2, dim=1)
        return self.vae.scaling.normalise(mean if noise is None else mean + std * noise)

    @override
    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        return _levels(self.vae.decode(x), rounding)


def _levels(pixels: torch.Tensor, rounding: Rounding) -> torch.Tensor | None:
    """Return uint8 levels, or None if a pixel is not finite: clamping would turn NaN into a valid black pixel."""
    return to_uint8(pixels, rounding) if bool(pixels.isfinite().all()) else None


def latent_space(
    source: ImageSource,
    vae: str,
    cache: Path,
    progress: Progress | None = None,
    device: torch.device = _CPU,
    shifted: bool = True,
) -> LatentSpace:
    """Open the latent space of a VAE: the latents that a source has of its own, or those that are encoded and cached.

    Args:
        vae: an autoencoder of diffusers for images: a hub id or a folder.
        progress: told how many images are encoded, of how many.
        shifted: see :class:`Autoencoder`.

    Raises:
        DataError: the VAE cannot be loaded, is for other images, or is not that of the source's own latents.
    """
    model = load_autoencoder(vae, "vae", shifted)
    if model.channels not in (source.channels, None):
        raise DataError("vae", f"the VAE takes {model.channels} channels, the images have {source.channels}")
    if own_latents := getattr(source, "latents", None):
        return LatentSpace(model, own_latents(model, device))

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        model.model.to(device)
        return model.moments(pixels)

    identity = {"kind": "latents/2", "data": source.fingerprint, "vae": model.identity}
    about = {"vae": vae, "resolution": source.side, "crop": "centre", "scaling": asdict(model.scaling)}
    many = _ENCODED_AT_ONCE * max(1, _LARGE_SIDE // source.side) ** 2
    at_once = _ENCODED_AT_ONCE if device.type == "cpu" else min(many, 128)
    at_once = max(1, at_once // max(source.clip_frames, 1))
    moments = open_cache(cache / "latents", identity, source, encode, at_once, progress, about=about)
    return LatentSpace(model, moments)


class Reconstructions(DerivedSource):
    """A source whose pixels are decoded from the latents of another, for encoders that look at what the VAE keeps.

    The mean of the posterior is decoded, so the pixels are a function of the image, except for a grey level where the
    batch decides how a convolution rounds.

    Args:
        space: their latents.
        decoder: the VAE of the space, or a tiny autoencoder of the same latents.
        device: where to decode; pixels are returned on the CPU.

    Raises:
        DataError: the decoder is one of other latents.
    """

    def __init__(self, source: ImageSource, space: LatentSpace, decoder: Autoencoder, device: torch.device) -> None:
        if decoder is not space.vae and decoder.latent_channels != space.channels:
            message = f"'{decoder.field}' decodes latents of {decoder.latent_channels} channels"
            message += f", but those of the VAE have {space.channels}: it is for another VAE"
            raise DataError(decoder.field, message)
        kind = f"reconstructions/{decoder.field}"
        super().__init__(source, kind, vae=space.vae.identity, decoder=decoder.identity)
        self._space, self._decoder, self._device = space, decoder, device

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return decoded pixels; see :class:`ImageSource`.

        Raises:
            DataError: the decoded images have another size than the originals.
        """
        at_once = max(1, _DECODED_AT_ONCE // max(self.clip_frames, 1))
        return torch.cat([self._decode(batch) for batch in torch.as_tensor(index).split(at_once)])

    def _decode(self, index: torch.Tensor) -> torch.Tensor:
        x = self._space.encode(self._space.read(index), None)
        pixels = to_uint8(self._decoder.decode(x.to(self._device))).cpu()
        frames = (self.clip_frames,) if self.clip_frames else ()
        decoded, expected = tuple(pixels.shape[1:]), (self.channels, *frames, *self.sizes[index[0]].tolist())
        if decoded != expected:
            message = f"images of {expected} are given back as {decoded}: it is not for these latents"
            raise DataError(self._decoder.field, message)
        return pixels
