from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repa_lab.data.crop import Buckets
from repa_lab.data.settings import BucketsConfig, ImageFolderSettings
from repa_lab.data.sources import ImageFolder

Make = Callable[..., Path]


def noise_image(seed: int, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> Image.Image:
    """An image of ``size`` (width, height) that no other seed gives."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def folder_settings(
    root: Path, resolution: int, buckets: Buckets | None = None, captions: str | None = None
) -> ImageFolderSettings:
    """The settings of a folder of images."""
    sizes = buckets and BucketsConfig(step=buckets.step, max_aspect=buckets.max_aspect)
    return ImageFolderSettings(path=str(root), resolution=resolution, buckets=sizes, caption_column=captions)


def image_folder(
    root: Path,
    resolution: int,
    buckets: Buckets | None = None,
    captions: str | None = None,
    cache: Path | None = None,
) -> ImageFolder:
    """The images of a folder."""
    return ImageFolder(folder_settings(root, resolution, buckets, captions), cache)


def content_of(root: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """The fingerprint of a folder's content."""
    return image_folder(root, resolution, buckets).fingerprint


def listing_of(root: Path, resolution: int, buckets: Buckets | None = None) -> str:
    """The fingerprint of a folder's names, sizes and captions."""
    return folder_settings(root, resolution, buckets).describe().fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """Makes a folder of images: names to images, and captions by name if there are any."""

    def make(
        images: Mapping[str, Image.Image], captions: Mapping[str, str] | None = None, name: str = "images"
    ) -> Path:
        root = tmp_path / name
        for file, image in images.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / file)
        if captions is not None:
            rows = (
                json.dumps({"file_name": file, "text": text}, ensure_ascii=False) for file, text in captions.items()
            )
            (root / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return root

    return make
