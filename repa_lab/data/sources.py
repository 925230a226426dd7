"""Image sources: uint8 pixels with class labels and captions, mirrored images, and the images that are held out."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from repa_lab.data import DataError
from repa_lab.data.crop import Buckets, Size, crop, framing, opaque
from repa_lab.data.huggingface import find_columns, fingerprint_saved, load_hub_rows, load_rows, require_rows
from repa_lab.data.listing import caption_notes, fingerprint_content, fingerprint_images, read_image_folder
from repa_lab.data.settings import (
    Dataset,
    DigitsSettings,
    HubSettings,
    ImageFolderSettings,
    SavedSettings,
    SourceSettings,
    fingerprint_digits,
)
from repa_lab.files import digest, write_text

_SPLIT_SEED = 0
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for images that it cannot read
# Formats of cameras, which note how the camera was held; other formats would have to be decoded to find such a note.
_ROTATED = ("JPEG", "MPO", "TIFF", "WEBP")


class ImageSource(Protocol):
    """A fixed, ordered set of labelled images.

    A source that has latents of its own returns them from ``latents(vae, device)``, as
    :class:`repa_lab.data.space.Moments`.

    Attributes:
        channels: number of channels of the pixels.
        clip_frames: frames of a clip; 0 for images. Pixels of clips are ``(n, channels, frames, height, width)``.
        side: pixels along each side of a square image; images of other aspects have about its area.
        sizes: height and width of every image ``(n, 2)``.
        num_classes: number of classes.
        labels: class labels ``(n,)``, int64 in [0, num_classes).
        captions: n texts, or empty.
        notes: what was left out or is missing, a sentence each.
        fingerprint: a key of caches.
    """

    channels: int
    clip_frames: int
    side: int
    sizes: torch.Tensor
    num_classes: int
    labels: torch.Tensor
    captions: Sequence[str]
    notes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return pixels ``(len(index), channels, height, width)``, uint8, of images of one size."""
        ...

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """Return how images were cut, ``(len(index), 6)``: see :attr:`repa_lab.data.crop.Framing.frame`."""
        ...


class Source:
    """The base of sources of images: a fixed, ordered set of images with labels and captions, if any.

    A subclass has ``__len__``, ``read(index)``, ``sizes`` and ``fingerprint``, as :class:`ImageSource` describes them.
    The rest is given here for images without labels and captions, and may be set.

    Args:
        settings: an instance of ``Settings``.
    """

    Settings: ClassVar[type[SourceSettings]] = SourceSettings

    clip_frames = 0
    num_classes = 1
    captions: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    sizes: torch.Tensor
    fingerprint: str

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.channels, self.side = settings, settings.channels, settings.side

    @classmethod
    def describe(cls, settings: Any) -> Dataset:
        """Return what is known of the data set; override this where opening the images takes long."""
        opened: Any = cls(settings)
        return Dataset(opened.fingerprint, len(opened), opened.num_classes, bool(opened.captions), opened.notes)

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """Class labels ``(n,)``, int64: all 0 unless a subclass says otherwise."""
        return torch.zeros(len(self.sizes), dtype=torch.long)

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """Return the frames ``(len(index), 6)`` of images that are not cut."""
        sizes = self.sizes[torch.as_tensor(index)]
        return torch.cat([sizes, torch.zeros_like(sizes), sizes], dim=1)


def groups(sizes: torch.Tensor) -> list[torch.Tensor]:
    """Return the images of each size, ascending, those of the smallest size first; ``sizes`` is ``(n, 2)``."""
    kinds, which = sizes.unique(dim=0, return_inverse=True)
    return [(which == number).nonzero().flatten() for number in range(len(kinds))]


