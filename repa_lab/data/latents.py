"""Latents: the frozen autoencoder that makes them of images, and the space in which diffusion takes place."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from repa_lab.data import DataError
from repa_lab.data.cache import Progress, open_cache
from repa_lab.data.sources import DerivedSource, Source

_ENCODED_AT_ONCE = _DECODED_AT_ONCE = 8  # at full resolution an autoencoder takes far more memory than the pixels
_LARGE_SIDE = 1024  # pixels along each side of the images that a GPU is taken to encode eight of at once
_CPU = torch.device("cpu")
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
        DataError: a scale is 0 or not finite, or patches are not square.
    """

    mean: PerChannel = (0.0,)
    scale: PerChannel = (1.0,)
    patch: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        rows, columns = self.patch
        if rows != columns or not all(math.isfinite(value) and value != 0 for value in self.scale):
            scaling = f"the VAE's latents cannot be scaled by {self.scale} in patches of {rows}x{columns}"
            raise DataError("vae", f"{scaling}: its config or statistics are broken")

    def shape(self, channels: int, *size: int) -> tuple[int, ...]:
        """Return the shape of ``x`` for a ``z`` of (channels, height, width), or (channels, frames, height, width).

        Raises:
            DataError: ``z`` does not divide into patches.
        """
        (rows, columns), (*frames, height, width) = self.patch, size
        if height % rows or width % columns:
            message = f"measure {height}x{width}, which does not divide into patches of {rows}x{columns}"
            raise DataError("resolution", f"the VAE's latents {message}")
        return channels * rows * columns, *frames, height // rows, width // columns

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """Return ``x`` ``(B, c * p * p, h / p, w / p)`` of latents ``(B, c, h, w)`` for patches of ``p`` by ``p``.

        Every frame of clips ``(B, c, f, h, w)`` is scaled like an image.
        """
        x = F.pixel_unshuffle(z.movedim(1, -3), self.patch[0])
        return ((x - _channels(self.mean, x)) * _channels(self.scale, x)).movedim(-3, 1)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """Return the latents of ``x``: the inverse of :meth:`normalise`."""
        patches = x.movedim(1, -3)
        patches = patches / _channels(self.scale, patches) + _channels(self.mean, patches)
        return F.pixel_shuffle(patches, self.patch[0]).movedim(-3, 1)


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


