"""A frozen autoencoder of diffusers as a map between uint8 pixels and what the diffusion model sees."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from repa_lab.data import DataError

Rounding = Literal["nearest", "truncate"]
PerChannel = tuple[float, ...]


@dataclass(frozen=True)
class LatentScaling:
    """The map ``x = (patchify(z) - mean) * scale`` from latents ``z`` to what the diffusion model sees, ``x``.

    Attributes:
        mean: one number for all channels, or one for each channel of ``x``.
        scale: as ``mean``.
        patch: height and width of a patch of ``z``, which become channels of ``x`` ordered by (channel, row, column).

    Raises:
        DataError: a scale is 0 or not finite.
    """

    mean: PerChannel = (0.0,)
    scale: PerChannel = (1.0,)
    patch: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value != 0 for value in self.scale):
            message = f"the VAE's latents cannot be scaled by {self.scale}: its config or statistics are broken"
            raise DataError("vae", message)

    def shape(self, channels: int, *size: int) -> tuple[int, ...]:
        """Return the shape of ``x`` for a ``z`` of (channels, height, width), or (channels, frames, height, width).

        Raises:
            DataError: ``z`` does not divide into patches.
        """
        (rows, columns), (*frames, height, width) = self.patch, size
        if height % rows or width % columns:
            message = (
                f"the VAE's latents measure {height}x{width}, which does not divide into patches of {rows}x{columns}"
            )
            raise DataError("resolution", message)
        return channels * rows * columns, *frames, height // rows, width // columns

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """Return ``x`` ``(B, c * p * q, h / p, w / q)`` of latents ``(B, c, h, w)`` for patches of ``p`` by ``q``.

        Every frame of clips ``(B, c, f, h, w)`` is scaled like an image.
        """
        if z.ndim == 5:
            return _of_frames(self.normalise, z)
        rows, columns = self.patch
        batch, channels, height, width = z.shape
        cut = z.reshape(batch, channels, height // rows, rows, width // columns, columns).permute(0, 1, 3, 5, 2, 4)
        x = cut.reshape(batch, channels * rows * columns, height // rows, width // columns)
        return (x - _channels(self.mean, x)) * _channels(self.scale, x)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """Return the latents of ``x``: the inverse of :meth:`normalise`."""
        if x.ndim == 5:
            return _of_frames(self.denormalise, x)
        rows, columns = self.patch
        batch, channels, height, width = x.shape
        patches = x / _channels(self.scale, x) + _channels(self.mean, x)
        cut = patches.reshape(batch, channels // (rows * columns), rows, columns, height, width).permute(
            0, 1, 4, 2, 5, 3
        )
        return cut.reshape(batch, channels // (rows * columns), height * rows, width * columns)


def latent_scaling(vae: Any) -> LatentScaling:
    """Return the scaling of a diffusers autoencoder as the pipelines of diffusers apply it.

    - batch-norm statistics over patches (`AutoencoderKLFlux2`): ``(z - mean) / sqrt(var + eps)``;
    - ``latents_mean`` and ``latents_std``, in the config or as buffers (SDXL-shaped, Qwen, Wan):
      ``(z - mean) * scale / std``;
    - ``scaling_factor`` and ``shift_factor`` (SD, SD3, Flux): ``(z - shift) * scale``; by default 1 and 0.

    Raises:
        DataError: the autoencoder scales its latents itself, or the scaling has no inverse.
    """
    buffers = dict(vae.named_buffers(recurse=False))

    def setting(name: str) -> Any:
        value = getattr(vae.config, name, None)
        return buffers.get(name) if value is None else value

    if setting("_latents_mean") is not None:  # AutoencoderRAE
        raise DataError("vae", f"{type(vae).__name__} scales its latents itself, which is not supported")
    if (norm := getattr(vae, "bn", None)) is not None:
        std = (norm.running_var.double() + vae.config.batch_norm_eps).sqrt()
        rows, columns = vae.config.patch_size
        return LatentScaling(_numbers(norm.running_mean), _numbers(1 / std), (rows, columns))
    factor, shift = (getattr(vae.config, name, None) for name in ("scaling_factor", "shift_factor"))
    scale, mean, std = 1.0 if factor is None else float(factor), setting("latents_mean"), setting("latents_std")
    if mean is not None and std is not None:
        return LatentScaling(_numbers(mean), _numbers(scale / torch.as_tensor(std, dtype=torch.float64)))
    return LatentScaling((0.0 if shift is None else float(shift),), (scale,))


def _numbers(values: Any) -> PerChannel:
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


def _of_frames(scale: Callable[[torch.Tensor], torch.Tensor], clips: torch.Tensor) -> torch.Tensor:
    """Return what a function of images ``(B, c, h, w)`` makes of each frame of clips ``(B, c, f, h, w)``."""
    frames: torch.Tensor = scale(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
    return frames.transpose(1, 2)


def _channels(values: PerChannel, like: torch.Tensor) -> torch.Tensor | float:
    """Return one number, or a tensor that is broadcast over the channels of ``like`` ``(B, c, h, w)``."""
    return values[0] if len(values) == 1 else _on_device(values, like.dtype, like.device)


@functools.cache  # a copy to the device waits for it, and every training step would
def _on_device(values: PerChannel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


class Autoencoder:
    """Encodes pixels and decodes latents, on the device they are on.

    A video autoencoder is given clips ``(B, C, F, H, W)``, or an image as a film of one frame. The model is brought to
    float32, and decoding ignores autocast: in half precision SDXL's gives NaN, and others give pixels of a few hundred
    levels.

    Args:
        field: the setting that names the autoencoder, for errors.
        shifted: whether its latents are shifted where its config says by how much.

    Attributes:
        channels: number of channels of the pixels, or None if the config does not say.
        latent_channels: number of channels of the latents, or None if the config does not say.
        scaling: the map from latents to what the diffusion model sees.
        identity: the class, the config and the content of the weights, as JSON.

    Raises:
        DataError: the model is no autoencoder of images.
    """

    def __init__(self, model: Any, field: str, shifted: bool = True) -> None:
        if not (hasattr(model, "encode") and hasattr(model, "decode")):
            raise DataError(field, f"{type(model).__name__} is not an autoencoder")
        self.model, self.field = model.eval().requires_grad_(False).float(), field
        model.decode = _in_float32(model.decode)
        halves = (getattr(model, name, model) for name in ("encoder", "decoder"))
        encodes_films, decodes_films = (
            any("Conv3d" in type(layer).__name__ for layer in half.modules()) for half in halves
        )
        if encodes_films != decodes_films:
            message = f"{type(model).__name__} turns images into films; an autoencoder of images is required"
            raise DataError(field, message)
        self._film, scaling = encodes_films, latent_scaling(model)
        self.scaling = scaling if shifted else replace(scaling, mean=(0.0,))
        self.channels = _first_setting(model, "in_channels", "input_channels")
        self.latent_channels = _first_setting(model, "latent_channels", "z_dim")
        # Names that begin with an underscore are diffusers' own notes: the path, its version.
        config = {key: repr(value) for key, value in model.config.items() if not key.startswith("_")}
        content: dict[str, Any] = {"config": config, "weights": weights_digest(model.state_dict())}
        self.identity = {"class": type(model).__name__, **content, **({} if shifted else {"shifted": False})}

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return mean and standard deviation ``(B, 2 * c, h, w)`` of the latents of uint8 pixels ``(B, C, H, W)``.

        The deviation is 0 where the autoencoder leaves nothing to chance. Those of clips are ``(B, 2 * c, f, h, w)``.

        Raises:
            DataError: the autoencoder is one of images and the pixels are of clips, or the latents do not fit.
        """
        is_image = pixels.ndim == 4
        if not (self._film or is_image):
            raise DataError(self.field, f"{type(self.model).__name__} encodes images, and the data are clips")
        images = pixels.to(self.model.device).float() / 127.5 - 1
        encoded = self.model.encode(images.unsqueeze(2) if self._film and is_image else images)
        if "latent_dist" in encoded:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            (mean,) = encoded.to_tuple()
            std = torch.zeros_like(mean)
        moments = torch.cat([mean, std], dim=1)
        moments = moments.squeeze(2) if self._film and is_image else moments
        self.scaling.shape(
            moments.shape[1] // 2, *moments.shape[2:]
        )  # refuses latents that do not fit, in the first batch
        return moments

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return pixels ``(B, C, H, W)``, or of clips, in [-1, 1], not clamped; ``x`` is what the denoiser sees."""
        z = self.scaling.denormalise(x)
        decode = self.model.to(x.device).decode
        is_film_of_one = self._film and z.ndim == 4
        # Later decoders of LTX-Video are told how noisy the latents are.
        noise = (z.new_zeros(len(z)),) if getattr(self.model.config, "timestep_conditioning", False) else ()
        pixels: torch.Tensor = decode(z.unsqueeze(2) if is_film_of_one else z, *noise).sample
        return pixels.squeeze(2) if is_film_of_one else pixels


def load_autoencoder(place: str, field: str, shifted: bool = True) -> Autoencoder:
    """Load an autoencoder from a hub id or a folder, or the ``vae`` of the pipeline there; its config names its class.

    Raises:
        DataError: the autoencoder cannot be loaded, or is none.
    """
    from diffusers import AutoModel

    errors: list[Exception] = []
    for subfolder in (None, "vae"):
        try:
            return Autoencoder(AutoModel.from_pretrained(place, subfolder=subfolder), field, shifted)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            errors.append(error)
    raise DataError(field, f"cannot load the {field.upper()} '{place}': {str(errors[0]).splitlines()[0]}")


def to_uint8(x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor:
    """Return values in [-1, 1] as levels 0..255; see :func:`quantise`."""
    return quantise((x.float() + 1) * 127.5, rounding)


def quantise(levels: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Return levels 0..255 as uint8, clamped and rounded; ``truncate`` drops the fraction, as REPA's script does."""
    return (levels.round() if rounding == "nearest" else levels).clamp(0, 255).to(torch.uint8)


def _in_float32(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decoder that takes latents of any precision and ignores autocast."""

    @functools.wraps(decode)
    def decode_in_float32(z: torch.Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(z.device.type, enabled=False):
            return decode(z.float(), *args, **options)

    return decode_in_float32


def _first_setting(model: Any, *names: str) -> int | None:
    return next((int(model.config[name]) for name in names if name in model.config), None)


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the name, dtype, shape and bytes of every tensor, on any device and with any strides.

    Bytes, because a sum of floats depends on the number of threads that add them.
    """
    content = hashlib.sha256()
    for name, value in sorted(state.items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
