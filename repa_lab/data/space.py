"""The space that is diffused: pixels in [-1, 1], or a VAE's latents scaled to unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from repa_lab.data.fingerprint import DataError
from repa_lab.data.sources import ImageSource
from repa_lab.data.store import ArrayStore, Progress, open_or_build


class Space(Protocol):
    """Where diffusion takes place: ``channels`` and ``size`` of its arrays, and the way in and out."""

    channels: int
    size: tuple[int, int]

    def encode(self, index: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Images of the source as float32 ``(B, channels, *size)``; a VAE draws its latents with ``generator``."""
        ...

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Samples ``(B, channels, *size)`` as uint8 pixels ``(B, C, H, W)``."""
        ...


class PixelSpace:
    """Pixels scaled from 0..255 to [-1, 1]; the way out clamps and rounds to the nearest level."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.channels, self.size = source.channels, (source.side, source.side)

    def encode(self, index: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """See :class:`Space`."""
        return self._source.read(index).float() / 127.5 - 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Space`."""
        return to_uint8(x)


class LatentSpace:
    """Latents of an `AutoencoderKL`: ``(mean + std * eps - shift) * scale``; the moments are computed once and cached.

    Args:
        vae: a diffusers `AutoencoderKL`, in evaluation mode.
        moments: ``(n, 2 * channels, h, w)``: mean and standard deviation of every image's latent.
    """

    def __init__(self, vae: Any, moments: ArrayStore) -> None:
        self._vae, self._moments = vae, moments
        self.channels, self.size = moments.shape[0] // 2, (moments.shape[1], moments.shape[2])
        self._scale = float(vae.config.scaling_factor)
        self._shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def encode(self, index: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """See :class:`Space`."""
        mean, std = self._moments[torch.as_tensor(index)].chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        return (mean + std * noise - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`Space`."""
        vae = self._vae.to(x.device)
        return to_uint8(vae.decode(x / self._scale + self._shift).sample)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] as levels 0..255, clamped and rounded to nearest."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def latent_space(source: ImageSource, vae: str, cache: Path, progress: Progress | None = None) -> LatentSpace:
    """The latent space of a VAE, a hub id or a local folder, with the moments of all images.

    Raises:
        DataError: the VAE cannot be loaded, or does not take images of this many channels.
    """
    from diffusers import AutoencoderKL

    try:
        model = AutoencoderKL.from_pretrained(vae).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise DataError("vae", f"cannot load the VAE '{vae}': {str(error).splitlines()[0]}") from None
    if model.config.in_channels != source.channels:
        message = f"the VAE takes {model.config.in_channels} channels, the images have {source.channels}"
        raise DataError("vae", message)

    @torch.no_grad()
    def moments(index: torch.Tensor) -> torch.Tensor:
        posterior = model.encode(source.read(index.tolist()).float() / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    identity = {"kind": "latents/1", "data": source.fingerprint, "vae": _vae_identity(model)}
    return LatentSpace(model, open_or_build(cache / "latents", identity, len(source), moments, 8, progress))


def _vae_identity(model: Any) -> dict[str, Any]:
    """A folder may be moved or refilled, so its content speaks for it: the sum of every parameter, and the config.

    Names with an underscore are diffusers' own notes: the path, its version.
    """
    sums = {key: value.double().sum().item() for key, value in model.state_dict().items()}
    return {"config": {k: repr(v) for k, v in model.config.items() if not k.startswith("_")}, "weights": sums}