def _channels(values: PerChannel, like: torch.Tensor) -> torch.Tensor | float:
    """Return one number, or a tensor that is broadcast over the channels of ``like`` ``(..., c, h, w)``."""
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
        channels: number of channels of the pixels, or None if the config does not say, as for ``latent_channels``.
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
        are_of_films = [any("Conv3d" in type(layer).__name__ for layer in half.modules()) for half in halves]
        if any(are_of_films) != all(are_of_films):
            message = f"{type(model).__name__} turns images into films; an autoencoder of images is required"
            raise DataError(field, message)
        self._film, scaling = all(are_of_films), latent_scaling(model)
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
        self.scaling.shape(moments.shape[1] // 2, *moments.shape[2:])  # refuses what does not fit, in the first batch
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


def load_vae(place: str, source: Source, shifted: bool = True) -> Autoencoder:
    """Load the autoencoder that ``data.vae`` names, and refuse one for other images than those of the source."""
    vae = load_autoencoder(place, "vae", shifted)
    if vae.channels not in (source.channels, None):
        raise DataError("vae", f"the VAE takes {vae.channels} channels, the images have {source.channels}")
    return vae


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


class Moments(Protocol):
    """Mean and deviation ``(2 * c, h, w)`` of the latents of every image; images of one call are of one size."""

    def shape(self, index: torch.Tensor) -> torch.Size:
        """Return the shape of one tensor of the images ``index``."""

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return how the images ``index`` were cut, ``(n, 6)``."""

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tensors ``(n, *shape)`` of the images ``index``."""


class PixelSpace:
    """Pixels scaled from 0..255 to [-1, 1]; the way back clamps and rounds. Images of one call are of one size."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.channels = source.channels

    def shape(self, index: torch.Tensor) -> tuple[int, ...]:
        """Return (channels, height, width) of each of the images ``index``; clips have their frames after channels."""
        height, width = self._source.sizes[index[0]].tolist()
        return self.channels, height, width

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return how the images ``index`` ``(B,)`` were cut, ``(B, 6)``; see :meth:`Source.frames`."""
        return self._source.frames(index.tolist())

    def read(self, index: torch.Tensor) -> torch.Tensor:
        """Return the images ``index`` ``(B,)`` as they are stored, on the CPU: pixels, or moments of latents."""
        return self._source.read(index.tolist())

    def draw(self, stored: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """Draw noise to :meth:`encode` ``count`` images like ``stored`` ``(b, ...)``, on the generator's device.

        Returns None, without a draw, if nothing is left to chance.
        """
        return None

    def encode(self, stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Return float32 ``(B, *shape)`` of what :meth:`read` returned, on its device; without noise, the mean."""
        return stored.float() / 127.5 - 1

    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        """Return ``x`` ``(B, channels, h, w)`` as uint8 pixels ``(B, C, H, W)``, or None if a pixel is not finite."""
        return _levels(x, rounding)


class LatentSpace:
    """Latents of an autoencoder, ``mean + std * noise``, scaled; its methods are those of :class:`PixelSpace`."""

    def __init__(self, vae: Autoencoder, moments: Moments) -> None:
        self.vae, self._moments = vae, moments
        self.channels = self.shape(torch.tensor([0]))[0]
        self.frames = moments.frames

    def shape(self, index: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of each of the latents."""
        doubled, *size = self._moments.shape(index)
        return self.vae.scaling.shape(doubled // 2, *size)

    def read(self, index: torch.Tensor) -> torch.Tensor:
        """Return the moments."""
        return self._moments[index]

    def draw(self, stored: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor | None:
        """Draw the noise, ``(count, c, h, w)``."""
        _, doubled, *size = stored.shape
        return torch.randn((count, doubled // 2, *size), generator=generator, device=generator.device)

    def encode(self, stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Return the latents of moments as the diffusion model sees them."""
        mean, std = stored.chunk(2, dim=1)
        return self.vae.scaling.normalise(mean if noise is None else mean + std * noise)

    def decode(self, x: torch.Tensor, rounding: Rounding = "nearest") -> torch.Tensor | None:
        """Return the pixels of latents."""
        return _levels(self.vae.decode(x), rounding)


Space = PixelSpace | LatentSpace


def _levels(pixels: torch.Tensor, rounding: Rounding) -> torch.Tensor | None:
    """Return uint8 levels, or None if a pixel is not finite: clamping would turn NaN into a valid black pixel."""
    return to_uint8(pixels, rounding) if bool(pixels.isfinite().all()) else None


def latent_space(
    source: Source,
    vae: str,
    cache: Path,
    progress: Progress | None = None,
    device: torch.device = _CPU,
    shifted: bool = True,
) -> LatentSpace:
    """Open the latent space of a VAE: the latents that a source has of its own, or those that are encoded and cached.

    Args:
        vae: an autoencoder of diffusers for images: a hub id or a folder.
        shifted: see :class:`Autoencoder`.

    Raises:
        DataError: the VAE cannot be loaded, is for other images, or is not that of the source's own latents.
    """
    model = load_vae(vae, source, shifted)
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
        decoder: the VAE of the space, or a tiny autoencoder of the same latents.
        device: where to decode; pixels are returned on the CPU.

    Raises:
        DataError: the decoder is one of other latents.
    """

    def __init__(self, source: Source, space: LatentSpace, decoder: Autoencoder, device: torch.device) -> None:
        if decoder is not space.vae and decoder.latent_channels != space.channels:
            message = f"'{decoder.field}' decodes latents of {decoder.latent_channels} channels"
            message += f", but those of the VAE have {space.channels}: it is for another VAE"
            raise DataError(decoder.field, message)
        kind = f"reconstructions/{decoder.field}"
        super().__init__(source, kind, vae=space.vae.identity, decoder=decoder.identity)
        self._space, self._decoder, self._device = space, decoder, device

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return decoded pixels; see :class:`Source`.

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