def remembered(folder: Path | None, key: Any, compute: Callable[[], Any]) -> Any:
    """Return a value that JSON can hold, from a file of a folder that is named by a key, or computed and written there.

    Images that have been looked at once are not opened again, which takes minutes for a million of them.

    Args:
        folder: the folder; None computes the value.
        key: everything that decides the value, as JSON.
    """
    if folder is None:
        return compute()
    path = folder / "images" / f"{digest(key)[:16]}.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        if digest(noted["key"]) == digest(key):
            return noted["value"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    content = {"key": key, "value": compute()}
    try:
        write_text(path, json.dumps(content))
    except OSError as error:
        raise DataError("source", f"cannot write '{path}': {error.strerror or error}") from None
    return content["value"]


def stamps(files: Iterable[Path]) -> str:
    """Return a digest of the paths, sizes and modification times of files."""
    return digest([(str(file.absolute()), (status := file.stat()).st_size, status.st_mtime_ns) for file in files])


class Digits(Source):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, one channel; grey levels 0..16 become 0..255."""

    num_classes = 10

    def __init__(self, settings: DigitsSettings | None = None, cache: Path | None = None) -> None:
        from sklearn.datasets import load_digits  # a sixth of what a worker imports, and no other data needs it

        super().__init__(settings or DigitsSettings())
        bunch = load_digits()
        self._pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        self.labels = torch.from_numpy(bunch.target).long()
        self.sizes = torch.full((len(self.labels), 2), self.side)
        self.fingerprint = fingerprint_digits()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return pixels; see :class:`ImageSource`."""
        return torch.from_numpy(self._pixels[np.asarray(index)])  # torch takes four times as long for a list


class CroppedImages:
    """The base of sources whose images are files of any size, cropped and resized as they are read.

    A subclass has ``open`` and ``name``, and sets the attributes of :class:`ImageSource` that are not set here.

    Args:
        count: number of images.
        side: pixels along each side; images are square unless :meth:`choose_sizes` is called.
    """

    channels = 3
    clip_frames = 0
    num_classes: int
    labels: torch.Tensor
    captions: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str
    _field = "path"  # the setting that names the data set, for errors

    def __init__(self, count: int, side: int) -> None:
        self.side, self.sizes = side, torch.full((count, 2), side)
        self._originals = np.zeros((count, 2), dtype=np.int32)  # height and width, 0 if not known yet

    def choose_sizes(self, buckets: Buckets, cache: Path | None, content: str) -> None:
        """Give each image the size of the nearest aspect.

        Args:
            cache: folder of all caches, where the sizes of the originals are noted; None measures them.
            content: a digest that differs if the size of an original does.
        """

        def measure() -> list[Size]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(self._original_size, range(len(self))))

        self._originals[:] = remembered(cache, {"kind": "sizes/1", "of": content}, measure)
        self.sizes = torch.tensor([buckets.choose((height, width)) for height, width in self._originals.tolist()])

    def open(self, index: int) -> Image.Image:
        """Return an image as it is stored; pixels may be loaded later.

        Raises:
            OSError: the image cannot be read.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return what to call an image in errors."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return pixels; see :class:`ImageSource`.

        Raises:
            DataError: an image cannot be read.
        """
        return torch.stack([self._pixels(int(i)) for i in index])

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """Return how images were cut; see :class:`ImageSource`. An image is opened unless its size is known.

        Raises:
            DataError: an image cannot be read.
        """
        return torch.tensor([framing(self._original_size(int(i)), self._size(int(i))).frame for i in index])

    def _size(self, index: int) -> Size:
        height, width = self.sizes[index].tolist()
        return height, width

    def _pixels(self, index: int) -> torch.Tensor:
        with self._opened(index) as image:
            pixels = np.array(crop(opaque(image), self._size(index)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _original_size(self, index: int) -> Size:
        if not self._originals[index].all():
            with self._opened(index):
                pass
        height, width = self._originals[index].tolist()
        return height, width

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        try:
            with self.open(index) as image:
                self._originals[index] = image.height, image.width
                yield image
        except _UNREADABLE as error:
            reason = str(error).partition(" <_io.")[0]  # Pillow names the file, or the object that stands for it
            raise DataError(self._field, f"cannot read {self.name(index)}: {reason}") from None


def open_upright(file: Path) -> Image.Image:
    """Return the image of a file, turned as its camera was held; pixels may be loaded later."""
    image = Image.open(file)
    if image.format in _ROTATED:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def open_image_folder(settings: ImageFolderSettings, cache: Path | None = None) -> ImageFolder:
    """Open a folder of images."""
    return ImageFolder(settings.folder, settings.side, settings.sizes, settings.caption_column, cache)


class ImageFolder(CroppedImages):
    """Images below a folder: one class for each subfolder, and one for the images directly in the folder.

    See :func:`repa_lab.data.listing.read_image_folder` for what is read and where captions come from.

    Args:
        resolution: pixels along each side.
        buckets: gives each image the size of the nearest aspect; None makes all images square.
        captions: the column of captions in metadata files.
        cache: folder of all caches; images that it knows are not opened before their pixels are needed.

    Raises:
        DataError: there is no folder, no image in it, or metadata cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        resolution: int,
        buckets: Buckets | None = None,
        captions: str | None = None,
        cache: Path | None = None,
    ) -> None:
        images = read_image_folder(folder, captions)
        self._files, unchanged = images.files, stamps(images.files)
        super().__init__(len(images.files), resolution)
        if buckets:
            self.choose_sizes(buckets, cache, unchanged)
        numbers = {name: number for number, name in enumerate(sorted(set(images.classes)))}
        self.num_classes, self.labels = len(numbers), torch.tensor([numbers[name] for name in images.classes])
        self.captions, self.notes = images.captions, images.notes
        key = {"kind": "content/1", "of": unchanged, "listing": fingerprint_images(images, resolution, buckets)}
        self.fingerprint = remembered(cache, key, lambda: fingerprint_content(images, resolution, buckets))

    def open(self, index: int) -> Image.Image:
        """Return an image; see :class:`CroppedImages`."""
        return open_upright(self._files[index])

    def name(self, index: int) -> str:
        """Return an image's file; see :class:`CroppedImages`."""
        return f"the image '{self._files[index]}'"


class TableImages(CroppedImages):
    """Images of the rows of a table; see :func:`repa_lab.data.huggingface.find_columns` for the columns that are read.

    A row without a caption has the empty caption.

    Args:
        rows: a map-style `datasets.Dataset`.
        place: the name of the data set in messages.
        fingerprint: see :class:`ImageSource`.
        resolution: pixels along each side.
        buckets: see :class:`ImageFolder`.
        captions: the column of captions.
        field: the setting that names the table, for errors.
        cache: see :class:`ImageFolder`.

    Raises:
        DataError: there is no column of images, no texts in the column of captions, or a row that cannot be trained on.
    """

    def __init__(
        self,
        rows: Any,
        place: str,
        fingerprint: str,
        resolution: int,
        buckets: Buckets | None,
        captions: str | None,
        field: str = "path",
        cache: Path | None = None,
    ) -> None:
        columns = find_columns(rows.features.to_dict(), place, captions, field)
        table = rows.with_format("arrow")[:]
        require_rows(table, columns, place, field)
        self._column, self._field = columns.image, field
        images, feature = rows.with_format(None).select_columns([columns.image]), rows.features[columns.image]
        self._images = images.cast_column(columns.image, replace(feature, decode=True))
        super().__init__(len(rows), resolution)
        if buckets:
            self.choose_sizes(buckets, cache, fingerprint)
        self.num_classes = columns.classes
        self.labels = torch.zeros(len(rows), dtype=torch.long)
        if columns.label:
            self.labels = torch.from_numpy(table[columns.label].to_numpy().astype(np.int64))
        self.captions = [text or "" for text in table[columns.captions].to_pylist()] if columns.captions else ()
        self.notes = (*columns.notes, *caption_notes(self.captions))
        self.fingerprint = fingerprint

    def open(self, index: int) -> Image.Image:
        """Return the image of a row; see :class:`CroppedImages`."""
        image: Image.Image = self._images[index][self._column]
        return image

    def name(self, index: int) -> str:
        """Return the number of a row and the column of images; see :class:`CroppedImages`."""
        return f"row {index}, column '{self._column}'"


def open_saved(settings: SavedSettings, cache: Path | None = None) -> TableImages:
    """Open a folder that `Dataset.save_to_disk` wrote, and of several splits ``train``."""
    folder, side, sizes = settings.folder, settings.side, settings.sizes
    rows, fingerprint = load_rows(folder), fingerprint_saved(folder, side, sizes)
    return TableImages(rows, str(folder), fingerprint, side, sizes, settings.caption_column, cache=cache)


def open_hub(settings: HubSettings, cache: Path | None = None) -> TableImages:
    """Open a data set of the hub, downloading it unless it is in the cache of `datasets`."""
    data, side, sizes = settings.data, settings.side, settings.sizes
    rows, fingerprint = load_hub_rows(data), data.fingerprint(side, sizes)
    return TableImages(rows, data.name, fingerprint, side, sizes, settings.caption_column, "name", cache)


class DerivedSource:
    """A source whose images are made from those of another, with their labels, captions and frames.

    A subclass has ``read``, as :class:`ImageSource` describes it.

    Args:
        kind: a name of what is made, for the fingerprint.
        decided_by: what decides it beside the other source, as JSON.

    Attributes:
        base: the other source.
    """

    def __init__(self, base: ImageSource, kind: str, **decided_by: Any) -> None:
        self.base = base
        self.channels, self.clip_frames, self.side = base.channels, base.clip_frames, base.side
        self.num_classes, self.labels, self.sizes = base.num_classes, base.labels, base.sizes
        self.captions, self.notes = base.captions, base.notes
        self.fingerprint = digest({"source": kind, "of": base.fingerprint, **decided_by})

    def __len__(self) -> int:
        return len(self.sizes)

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """Return the frames of the images that others are made from; see :class:`ImageSource`."""
        return self.base.frames([int(i) % len(self.base) for i in index])


class Flips(DerivedSource):
    """A source of n images as one of 2n: image n + i is image i mirrored left to right, with its label and caption.

    So latents and features are computed once for each of both versions.
    """

    def __init__(self, base: ImageSource) -> None:
        super().__init__(base, "flips")
        self.labels = torch.cat([base.labels, base.labels])
        self.sizes = torch.cat([base.sizes, base.sizes])
        self.captions = [*base.captions, *base.captions]

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return pixels, mirrored for the second half; see :class:`ImageSource`."""
        images, count = torch.as_tensor(index), len(self.base)
        pixels = self.base.read((images % count).tolist())
        is_mirrored = (images >= count).view(-1, *(1,) * (pixels.ndim - 1))
        return torch.where(is_mirrored, pixels.flip(-1), pixels)


@dataclass(frozen=True)
class Split:
    """Indices of the images that are trained on and of those that are held out, each ascending."""

    train: torch.Tensor
    held_out: torch.Tensor


def split(count: int, holdout: int) -> Split:
    """Hold out ``holdout`` of ``count`` images, the same in every run whatever its seed.

    Raises:
        DataError: nothing would be left to train on.
    """
    if holdout >= count:
        raise DataError("holdout", f"holding out {holdout} of {count} images leaves none to train on")
    order = torch.from_numpy(np.random.default_rng(_SPLIT_SEED).permutation(count))
    return Split(train=order[holdout:].sort().values, held_out=order[:holdout].sort().values)
