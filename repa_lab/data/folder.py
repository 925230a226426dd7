"""A folder of images: one class per subfolder, captions from metadata files or a text file beside each."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import fingerprint_content
from repa_lab.data.listing import read_image_folder
from repa_lab.data.settings import ImageFolderSettings
from repa_lab.data.sources import Pictures

# Formats of cameras, which note how they were held; others would have to be decoded to look for such a note.
_ROTATED = ("JPEG", "MPO", "TIFF", "WEBP")


def open_image_folder(settings: ImageFolderSettings) -> ImageFolder:
    """Open a folder of images."""
    return ImageFolder(settings.folder, settings.side, settings.sizes, settings.caption_column)


class ImageFolder(Pictures):
    """Images below a folder; those directly in it belong to one class. Each is cropped and resized as the papers' data
    was.

    See :func:`repa_lab.data.listing.read_image_folder` for what is read and where captions come from.

    Args:
        folder: the folder.
        resolution: pixels along each side.
        buckets: see :class:`Pictures`.
        captions: the column of captions in metadata files.

    Raises:
        DataError: no folder, no images, an image that cannot be read, or metadata that cannot be used.
    """

    def __init__(
        self, folder: Path, resolution: int, buckets: Buckets | None = None, captions: str | None = None
    ) -> None:
        images = read_image_folder(folder, captions)
        self._files = images.files
        super().__init__(len(self._files), resolution, buckets)
        classes = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self._files]
        numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
        self.num_classes = len(numbers)
        self.labels = torch.tensor([numbers[name] for name in classes])
        self.captions, self.notes = images.captions, images.notes
        self.fingerprint = fingerprint_content(images, resolution, buckets)

    def open(self, index: int) -> Image.Image:
        """See :class:`Pictures`."""
        try:
            image = Image.open(self._files[index])
            if image.format in _ROTATED:
                ImageOps.exif_transpose(image, in_place=True)
        except OSError as error:
            raise _unreadable(self._files[index], error) from None
        return image

    def _pixels(self, index: int) -> torch.Tensor:
        try:
            return super()._pixels(index)
        except OSError as error:  # Pillow reads the pixels only when they are asked for
            raise _unreadable(self._files[index], error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError("path", f"cannot read the image '{path}': {error}")
