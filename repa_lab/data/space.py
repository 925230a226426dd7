"""The space that is diffused: pixels in [-1, 1], or a VAE's latents scaled to unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from repa_lab.data.autoencoder import Autoencoder, load_autoencoder, to_uint8
from repa_lab.data.fingerprint import DataError
from repa_lab.data.sources import ImageSource
from repa_lab.data.store import ArrayStore, Progress, open_or_build

_BATCH = 8
_CPU = torch.device("cpu")


class Space(Protocol):
    """Where diffusion takes place: ``channels`` and ``size`` of its arrays, and the way in and out."""

    channels: int
    size: tuple[int, int]

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """The randomness of encoding ``count`` images; None, and nothing is drawn, where encoding has none."""
        ...

    def encode(self, index: Sequence[int], noise: torch.Tensor | None) -> torch.Tensor:
        """Images of the source as float32 ``(B, channels, *size)``; ``noise`` is what :meth:`draw` gave, None the mean."""
        ...

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Samples ``(B, channels, *size)`` as uint8 pixels ``(B, C, H, W)``."""
        ...


class PixelSpace:
    """Pixels scaled from 0..255 to [-1, 1]; the way out clamps and rounds to the nearest level."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.channels, self.size = source.channels, (source.side, source.side)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """See :class:`Space`: None, pixels are no matter of chance."""
        return None

    def encode(self, index: Sequence[int], noise: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Space`."""
        return self._source.read(index).float() / 127.5 - 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Space`."""
        return to_uint8(x)


class LatentSpace:
    """Latents of an autoencoder: ``mean + std * noise``, normalised; the moments are computed once and cached.

    Args:
        vae: the autoencoder.
        moments: ``(n, 2 * c, h, w)``: mean and standard deviation of every image's latent.
    """

    def __init__(self, vae: Autoencoder, moments: ArrayStore) -> None:
        self.vae, self._moments = vae, moments
        doubled, height, width = moments.shape
        self._latent = (doubled // 2, height, width)
        self.channels, *size = vae.scaling.shape(*self._latent)
        self.size = (size[0], size[1])

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """See :class:`Space`: standard normal ``(count, c, h, w)``, in the autoencoder's own shape."""
        return torch.randn((count, *self._latent), generator=generator)

    def encode(self, index: Sequence[int], noise: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Space`."""
        mean, std = self._moments[torch.as_tensor(index)].chunk(2, dim=1)
        return self.vae.scaling.normalise(mean if noise is None else mean + std * noise)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Space`."""
        return self.vae.decode(x)


def latent_space(
    source: ImageSource, vae: str, cache: Path, progress: Progress | None = None, device: torch.device = _CPU
) -> LatentSpace:
    """The latent space of a VAE, a hub id or a local folder, with the moments of all images.

    Args:
        source: the images.
        vae: any autoencoder of diffusers that takes images.
        cache: where the moments are kept.
        progress: told how many of how many images are done.
        device: where moments that are missing are computed.

    Raises:
        DataError: the VAE cannot be loaded, or does not take images of this many channels or this size.
    """
    model = load_autoencoder(vae, "vae")
    if model.channels not in (source.channels, None):
        raise DataError("vae", f"the VAE takes {model.channels} channels, the images have {source.channels}")

    def moments(index: torch.Tensor) -> torch.Tensor:
        model.model.to(device)
        return model.moments(source.read(index.tolist()))

    identity = {"kind": "latents/2", "data": source.fingerprint, "vae": model.identity}
    return LatentSpace(model, open_or_build(cache / "latents", identity, len(source), moments, _BATCH, progress))
