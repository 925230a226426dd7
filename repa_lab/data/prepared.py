"""A prepared folder: images that are cropped already, and their latents beside them, which need no encoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repa_lab.data.autoencoder import Autoencoder
from repa_lab.data.errors import DataError
from repa_lab.data.layout import IMAGES, LATENTS, Listing, open_image, read_listing, read_manifest, unreadable
from repa_lab.data.settings import PreparedSettings
from repa_lab.data.sources import Pictures

_PROBES = 4
# TF32 or half precision change latents by a hundredth at most; another VAE, or another image, by as much as they are.
_TOLERANCE = 0.05


def open_prepared(settings: PreparedSettings) -> Prepared:
    """Open a prepared folder."""
    return Prepared(settings.folder, settings.side)


class Prepared(Pictures):
    """Images of a folder in the layout of REPA's preprocessing; see :mod:`repa_lab.data.layout`. There are no captions.

    Args:
        folder: the folder.
        resolution: pixels along each side of its images.

    Raises:
        DataError: the folder is incomplete, or its images have another size.
    """

    def __init__(self, folder: Path, resolution: int) -> None:
        self._listing = read_listing(folder)
        super().__init__(len(self._listing), resolution, None)
        self.labels = torch.tensor(self._listing.labels)
        self.num_classes = int(self.labels.max()) + 1
        self.captions: Sequence[str] = ()
        self.fingerprint = self._listing.fingerprint(resolution)

    def open(self, index: int) -> Image.Image:
        """See :class:`Pictures`."""
        return open_image(self._listing.path(IMAGES, index), self.side)

    def latents(self, vae: Autoencoder, device: torch.device) -> PreparedLatents:
        """The latents beside the images, if they are those of ``vae``: four images are encoded and compared.

        No name is trusted: REPA's tool writes none, and autoencoders of different names may share an encoder, as Stable
        Diffusion's ft-mse and ft-ema do.

        Raises:
            DataError: they are of another VAE, or of other images.
        """
        held = PreparedLatents(self._listing)
        vae.model.to(device)
        for index in self._listing.sample(_PROBES):
            made = vae.moments(self.read([index])).cpu()[0]
            if not _are_alike(made, held.read(index)):
                raise DataError("vae", self._other_latents(index, made, held.read(index)))
        return held

    def _pixels(self, index: int) -> torch.Tensor:
        try:
            return super()._pixels(index)
        except OSError as error:  # Pillow reads the pixels only when they are asked for
            raise unreadable(self._listing.path(IMAGES, index), error) from None

    def _other_latents(self, index: int, made: torch.Tensor, held: torch.Tensor) -> str:
        path, manifest = self._listing.path(LATENTS, index), read_manifest(self._listing.folder)
        shapes = "" if made.shape == held.shape else f" of shape {tuple(held.shape)}, not {tuple(made.shape)}"
        maker = f"the folder was prepared with '{manifest.get('vae')}'" if manifest else "it was made by another VAE"
        return f"'{path}' holds other latents{shapes} than this VAE makes of the image: {maker}, or files are mixed up"


class PreparedLatents:
    """Mean and standard deviation of every image's latent, read from a file each: ``(2 * c, h, w)`` or
    ``(1, 2 * c, h, w)``.

    Raises:
        DataError: the first file cannot be read.
    """

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._shape = _load(listing.path(LATENTS, 0)).shape

    def shape(self, index: torch.Tensor) -> torch.Size:
        """See :class:`repa_lab.data.space.Moments`."""
        return self._shape

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """See :class:`repa_lab.data.space.Moments`.

        Raises:
            DataError: a file cannot be read, or differs in shape from the first.
        """
        return torch.stack([self.read(number) for number in index.tolist()])

    def read(self, index: int) -> torch.Tensor:
        """Those of one image, ``(2 * c, h, w)`` in float32.

        Raises:
            DataError: the file cannot be read, or holds something else.
        """
        values = _load(self._listing.path(LATENTS, index))
        if values.shape != self._shape:
            seen = f"'{self._listing.path(LATENTS, index)}' is {tuple(values.shape)}, the first is {tuple(self._shape)}"
            raise DataError("path", f"the latents of one folder must be of one shape: {seen}")
        return values


def _load(path: Path) -> torch.Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error) from None
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim != 3 or len(values) % 2 or values.dtype.kind != "f":
        seen = f"'{path}' holds {values.dtype} of shape {values.shape}"
        raise DataError("path", f"{seen}, not means and deviations (2 * channels, height, width)")
    return torch.from_numpy(values).float()


def _are_alike(made: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether means and deviations are the same but for rounding, each by the root of the mean square."""
    if made.shape != held.shape:
        return False
    pairs = zip(made.chunk(2), held.chunk(2), strict=True)
    return all(bool(((one - other).square().mean()) <= _TOLERANCE**2 * one.square().mean()) for one, other in pairs)
