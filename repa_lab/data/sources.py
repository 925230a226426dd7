"""Image sources: uint8 pixels, class labels, captions where there are any, and the split that keeps images out of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from repa_lab.data.fingerprint import DataError, digest, fingerprint_content, fingerprint_digits, image_files

_SPLIT_SEED = 0


class ImageSource(Protocol):
    """A fixed, ordered set of labelled images of one size.

    ``labels`` is ``(n,)`` int64 in [0, num_classes); ``captions`` has n texts or is empty; ``fingerprint`` is a key of caches.
    """

    channels: int
    side: int
    num_classes: int
    labels: torch.Tensor
    captions: Sequence[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """Pixels ``(len(index), channels, side, side)``, uint8."""
        ...


class Digits:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, one channel, ten classes; grey levels 0..16 become 0..255."""

    channels, side, num_classes = 1, 8, 10

    def __init__(self) -> None:
        bunch = load_digits()
        self._pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
        self.labels = torch.from_numpy(bunch.target).long()
        self.captions: Sequence[str] = ()
        self.fingerprint = fingerprint_digits()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return self._pixels[torch.as_tensor(index)]


class ImageFolder:
    """A folder of images: one class per subfolder, captions from ``metadata.jsonl`` (``file_name``, ``text``) if it is there.

    Images directly in the folder belong to one class. Each is centre-cropped and resized as the papers' data was (see
    :func:`center_crop`).

    Raises:
        DataError: no folder, no images, or captions that name missing files.
    """

    channels = 3

    def __init__(self, folder: Path, resolution: int) -> None:
        self._files = image_files(folder)
        self.side = resolution
        classes = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self._files]
        names = sorted(set(classes))
        self.num_classes = len(names)
        self.labels = torch.tensor([names.index(name) for name in classes])
        self.captions = _captions(folder, self._files)
        self.fingerprint = fingerprint_content(folder, resolution)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        return torch.stack([self._load(self._files[int(i)]) for i in index])

    def _load(self, path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                pixels = np.array(center_crop(_flatten_alpha(image), self.side))
        except OSError as error:
            raise DataError("path", f"cannot read the image '{path}': {error}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1)


class Flips:
    """A source of n images as one of 2n: image n + i is image i mirrored left to right, with its label and caption.

    What is computed once per image, latents and features, is so computed for both versions.
    """

    def __init__(self, base: ImageSource) -> None:
        self._base = base
        self.channels, self.side, self.num_classes = base.channels, base.side, base.num_classes
        self.labels = torch.cat([base.labels, base.labels])
        self.captions: Sequence[str] = [*base.captions, *base.captions]
        self.fingerprint = digest({"source": "flips", "of": base.fingerprint})

    def __len__(self) -> int:
        return 2 * len(self._base)

    def read(self, index: Sequence[int]) -> torch.Tensor:
        """See :class:`ImageSource`."""
        wanted, count = torch.as_tensor(index), len(self._base)
        pixels = self._base.read((wanted % count).tolist())
        return torch.where((wanted >= count).view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """ADM's crop, used by the REPA papers: halve with a box filter while twice too large, then bicubic, then cut the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


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


def _flatten_alpha(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip to white
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "P"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _captions(folder: Path, files: Sequence[Path]) -> Sequence[str]:
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        return ()
    texts: dict[str, str] = {}
    # A caption may hold U+2028 and its like, at which splitlines would cut a row in two.
    for number, line in enumerate(metadata.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts[row["file_name"]] = row["text"]
        except (ValueError, KeyError, TypeError):
            raise DataError("path", f"{metadata}:{number}: expected a JSON object with 'file_name' and 'text'") from None
    names = [path.relative_to(folder).as_posix() for path in files]
    if missing := sorted(texts.keys() - set(names)):
        raise DataError("path", f"{metadata} names '{missing[0]}', which is not in the folder ({len(missing)} such)")
    return [texts.get(name, "") for name in names]
