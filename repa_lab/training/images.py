"""The data of a run, opened: where images come from, which are held out, and the space they are diffused in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from repa_lab.align.settings import EncoderSettings
from repa_lab.data.autoencoder import Autoencoder, load_autoencoder
from repa_lab.data.cache import Progress
from repa_lab.data.errors import DataError
from repa_lab.data.reconstruct import Reconstructions
from repa_lab.data.settings import SOURCES, SourceSettings
from repa_lab.data.sources import Flips, ImageSource, Split, split
from repa_lab.data.space import LatentSpace, PixelSpace, Space, latent_space
from repa_lab.models.scratch import Input

_CPU = torch.device("cpu")
# Given the name of a long task, yields what to tell its progress to.
Announce = Callable[[str], Progress]


@dataclass(frozen=True)
class Images:
    """The images of a run. Where there are ``flips``, image ``base_count + i`` of the source is image i mirrored; the
    split and whatever is measured are of the images as they are."""

    source: ImageSource
    split: Split
    space: Space

    @property
    def flips(self) -> bool:
        """Whether there are mirrored images."""
        return isinstance(self.source, Flips)

    @property
    def base(self) -> ImageSource:
        """The images as they are, without mirrored ones."""
        return self.source.base if isinstance(self.source, Flips) else self.source

    @property
    def base_count(self) -> int:
        """How many they are."""
        return len(self.base)

    @property
    def input(self) -> Input:
        """What a denoiser that is trained from scratch is built for; its images are of one size."""
        channels, height, width = self.space.shape(self.split.train)
        return Input(channels, (height, width), self.source.num_classes)


# What decodes the latents for an encoder's eyes, by the encoder's `pixels`; None leaves the images as they are.
_DECODERS: dict[str, Callable[[EncoderSettings, LatentSpace], Autoencoder] | None] = {
    "image": None,
    "vae": lambda encoder, space: space.vae,
    "tae": lambda encoder, space: load_autoencoder(str(encoder.tae), "tae"),
}


def open_images(
    data: SourceSettings,
    cache: Path,
    announce: Announce | None = None,
    device: torch.device = _CPU,
    vae: str | None = None,
    shifted: bool = True,
) -> Images:
    """The data of a run; latents are computed on ``device`` if they are asked for and not in the cache.

    Args:
        data: the settings.
        cache: where latents are kept.
        announce: told of a long task.
        device: where latents are computed.
        vae: the autoencoder, or the pipeline with it, to use where the settings name none.
        shifted: see :class:`repa_lab.data.autoencoder.Autoencoder`.

    Raises:
        DataError: the data cannot be used.
    """
    vae = data.vae or vae
    if data.is_unset:
        raise DataError("path", "no folder is given; set data.path")
    base = SOURCES[data.source].open(data)
    parts = split(len(base), data.held_out(len(base)))
    source = Flips(base) if data.flip else base
    progress = announce("latents") if announce and vae else None
    space = latent_space(source, vae, cache, progress, device, shifted) if vae else PixelSpace(source)
    return Images(source, parts, space)


def pixels_for(encoder: EncoderSettings, images: Images, device: torch.device = _CPU) -> ImageSource:
    """What an encoder looks at, by its ``pixels``: the images, or what the VAE or a tiny autoencoder makes of their
    latents.

    Args:
        encoder: the encoder's settings.
        images: the run's images.
        device: where to decode.

    Raises:
        DataError: there are no latents (field ``vae``), or the tiny autoencoder is not for them (field ``tae``).
    """
    decoder = _DECODERS[encoder.pixels]
    if decoder is None:
        return images.source
    space = images.space
    if not isinstance(space, LatentSpace):
        raise DataError(
            "vae", f"pixels: {encoder.pixels} decodes latents, and there is no VAE; set data.vae, or pixels: image"
        )
    return Reconstructions(images.source, space, decoder(encoder, space), device)
