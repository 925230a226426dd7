"""Between an autoencoder's latents and what the diffusion model sees: each autoencoder's own scaling, and its exact inverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from repa_lab.data.errors import DataError

PerChannel = tuple[float, ...]


@dataclass(frozen=True)
class LatentScaling:
    """``x = (patchify(z) - mean) * scale``: latents ``z`` of the autoencoder, ``x`` of the diffusion model.

    ``mean`` and ``scale`` hold one number for all channels, or one for each channel of ``x``. ``patch`` is the size of
    a patch of ``z``: it becomes one place of ``x`` and its values channels, in the order (channel, row, column).

    Raises:
        DataError: a scale that nothing can be divided by.
    """

    mean: PerChannel = (0.0,)
    scale: PerChannel = (1.0,)
    patch: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value != 0 for value in self.scale):
            raise DataError(
                "vae", f"the VAE's latents cannot be scaled by {self.scale}: its config or statistics are broken"
            )

    def shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """The shape of ``x`` for one of ``z``, both (channels, height, width).

        Raises:
            DataError: ``z`` does not divide into patches.
        """
        rows, columns = self.patch
        if height % rows or width % columns:
            message = (
                f"the VAE's latents measure {height}x{width}, which does not divide into patches of {rows}x{columns}"
            )
            raise DataError("resolution", message)
        return channels * rows * columns, height // rows, width // columns

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, c, h, w)`` as ``(B, c * p * q, h / p, w / q)`` for patches of ``p`` by ``q``; most have 1 by 1."""
        packed = _patchify(z, self.patch)
        return (packed - _channels(self.mean, packed)) * _channels(self.scale, packed)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`normalise`."""
        return _unpatchify(x / _channels(self.scale, x) + _channels(self.mean, x), self.patch)


def latent_scaling(vae: Any) -> LatentScaling:
    """The scaling of a diffusers autoencoder, as the pipelines of diffusers apply it, from what its config and buffers
    hold.

    - batch-norm statistics over patches (`AutoencoderKLFlux2`): ``(z - mean) / sqrt(var + eps)``;
    - ``latents_mean`` and ``latents_std``, in the config or as buffers (SDXL-shaped, Qwen, Wan):
      ``(z - mean) * scale / std``;
    - ``scaling_factor`` and ``shift_factor`` (SD, SD3, Flux): ``(z - shift) * scale``; what is not set is 1 and 0.

    Raises:
        DataError: the scaling cannot be told, or cannot be inverted.
    """
    found = (form(vae) for form in _FORMS)
    return next(scaling for scaling in found if scaling is not None)


def _inside(vae: Any) -> None:
    if _setting(vae, "_latents_mean") is not None:  # AutoencoderRAE
        raise DataError("vae", f"{type(vae).__name__} scales its latents itself, which is not supported")


def _batch_norm(vae: Any) -> LatentScaling | None:
    statistics = getattr(vae, "bn", None)
    if statistics is None:
        return None
    std = (statistics.running_var.double() + vae.config.batch_norm_eps).sqrt()
    rows, columns = vae.config.patch_size
    return LatentScaling(_numbers(statistics.running_mean), _numbers(1 / std), (rows, columns))


def _statistics(vae: Any) -> LatentScaling | None:
    mean, std = _setting(vae, "latents_mean"), _setting(vae, "latents_std")
    if mean is None or std is None:
        return None
    scale = _number(vae, "scaling_factor", 1.0) / torch.as_tensor(std, dtype=torch.float64)
    return LatentScaling(_numbers(mean), _numbers(scale))


def _factors(vae: Any) -> LatentScaling:
    return LatentScaling((_number(vae, "shift_factor", 0.0),), (_number(vae, "scaling_factor", 1.0),))


_FORMS: tuple[Callable[[Any], LatentScaling | None], ...] = (_inside, _batch_norm, _statistics, _factors)


def _setting(vae: Any, name: str) -> Any:
    """What the config says, or a buffer of that name; None if neither does."""
    value = getattr(vae.config, name, None)
    return dict(vae.named_buffers(recurse=False)).get(name) if value is None else value


def _number(vae: Any, name: str, default: float) -> float:
    value = getattr(vae.config, name, None)
    return default if value is None else float(value)


def _numbers(values: Any) -> PerChannel:
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


def _channels(values: PerChannel, like: torch.Tensor) -> torch.Tensor | float:
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _patchify(z: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    rows, columns = patch
    batch, channels, height, width = z.shape
    cut = z.reshape(batch, channels, height // rows, rows, width // columns, columns).permute(0, 1, 3, 5, 2, 4)
    return cut.reshape(batch, channels * rows * columns, height // rows, width // columns)


def _unpatchify(x: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    rows, columns = patch
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels // (rows * columns), rows, columns, height, width).permute(0, 1, 4, 2, 5, 3)
    return cut.reshape(batch, channels // (rows * columns), height * rows, width * columns)
