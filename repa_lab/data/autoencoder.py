"""A frozen autoencoder of diffusers, whichever it is, as a map between uint8 pixels and what the diffusion model sees."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from repa_lab.data.errors import DataError
from repa_lab.data.latents import latent_scaling

Rounding = Literal["nearest", "truncate"]


class Autoencoder:
    """Encodes pixels and decodes latents, on whatever device they are.

    Video autoencoders are given images as films of one frame. The model is brought to float32, and its ``decode``
    computes in float32 whoever calls it: in half precision SDXL's gives NaN, and others give pixels of a few hundred
    levels.

    Args:
        model: a diffusers autoencoder.
        field: the setting that names it, for errors.
        shifted: whether its latents are shifted, if its config says by how much.

    Attributes:
        channels: of the pixels.
        latent_channels: of the latents, or None if the config does not say.
        scaling: between latents and what the diffusion model sees.
        identity: the class, the config and the content of the weights, as JSON.

    Raises:
        DataError: the model is no autoencoder of images.
    """

    def __init__(self, model: Any, field: str, shifted: bool = True) -> None:
        if not (hasattr(model, "encode") and hasattr(model, "decode")):
            raise DataError(field, f"{type(model).__name__} is not an autoencoder")
        self.model, self.field = model.eval().requires_grad_(False).float(), field
        model.decode = _in_float32(model.decode)
        self._film = _takes_films(model, field)
        self.scaling = latent_scaling(model) if shifted else replace(latent_scaling(model), mean=(0.0,))
        self.channels = _first_setting(model, "in_channels", "input_channels")
        self.latent_channels = _first_setting(model, "latent_channels", "z_dim")
        self.identity = _identity(model) | ({} if shifted else {"shifted": False})

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation ``(B, 2 * c, h, w)`` of the latents of ``pixels`` ``(B, C, H, W)``, uint8.

        The deviation is 0 where the autoencoder leaves nothing to chance.
        """
        images = pixels.to(self.model.device).float() / 127.5 - 1
        mean, std = _posterior(self.model.encode(images.unsqueeze(2) if self._film else images))
        moments = torch.cat([mean, std], dim=1)
        moments = moments.squeeze(2) if self._film else moments
        self.scaling.shape(
            moments.shape[1] // 2, *moments.shape[2:]
        )  # refuses what would not do before all are computed
        return moments

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """What the diffusion model sees, as pixels ``(B, C, H, W)`` of [-1, 1], not clamped; see :func:`to_uint8`."""
        z = self.scaling.denormalise(x)
        decode = self.model.to(x.device).decode
        pixels: torch.Tensor = decode(z.unsqueeze(2)).sample.squeeze(2) if self._film else decode(z).sample
        return pixels


def load_autoencoder(place: str, field: str, shifted: bool = True) -> Autoencoder:
    """An autoencoder by its hub id or folder, or by that of a pipeline, whose ``vae`` it is; of the class its config
    names.

    Raises:
        DataError: it cannot be loaded, or is none.
    """
    from diffusers import AutoModel

    errors: list[Exception] = []
    for subfolder in (None, "vae"):
        try:
            return Autoencoder(AutoModel.from_pretrained(place, subfolder=subfolder), field, shifted)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            errors.append(error)
    raise DataError(field, f"cannot load the {field.upper()} '{place}': {str(errors[0]).splitlines()[0]}")


def to_uint8(x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor:
    """Return values in [-1, 1] as levels 0..255; see :func:`quantise`."""
    return quantise((x.float() + 1) * 127.5, rounding)


def quantise(levels: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Return levels 0..255 as uint8, clamped and rounded; ``truncate`` drops the fraction, as REPA's script does."""
    return (levels.round() if rounding == "nearest" else levels).clamp(0, 255).to(torch.uint8)


def _in_float32(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decoder that takes latents of any precision and heeds no autocast around it."""

    @functools.wraps(decode)
    def precise(z: torch.Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(z.device.type, enabled=False):
            return decode(z.float(), *args, **options)

    return precise


def _posterior(encoded: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of what diffusers' autoencoders return: a distribution, or the latent itself."""
    if "latent_dist" in encoded:
        return encoded.latent_dist.mean, encoded.latent_dist.std
    (latent,) = encoded.to_tuple()
    return latent, torch.zeros_like(latent)


def _takes_films(model: Any, field: str) -> bool:
    encoder, decoder = (any("Conv3d" in type(layer).__name__ for layer in part.modules()) for part in _halves(model))
    if encoder != decoder:
        raise DataError(field, f"{type(model).__name__} turns images into films; an autoencoder of images is required")
    return encoder


def _halves(model: Any) -> tuple[nn.Module, nn.Module]:
    return getattr(model, "encoder", model), getattr(model, "decoder", model)


def _first_setting(model: Any, *names: str) -> int | None:
    return next((int(model.config[name]) for name in names if name in model.config), None)


def _identity(model: Any) -> dict[str, Any]:
    """Return what an autoencoder is: its class, its config and a digest of its weights, wherever its folder lies.

    Names in the config that begin with an underscore are diffusers' own notes: the path, its version.
    """
    config = {key: repr(value) for key, value in model.config.items() if not key.startswith("_")}
    return {"class": type(model).__name__, "config": config, "weights": weights_digest(model.state_dict())}


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a state dict: the name, type, shape and bytes of every tensor, on whatever device and
    strides.

    Bytes, for a sum of floats depends on the number of threads that add them.
    """
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
