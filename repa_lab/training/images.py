"""The data of a run, opened: where images come from, which are held out, and the space they are diffused in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repa_lab.data.fingerprint import DataError
from repa_lab.data.sources import Digits, ImageFolder, ImageSource, Split, split
from repa_lab.data.space import PixelSpace, Space, latent_space
from repa_lab.data.store import Progress
from repa_lab.models.family import Input
from repa_lab.spec import DataConfig

# Given the name of a long task, yields what to tell its progress to.
Announce = Callable[[str], Progress]


@dataclass(frozen=True)
class Images:
    """The images of a run."""

    source: ImageSource
    split: Split
    space: Space

    @property
    def input(self) -> Input:
        """What the denoiser is built for."""
        return Input(self.space.channels, self.space.size, self.source.num_classes)


_SOURCES: dict[str, Callable[[DataConfig], ImageSource]] = {
    "digits": lambda data: Digits(),
    "imagefolder": lambda data: ImageFolder(_folder(data), data.side),
}


def open_images(data: DataConfig, cache: Path, announce: Announce | None = None) -> Images:
    """The data of a run; latents are computed if they are asked for and not in the cache.

    Raises:
        DataError: the data cannot be used.
    """
    source = _SOURCES[data.source](data)
    progress = announce("latents") if announce and data.vae else None
    space = latent_space(source, data.vae, cache, progress) if data.vae else PixelSpace(source)
    return Images(source, split(len(source), data.holdout), space)


def _folder(data: DataConfig) -> Path:
    if data.path is None:
        raise DataError("path", "no folder is given; set data.path")
    return Path(data.path)
