"""Copies of a few images of a data set, for rehearsals. Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from repa_lab.data.huggingface import load_rows
from repa_lab.data.layout import IMAGES, read_listing
from repa_lab.data.listing import CAPTION_COLUMNS, read_clips, read_image_folder


def copy_files(source: Path, target: Path, count: int, caption_column: str | None) -> None:
    """Copy evenly spaced images of a folder, so that its classes are among them, with their captions."""
    images = read_image_folder(source, caption_column)
    chosen = range(0, len(images.files), max(1, len(images.files) // count))[:count]
    names = [images.files[index].relative_to(source).as_posix() for index in chosen]
    for index, name in zip(chosen, names, strict=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images.files[index], target / name)
    if images.captions:
        captions = [images.captions[index] for index in chosen]
        write_captions(target, dict(zip(names, captions, strict=True)), caption_column or CAPTION_COLUMNS[0])


def copy_clips(source: Path, target: Path, count: int, frames: int, caption_column: str | None) -> None:
    """Copy evenly spaced clips of a folder with their captions."""
    clips = read_clips(source, frames, caption_column)
    chosen = range(0, len(clips.clips), max(1, len(clips.clips) // count))[:count]
    for file in (file for index in chosen for file in clips.clips[index].files):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if clips.captions:
        captions = {clips.clips[index].path.relative_to(source).as_posix(): clips.captions[index] for index in chosen}
        write_captions(target, captions, caption_column or CAPTION_COLUMNS[0])


def copy_rows(source: Path, target: Path, count: int) -> None:
    """Copy evenly spaced rows of a folder that `save_to_disk` wrote."""
    rows = load_rows(source)
    rows.select(range(0, len(rows), max(1, len(rows) // count))).save_to_disk(str(target))


def copy_prepared(source: Path, target: Path, count: int) -> None:
    """Copy images of a prepared folder into class folders, without their latents."""
    listing = read_listing(source)
    for index in listing.sample(count):
        folder = target / f"{listing.labels[index]:04d}"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(listing.path(IMAGES, index), folder / listing.path(IMAGES, index).name)


def write_captions(folder: Path, captions: Mapping[str, str], column: str) -> None:
    """Write the captions of images, by their names in the folder, as an image folder has them."""
    lines = (json.dumps({"file_name": name, column: caption}) + "\n" for name, caption in captions.items())
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
