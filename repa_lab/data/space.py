"""The space that is diffused: pixels in [-1, 1], or a VAE's latents scaled to unit variance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from repa_lab.data.autoencoder import Autoencoder, Rounding, load_autoencoder, to_uint8
from repa_lab.data.cache import Progress, open_cache
from repa_lab.data.errors import DataError
from repa_lab.data.prepared import Prepared
from repa_lab.data.sources import ImageSource

_BATCH = 8
_CPU = torch.device("cpu")


class Space(Protocol):
    """Where diffusion takes place, and the way in and out. Images that are asked for together are of one size."""

    channels: int

    def shape(self, index: torch.Tensor) -> tuple[int, int, int]:
        """(channels, height, width) of one array of the images ``index``."""
        ...

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        """The randomness of encoding the images ``index``, ``(B, *shape)``; None, and nothing is drawn, where there is none."""
        ...

    def encode(self, index: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Images of the source as float32 ``(B, *shape)``; ``noise`` is what :meth:`draw` gave, None the mean."""
        ...

    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        """Samples ``(B, channels, h, w)`` as uint8 pixels ``(B, C, H, W)``; None where a pixel would not be finite."""
        ...


class Moments(Protocol):
    """Mean and standard deviation ``(2 * c, h, w)`` of every image's latent; those asked for together are of one size."""

    def shape(self, index: torch.Tensor) -> torch.Size:
        """The shape of one tensor of the images ``index``."""
        ...

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The tensors ``(n, *shape)`` of the images ``index``."""
        ...


class PixelSpace:
    """Pixels scaled from 0..255 to [-1, 1]; the way out clamps and rounds."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.channels = source.channels

    def shape(self, index: torch.Tensor) -> tuple[int, int, int]:
        """See :class:`Space`."""
        height, width = self._source.sizes[index[0]].tolist()
        return self.channels, height, width

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        """See :class:`Space`: None, pixels are no matter of chance."""
        return None

    def encode(self, index: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Space`."""
        return self._source.read(index.tolist()).float() / 127.5 - 1

    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        """See :class:`Space`."""
        return _levels(x, rounding)


class LatentSpace:
    """Latents of an autoencoder: ``mean + std * noise``, normalised.

    Args:
        vae: the autoencoder.
        moments: of every image.
    """

    def __init__(self, vae: Autoencoder, moments: Moments) -> None:
        self.vae, self._moments = vae, moments
        self.channels = self.shape(torch.tensor([0]))[0]

    def shape(self, index: torch.Tensor) -> tuple[int, int, int]:
        """See :class:`Space`."""
        return self.vae.scaling.shape(*self._latent(index))

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        """See :class:`Space`: standard normal ``(B, c, h, w)``, in the autoencoder's own shape."""
        return torch.randn((len(index), *self._latent(index)), generator=generator)

    def encode(self, index: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Space`."""
        mean, std = self._moments[index].chunk(2, dim=1)
        return self.vae.scaling.normalise(mean if noise is None else mean + std * noise)

    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        """See :class:`Space`."""
        return _levels(self.vae.decode(x), rounding)

    def _latent(self, index: torch.Tensor) -> tuple[int, int, int]:
        doubled, height, width = self._moments.shape(index)
        return doubled // 2, height, width


def _levels(pixels: torch.Tensor, rounding: Rounding) -> torch.Tensor | None:
    """Return None if a pixel is not finite: clamping would turn NaN into a valid black pixel."""
    return to_uint8(pixels, rounding) if bool(pixels.isfinite().all()) else None


def latent_space(
    source: ImageSource,
    vae: str,
    cache: Path,
    progress: Progress | None = None,
    device: torch.device = _CPU,
    shifted: bool = True,
) -> LatentSpace:
    """The latent space of a VAE, a hub id or a local folder, with the moments of all images, computed once and cached.

    Args:
        source: the images; if their moments are prepared, these are taken.
        vae: any autoencoder of diffusers that takes images.
        cache: where the moments are kept.
        progress: told how many of how many images are done.
        device: where moments that are missing are computed.
        shifted: see :class:`Autoencoder`.

    Raises:
        DataError: the VAE cannot be loaded, does not take images of this many channels or this size, or is not the one
            that moments were prepared with.
    """
    model = load_autoencoder(vae, "vae", shifted)
    if model.channels not in (source.channels, None):
        raise DataError("vae", f"the VAE takes {model.channels} channels, the images have {source.channels}")

    if isinstance(source, Prepared):
        return LatentSpace(model, source.latents(model, device))

    def moments(pixels: torch.Tensor) -> torch.Tensor:
        model.model.to(device)
        return model.moments(pixels)

    identity = {"kind": "latents/2", "data": source.fingerprint, "vae": model.identity}
    about = {"vae": vae, "resolution": source.side, "crop": "centre", "scaling": asdict(model.scaling)}
    return LatentSpace(model, open_cache(cache / "latents", identity, source, moments, _BATCH, progress, about=about))
