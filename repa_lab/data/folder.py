"""A folder of images: one class per subfolder, captions from a list beside them or a text file beside each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from repa_lab.data.crop import Buckets
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import captions_file, fingerprint_content, image_files
from repa_lab.data.sources import Pictures

# Formats of cameras, which note how they were held; others would have to be decoded to look for such a note.
_ROTATED = ("JPEG", "MPO", "TIFF", "WEBP")


class ImageFolder(Pictures):
    """Images below a folder; those directly in it belong to one class. Each is cropped and resized as the papers' data was.

    Captions are those of ``metadata.jsonl`` (``file_name``, ``text``), the Hugging Face layout, or else of text files that are
    called as the images are (``cat.png``, ``cat.txt``), the layout of most trainers. Where there is none it is empty.

    Args:
        folder: the folder.
        resolution: pixels along each side.
        buckets: see :class:`Pictures`.

    Raises:
        DataError: no folder, no images, an image that cannot be read, or captions that name missing files.
    """

    def __init__(self, folder: Path, resolution: int, buckets: Buckets | None = None) -> None:
        self._files = image_files(folder)
        super().__init__(len(self._files), resolution, buckets)
        classes = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self._files]
        numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
        self.num_classes = len(numbers)
        self.labels = torch.tensor([numbers[name] for name in classes])
        self.captions = _listed(folder, self._files) or _beside(self._files)
        self.fingerprint = fingerprint_content(folder, resolution, buckets)

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


def _listed(folder: Path, files: Sequence[Path]) -> Sequence[str]:
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


def _beside(files: Sequence[Path]) -> Sequence[str]:
    texts = [_text(captions_file(path)) for path in files]
    return texts if any(texts) else ()


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8-sig").strip()  # Windows' editors mark UTF-8
    except (OSError, ValueError) as error:
        raise DataError("path", f"cannot read the caption '{path}': {error}") from None
