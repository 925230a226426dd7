"""Sources: uint8 pixels of images or clips with class labels and captions, mirrored, and split into parts."""

from __future__ import annotations

import functools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from typing_extensions import override

from repa_lab.data import DataError
from repa_lab.data.crop import Size, crop, framing, opaque
from repa_lab.data.folders import fingerprint_saved
from repa_lab.data.huggingface import caption_notes, load_hub, load_saved, read_columns
from repa_lab.data.settings import (
    CaptionedSettings,
    ClipsSettings,
    Dataset,
    DigitsSettings,
    FilesSettings,
    HubSettings,
    SavedSettings,
    SourceSettings,
)
from repa_lab.files import digest, write_text

_SPLIT_SEED = 0
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for images that it cannot read
# Formats of cameras, which note how the camera was held; other formats would have to be decoded to find such a note.
_ROTATED = ("JPEG", "MPO", "TIFF", "WEBP")


class Source(ABC):
    """A fixed, ordered set of images, or of clips, with labels and captions, if any.

    A subclass has ``read``, ``sizes`` and ``fingerprint``. The rest is given here for images without labels and
    captions, and may be set. A source that has latents of its own returns them from ``latents(vae, device)``, as
    :class:`repa_lab.data.latents.Moments`.

    Args:
        settings: an instance of ``Settings``.

    Attributes:
        channels: number of channels of the pixels.
        clip_frames: frames of a clip; 0 for images. Pixels of clips are ``(n, channels, frames, height, width)``.
        side: pixels along each side of a square image; images of other aspects have about its area.
        sizes: height and width of every image ``(n, 2)``.
        num_classes: number of classes.
        captions: n texts, or empty.
        notes: what was left out or is missing, a sentence each.
        fingerprint: a key of caches.
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
        opened = cls(settings)
        return Dataset(opened.fingerprint, len(opened), opened.num_classes, bool(opened.captions), opened.notes)

    def __len__(self) -> int:
        return len(self.sizes)

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """Class labels ``(n,)``, int64 in [0, num_classes): all 0 unless a subclass says otherwise."""
        return torch.zeros(len(self), dtype=torch.long)

    @abstractmethod
    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Return pixels ``(len(index), channels, height, width)``, uint8, of images of one size.

        Raises:
            DataError: an image cannot be read.
        """

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """Return how images were cut, ``(len(index), 6)``: see :attr:`repa_lab.data.crop.Framing.frame`.

        Raises:
            DataError: an image cannot be read.
        """
        sizes = self.sizes[torch.as_tensor(index)]
        return torch.cat([sizes, torch.zeros_like(sizes), sizes], dim=1)


def groups(sizes: torch.Tensor) -> list[torch.Tensor]:
    """Return the images of each size, ascending, those of the smallest size first; ``sizes`` is ``(n, 2)``."""
    kinds, which = sizes.unique(dim=0, return_inverse=True)
    return [(which == number).nonzero().flatten() for number in range(len(kinds))]


