"""Image sources: uint8 pixels, class labels, captions where there are any, and the split that keeps images out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image

from repa_lab.data.crop import Buckets, Size, crop, framing, opaque
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import fingerprint_digits
from repa_lab.data.settings import Dataset, DigitsSettings, SourceSettings
from repa_lab.files import digest

_SPLIT_SEED = 0


class ImageSource(Protocol):
    """A fixed, ordered set of labelled images.

    Attributes:
        channels: of the pixels.
        side: pixels along each side of a square image; images of other aspects have about its area.
        sizes: every image's height and width ``(n, 2)``.
        num_classes: of the labels.
        labels: ``(n,)`` int64 in [0, num_classes).
        captions: n texts, or empty.
        notes: what was left out or is missing, a sentence each.
        fingerprint: a key of caches.
    """

    channels: int
    side: int
    sizes: torch.Tensor
    num_classes: int
    labels: torch.Tensor
    captions: Sequence[str]
    notes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Pixels ``(len(index), channels, height, width)``, uint8, of images of one size."""
        ...

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """How images were cut, ``(len(index), 6)``: see :attr:`repa_lab.data.crop.Framing.frame`."""
        ...


class Source:
    """The base of sources of images: a fixed, ordered set of images with labels and captions, if any.

    A subclass has ``__len__``, ``read(index)``, ``sizes`` and ``fingerprint``, as :class:`ImageSource` describes them;
    the rest is given here for images without labels and captions, and may be set.

    Args:
        settings: an instance of ``Settings``.
    """

    Settings: ClassVar[type[SourceSettings]] = SourceSettings

    num_classes = 1
    captions: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    sizes: torch.Tensor
    fingerprint: str

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.channels, self.side = settings, settings.channels, settings.side

    @classmethod
    def describe(cls, settings: Any) -> Dataset:
        """Return what is known of the data set; override it where opening the images takes long."""
        opened: Any = cls(settings)
        return Dataset(opened.fingerprint, len(opened), opened.num_classes, bool(opened.captions), opened.notes)

    @property
    def labels(self) -> torch.Tensor:
        """Class labels ``(n,)``, int64: all 0 unless a subclass says otherwise."""
        return torch.zeros(len(self.sizes), dtype=torch.long)

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """Return how images were cut, ``(len(index), 6)``: not at all."""
        sizes = self.sizes[torch.as_tensor(index)]
        return torch.cat([sizes, torch.zeros_like(sizes), sizes], dim=1)


def groups(sizes: torch.Tensor) -> list[torch.Tensor]:
    """The images of each size, ascending, those of the smallest first; ``sizes`` is ``(n, 2)``."""
    kinds, which = sizes.unique(dim=0, return_inverse=True)
    return [(which == number).nonzero().flatten() for number in range(len(kinds))]


def open_digits(settings: DigitsSettings) -> Digits:
    """Open the digits."""
    return Digits()


class Digits:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, one channel, ten classes; grey levels 0..16 become 0..255."""

    channels, side, num_classes = 1, 8, 10

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # a sixth of what a worker imports, and no other data needs it

        bunch = load_digits()
        self._pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
        self.labels = torch.from_numpy(bunch.target).long()
        self.sizes = torch.full((len(self.labels), 2), self.side)
        self.captions: Sequence[str] = ()
        self.notes: tuple[str, ...] = ()
        self.fingerprint = fingerprint_digits()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return self._pixels[torch.as_tensor(index)]

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return torch.tensor([[8, 8, 0, 0, 8, 8]]).expand(len(index), -1)


class Pictures:
    """Images of any size, cropped and resized as they are read: what folders and data sets on disk have in common.

    Args:
        count: how many there are.
        side: pixels along each side of a square image.
        buckets: gives each image the size of the nearest aspect; None makes all of them square.
    """

    channels = 3
    num_classes: int
    labels: torch.Tensor
    captions: Sequence[str]
    notes: tuple[str, ...] = ()
    fingerprint: str

    def __init__(self, count: int, side: int, buckets: Buckets | None) -> None:
        self._count, self.side = count, side
        chosen = [buckets.choose(self._size(i)) for i in range(count)] if buckets else [(side, side)] * count
        self.sizes = torch.tensor(chosen)

    def __len__(self) -> int:
        return self._count

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return torch.stack([self._pixels(int(i)) for i in index])

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return torch.tensor([framing(self._size(int(i)), self._target(int(i))).frame for i in index])

    def open(self, index: int) -> Image.Image:
        """One image as it is on disk.

        Raises:
            DataError: it cannot be read.
        """
        raise NotImplementedError

    def _pixels(self, index: int) -> torch.Tensor:
        with self.open(index) as image:
            pixels = np.array(crop(opaque(image), self._target(index)))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _size(self, index: int) -> Size:
        with self.open(index) as image:
            return image.height, image.width

    def _target(self, index: int) -> Size:
        height, width = self.sizes[index].tolist()
        return height, width


class Flips:
    """A source of n images as one of 2n: image n + i is image i mirrored left to right, with its label and caption.

    What is computed once per image, latents and features, is so computed for both versions.

    Attributes:
        base: the images as they are.
    """

    def __init__(self, base: ImageSource) -> None:
        self.base = base
        self.channels, self.side, self.num_classes = base.channels, base.side, base.num_classes
        self.labels = torch.cat([base.labels, base.labels])
        self.sizes = torch.cat([base.sizes, base.sizes])
        self.captions: Sequence[str] = [*base.captions, *base.captions]
        self.notes = base.notes
        self.fingerprint = digest({"source": "flips", "of": base.fingerprint})

    def __len__(self) -> int:
        return 2 * len(self.base)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        wanted, count = torch.as_tensor(index), len(self.base)
        pixels = self.base.read((wanted % count).tolist())
        return torch.where((wanted >= count).view(-1, 1, 1, 1), pixels.flip(-1), pixels)

    def frames(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`: as of the images that are mirrored."""
        return self.base.frames([int(i) % len(self.base) for i in index])


@dataclass(frozen=True)
class Split:
    """Indices of a source that are trained on, and those that are held out; both ascending, together all."""

    train: torch.Tensor
    held_out: torch.Tensor


def split(count: int, holdout: int) -> Split:
    """Hold out ``holdout`` of ``count`` images, the same ones in every run whatever its seed.

    Raises:
        DataError: nothing would be left to train on.
    """
    if holdout >= count:
        raise DataError("holdout", f"holding out {holdout} of {count} images leaves none to train on")
    order = torch.from_numpy(np.random.default_rng(_SPLIT_SEED).permutation(count))
    return Split(train=order[holdout:].sort().values, held_out=order[:holdout].sort().values)
