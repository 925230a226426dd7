"""What stands in for the real thing in a rehearsal: tiny pipelines and autoencoders, a few images. Written once and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repa_lab.data.layout import IMAGES, read_listing
from repa_lab.data.listing import CAPTION_COLUMNS, read_image_folder
from repa_lab.data.settings import FolderSettings, SourceSettings
from repa_lab.files import digest
from repa_lab.models.facts import Family

_IMAGES = 24
_CLASSES = ("circle", "square")
_COLOURS = ("red", "green", "blue", "orange", "purple", "black")
_SIZES = ((96, 96), (128, 96), (96, 128))  # of generated images, so that there are several aspects


@dataclass(frozen=True)
class Props:
    """Makes them below a folder."""

    folder: Path

    def pipeline(self, family: Family) -> Path:
        """A tiny random pipeline of a family, its denoiser with as many blocks as the released one."""

        def write(folder: Path) -> None:
            from repa_lab.models.tiny import full_depth, write_tiny_pipeline

            write_tiny_pipeline(family, folder, config=full_depth(family))

        return self._once(family.name, write)

    def autoencoder(self) -> Path:
        """A tiny random autoencoder for a denoiser that is trained from scratch on latents."""
        return self._once("vae", _write_autoencoder)

    def tiny_autoencoder(self) -> Path:
        """One that decodes the same latents, of the class of TAESD."""
        return self._once("tae", _write_tiny_autoencoder)

    def images(self, data: SourceSettings) -> dict[str, Any]:
        """Return fields of ``data`` that lead to a few images: of the spec's own where they are here, else generated."""
        own = data.folder if isinstance(data, FolderSettings) and not data.is_unset and data.folder.is_dir() else None
        if own is None or data.source not in _FEW:
            return {"source": "imagefolder", "path": str(self._once("images", _generate))}
        column = getattr(data, "caption_column", None)
        name = f"images-{digest([str(own.resolve()), column])[:12]}"
        path = str(self._once(name, lambda folder: _FEW[data.source](own, folder, column)))
        return {"source": data.source, "path": path, "caption_column": column, **_AS.get(data.source, {})}

    def _once(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            temporary = path.with_name(f".{name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            temporary.rename(path)
        return path.resolve()


def _write_autoencoder(folder: Path) -> None:
    from repa_lab.models.families.parts import kl_autoencoder
    from repa_lab.models.tiny import build_part

    build_part(kl_autoencoder(4, 0.18215)).save_pretrained(folder)


def _write_tiny_autoencoder(folder: Path) -> None:
    from repa_lab.models.pipeline import Part
    from repa_lab.models.tiny import build_part

    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    build_part(Part("diffusers.AutoencoderTiny", {**widths, **counts})).save_pretrained(folder)


def _generate(folder: Path) -> None:
    """Captioned images of two classes and several aspects."""
    from PIL import Image, ImageDraw

    rows = []
    for number in range(_IMAGES):
        kind, colour, (width, height) = _CLASSES[number % 2], _COLOURS[number % 6], _SIZES[number % 3]
        image = Image.new("RGB", (width, height), (40 + 8 * number, 200, 255 - 8 * number))
        draw, box = ImageDraw.Draw(image), (10 + number, 12, 60 + number, 62)
        {"circle": draw.ellipse, "square": draw.rectangle}[kind](box, fill=colour)
        (folder / kind).mkdir(exist_ok=True)
        image.save(folder / kind / f"{number:02d}.png")
        rows.append({"file_name": f"{kind}/{number:02d}.png", "text": f"a {colour} {kind}, number {number}"})
    _write_metadata(folder, rows)


def _write_metadata(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _few_of_folder(own: Path, folder: Path, caption_column: str | None) -> None:
    """Some images of a folder, evenly spaced so that its classes are among them, with their captions."""
    images = read_image_folder(own, caption_column)
    chosen = range(0, len(images.files), max(1, len(images.files) // _IMAGES))[:_IMAGES]
    names = [images.files[index].relative_to(own).as_posix() for index in chosen]
    for index, name in zip(chosen, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images.files[index], folder / name)
    if images.captions:
        column = caption_column or CAPTION_COLUMNS[0]
        captions = [images.captions[index] for index in chosen]
        _write_metadata(folder, [{"file_name": name, column: text} for name, text in zip(names, captions, strict=True)])


def _few_of_dataset(own: Path, folder: Path, caption_column: str | None) -> None:
    from repa_lab.data.arrow import load_rows

    rows = load_rows(own)
    rows.select(range(0, len(rows), max(1, len(rows) // _IMAGES))).save_to_disk(str(folder))


def _few_of_prepared(own: Path, folder: Path, caption_column: str | None) -> None:
    """Images in class folders: their latents are of another VAE than the rehearsal's."""
    listing = read_listing(own)
    for index in listing.sample(_IMAGES):
        target = folder / f"{listing.labels[index]:04d}" / listing.path(IMAGES, index).name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(listing.path(IMAGES, index), target)


_FEW: dict[str, Callable[[Path, Path, str | None], None]] = {
    "imagefolder": _few_of_folder,
    "datasets": _few_of_dataset,
    "repa": _few_of_prepared,
}
_AS = {"repa": {"source": "imagefolder"}}