def remembered(folder: Path | None, key: Any, compute: Callable[[], Any]) -> Any:
    """Return what ``compute`` returns, as JSON, from a file that is named by all that decides it, or write that file.

    Images that have been looked at once are not opened again, which takes minutes for a million of them. Without a
    folder, the value is computed.
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

        settings = settings or DigitsSettings()
        super().__init__(settings)
        bunch = load_digits()
        self._pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        self.labels = torch.from_numpy(bunch.target).long()
        self.sizes = torch.full((len(bunch.target), 2), self.side)
        self.fingerprint = settings.describe().fingerprint

    @override
    def read(self, index: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._pixels[np.asarray(index)])  # torch takes four times as long for a list


class CroppedImages(Source):
    """The base of sources whose ``count`` images are of any size, cropped and resized as they are read."""

    place = "path"  # the setting that names the data set, for errors

    def __init__(self, settings: SourceSettings, count: int) -> None:
        super().__init__(settings)
        self.sizes = torch.full((count, 2), self.side)
        self._originals = np.zeros((count, 2), dtype=np.int32)  # height and width, 0 if not known yet

    def choose_sizes(self, content: str, cache: Path | None) -> None:
        """Give each image the size of the nearest aspect, if the settings have buckets.

        The sizes of originals are noted in the folder of all caches by ``content``, a digest that differs if they do.
        """
        if (buckets := self.settings.sizes) is None:
            return

        def measure() -> list[Size]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(self._original_size, range(len(self))))

        self._originals[:] = remembered(cache, {"kind": "sizes/1", "of": content}, measure)
        self.sizes = torch.tensor([buckets.choose((height, width)) for height, width in self._originals.tolist()])

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return an image as it is stored; pixels may be loaded later.

        Raises:
            OSError: the image cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what to call an image in errors."""

    @override
    def read(self, index: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._pixels(int(i)) for i in index])

    @override
    def frames(self, index: Sequence[int]) -> torch.Tensor:
        return torch.tensor([framing(self._original_size(int(i)), self._size(int(i))).frame for i in index])

    def _pixels(self, index: int) -> torch.Tensor:
        with self._opened(index) as image:
            pixels = np.array(crop(opaque(image), self._size(index)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _size(self, index: int) -> Size:
        height, width = self.sizes[index].tolist()
        return height, width

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
            raise DataError(self.place, f"cannot read {self.name(index)}: {reason}") from None


def open_upright(file: Path) -> Image.Image:
    """Return the image of a file, turned as its camera was held; pixels may be loaded later."""
    image = Image.open(file)
    if image.format in _ROTATED:
        ImageOps.exif_transpose(image, in_place=True)
    return image


class ImageFolder(CroppedImages):
    """Images below a folder: one class for each subfolder, and one for the images directly in the folder.

    Images that are known in ``cache``, the folder of all caches, are not opened before their pixels are needed.

    Raises:
        DataError: see :func:`repa_lab.data.folders.read_image_folder`.
    """

    def __init__(self, settings: FilesSettings, cache: Path | None = None) -> None:
        self._list = files = settings.list_files()
        super().__init__(settings, len(files.items))
        unchanged = stamps(files.files)
        self.choose_sizes(unchanged, cache)
        numbers = {name: number for number, name in enumerate(sorted(set(files.classes)))}
        self.num_classes, self.labels = len(numbers), torch.tensor([numbers[name] for name in files.classes])
        self.captions, self.notes = files.captions, files.notes
        key = {"kind": "content/1", "of": unchanged, "listing": files.fingerprint(settings.read_as)}
        self.fingerprint = remembered(cache, key, lambda: files.fingerprint(settings.read_as, content=True))

    @override
    def open(self, index: int) -> Image.Image:
        return open_upright(self._list.items[index])

    @override
    def name(self, index: int) -> str:
        return f"the image '{self._list.items[index]}'"


class Clips(ImageFolder):
    """Clips of equally many frames below a folder.

    Raises:
        DataError: see :func:`repa_lab.data.folders.read_clips`.
    """

    def __init__(self, settings: ClipsSettings, cache: Path | None = None) -> None:
        self.clip_frames, self._step = settings.frames, settings.frame_step
        super().__init__(settings, cache)

    @override
    def open(self, index: int) -> Image.Image:
        (first,) = self._read_frames(index, [0])
        return first

    @override
    def name(self, index: int) -> str:
        return f"the clip '{self._list.items[index]}'"

    def _pixels(self, index: int) -> torch.Tensor:
        chosen, size = range(0, self.clip_frames * self._step, self._step), self._size(index)
        with self._opened(index):  # notes the size of the original
            frames = [np.array(crop(opaque(frame), size)) for frame in self._read_frames(index, chosen)]
        return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)

    def _read_frames(self, index: int, chosen: Sequence[int]) -> list[Image.Image]:
        """Return frames of a clip by number: of its images, or of the one animated file or array that it is."""
        clip = self._list.items[index]
        if files := self._list.frames.get(clip):
            return [open_upright(files[number]) for number in chosen]
        if clip.suffix == ".npy":
            array = np.load(clip, mmap_mode="r")
            return [Image.fromarray(array[number]) for number in chosen]
        with Image.open(clip) as animation:
            return [ImageSequence.Iterator(animation)[number].copy() for number in chosen]


class TableImages(CroppedImages):
    """Images of the rows of a table; see :func:`repa_lab.data.huggingface.read_columns` for the columns that are read.

    A row without a caption has the empty caption.

    Args:
        rows: a map-style `datasets.Dataset`.
        name: the name of the data set in messages.
        place: the setting that names the data set, for errors.

    Raises:
        DataError: see :func:`repa_lab.data.huggingface.read_columns`.
    """

    def __init__(
        self, settings: CaptionedSettings, rows: Any, name: str, place: str, fingerprint: str, cache: Path | None
    ) -> None:
        table = rows.with_format("arrow")[:]
        columns = read_columns(rows.features.to_dict(), table, name, settings.caption_column, place)
        images, feature = rows.with_format(None).select_columns([columns.image]), rows.features[columns.image]
        self._images = images.cast_column(columns.image, replace(feature, decode=True))
        super().__init__(settings, len(rows))
        self._column, self.place, self.fingerprint = columns.image, place, fingerprint
        self.choose_sizes(fingerprint, cache)
        self.num_classes = columns.classes
        if columns.label:
            self.labels = torch.from_numpy(table[columns.label].to_numpy().astype(np.int64))
        self.captions = [text or "" for text in table[columns.captions].to_pylist()] if columns.captions else ()
        self.notes = (*columns.notes, *caption_notes(self.captions))

    @override
    def open(self, index: int) -> Image.Image:
        image: Image.Image = self._images[index][self._column]
        return image

    @override
    def name(self, index: int) -> str:
        return f"row {index}, column '{self._column}'"


def open_saved(settings: SavedSettings, cache: Path | None = None) -> TableImages:
    """Open a folder that `Dataset.save_to_disk` wrote, and of several splits ``train``."""
    rows, fingerprint = load_saved(settings.folder), fingerprint_saved(settings.folder, settings.side, settings.sizes)
    return TableImages(settings, rows, str(settings.folder), "path", fingerprint, cache)


def open_hub(settings: HubSettings, cache: Path | None = None) -> TableImages:
    """Open a data set of the hub, downloading it unless it is in the cache of `datasets`."""
    rows = load_hub(settings.name, settings.config, settings.split, settings.commit)
    return TableImages(settings, rows, settings.name, "name", settings.fingerprint, cache)


class DerivedSource(Source):
    """A source whose images are made from those of another, ``base``, with their labels, captions and frames.

    Args:
        kind: a name of what is made, for the fingerprint.
        decided_by: what decides it beside the other source, as JSON.
    """

    def __init__(self, base: Source, kind: str, **decided_by: Any) -> None:
        self.base, self.settings = base, base.settings
        self.channels, self.clip_frames, self.side = base.channels, base.clip_frames, base.side
        self.num_classes, self.labels, self.sizes = base.num_classes, base.labels, base.sizes
        self.captions, self.notes = base.captions, base.notes
        self.fingerprint = digest({"source": kind, "of": base.fingerprint, **decided_by})

    @override
    def frames(self, index: Sequence[int]) -> torch.Tensor:
        return self.base.frames([int(i) % len(self.base) for i in index])


class Flips(DerivedSource):
    """A source of n images as one of 2n: image n + i is image i mirrored left to right, with its label and caption.

    So latents and features are computed once for each of both versions.
    """

    def __init__(self, base: Source) -> None:
        super().__init__(base, "flips")
        self.labels = torch.cat([base.labels, base.labels])
        self.sizes = torch.cat([base.sizes, base.sizes])
        self.captions = [*base.captions, *base.captions]

    @override
    def read(self, index: Sequence[int]) -> torch.Tensor:
        images, count = torch.as_tensor(index), len(self.base)
        pixels = self.base.read((images % count).tolist())
        is_mirrored = (images >= count).view(-1, *(1,) * (pixels.ndim - 1))
        return torch.where(is_mirrored, pixels.flip(-1), pixels)


class LatentFrames(DerivedSource):
    """The frames of clips that stand for the denoiser's: of a clip, every ``stride``-th frame from the first on.

    A causal autoencoder makes a latent frame of the first frame alone, and one of every ``stride`` frames after it.
    Latent frame k is of the frames up to frame ``k * stride``, which is the last of them.
    """

    def __init__(self, clips: Source, stride: int) -> None:
        super().__init__(clips, "latent frames", stride=stride)
        self.clip_frames, self._stride = -(-clips.clip_frames // stride), stride

    @override
    def read(self, index: Sequence[int]) -> torch.Tensor:
        return self.base.read(index)[:, :, :: self._stride]


def as_images(pixels: torch.Tensor) -> torch.Tensor:
    """Return every frame of clips ``(B, C, F, H, W)`` as an image ``(B * F, C, H, W)``, and images as they are."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)


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
