"""Tiny pipelines and captioned images for tests that train what is pretrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repa_lab.models.families import FAMILIES
from repa_lab.models.tiny import write_tiny_pipeline
from repa_lab.spec import RunConfig
from repa_lab.spec.identity import Run
from repa_lab.training.batches import Images, open_data
from repa_lab.training.device import pick_device
from repa_lab.training.model import encode_captions
from tests.training.conftest import make_options

PRETRAINED = [family.name for family in FAMILIES.values() if family.pipeline]
SIZES = [(96, 64), (64, 96), (80, 80)]  # width, height
FRAMES = 9  # of clips
# Fewest pixels along a side that leave two tokens.
SIDES = {"sana": 64, "sd15": 128, "dit": 128}


def write_images(folder: Path, count: int = 14) -> Path:
    """Captioned images of noise, of three aspects."""
    folder.mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        width, height = SIZES[number % 3]
        coarse = draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": f"picture {number} of noise"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_clips(folder: Path, count: int = 10, frames: int = FRAMES) -> Path:
    """Captioned clips of noise that moves, each a folder of frames."""
    draw, rows = np.random.default_rng(1), []
    for number in range(count):
        wide = Image.fromarray(draw.integers(0, 256, (8, 8 + frames, 3), dtype=np.uint8))
        (folder / f"{number:02d}").mkdir(parents=True)
        for frame in range(frames):
            wide.crop((frame, 0, frame + 8, 8)).resize((64, 64)).save(folder / f"{number:02d}" / f"{frame}.png")
        rows.append({"file_name": f"{number:02d}", "text": f"clip {number} of noise"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_pipeline(family: str, folder: Path) -> Path:
    if not folder.exists():
        write_tiny_pipeline(FAMILIES[family], folder)
    return folder


def make_pretrained_run(family: str, pipeline: Path, images: Path, **settings: Any) -> Run:
    """A tiny run of a pretrained family on images, or clips; ``settings`` are laid over it by dotted path."""
    is_video = FAMILIES[family].is_video
    kind = "crepa" if is_video else "urepa" if FAMILIES[family].kind == "unet" else "repa"
    source = {"source": "clips", "frames": FRAMES} if is_video else {"source": "imagefolder"}
    encoder = {"name": "tiny-dinov2_vitb14", "image_size": 56}
    value: dict[str, Any] = {
        "model": {"family": family, "pretrained": str(pipeline), "train": "lora", "rank": 2},
        "regularizer": {"type": kind, "encoder": encoder, "projector": {"width": 16}},
        "data": {**source, "path": str(images), "resolution": SIDES.get(family, 64), "holdout": 6},
        "train": {"steps": 10, "batch_size": 4, "lr": 1e-2, "ema": 0.5},
        "evaluate": {
            "every": 100,
            "samples": 16,
            "batch_size": 8,
            "sampler": {"steps": 2},
            "extractor": {"name": "efficientnet_lite0"},
        },
    }
    if FAMILIES[family].kind == "transformer":
        value["regularizer"]["block_index"] = 0
    for path, one in settings.items():
        *sections, field = path.split(".")
        place = value
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = one
    return Run(family, RunConfig.model_validate(value), 0)


def open_pretrained(run: Run, cache: Path, **options: Any) -> Images:
    """The data of a run, with its captions encoded, as a sweep prepares it."""
    chosen = make_options(**options)
    images = open_data(run.config, cache, pick_device(chosen))
    encode_captions(run.config.model, images, run.config.evaluate.prompts, chosen, cache, pick_device(chosen))
    return images


def denoiser_folder(pipeline: Path, family: str) -> Path:
    return pipeline / FAMILIES[family].kind
