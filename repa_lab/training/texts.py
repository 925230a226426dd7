"""The captions of a run's images, encoded once by the frozen text encoders of its pretrained pipeline."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from repa_lab.data.cache import Embeddings, Progress, TextCache
from repa_lab.data.errors import DataError
from repa_lab.data.fingerprint import fingerprint_files
from repa_lab.models.family import Family, pipeline_of
from repa_lab.models.pretrained import text_pipeline
from repa_lab.models.released import settings, text_components
from repa_lab.spec import RunOptions
from repa_lab.training.device import PRECISION
from repa_lab.training.images import Images

_TEXTS_AT_ONCE = 16


def text_cache(family: Family, folder: Path, options: RunOptions, cache: Path) -> TextCache:
    """Where captions are kept as this pipeline encodes them."""
    content = {name: fingerprint_files(folder / name) for name in text_components(folder)} | settings(folder)
    identity = {"kind": "texts/1", "family": family.name, "parts": content, "precision": options.encoder_precision}
    return TextCache(cache / "texts", identity, about={"pipeline": str(folder)})


def encode_captions(
    family: Family,
    folder: Path,
    images: Images,
    prompts: Sequence[str],
    options: RunOptions,
    cache: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> None:
    """Encode what is not in the cache: all captions, the prompts and the empty caption. Of a family without text,
    nothing.

    Raises:
        DataError: there are no captions.
        PretrainedError: the text encoders cannot be loaded.
    """
    pipeline = pipeline_of(family)
    if pipeline.encode is None:
        return
    if not any(images.source.captions):
        message = f"{family.name} is trained with captions and there are none: give metadata.jsonl, or a .txt beside each image"
        raise DataError("path", message)
    encode, precision = pipeline.encode, PRECISION[options.encoder_precision]
    loaded = functools.cache(lambda: text_pipeline(folder, precision, device))

    @torch.no_grad()
    def encoded(captions: Sequence[str]) -> Embeddings:
        return encode(loaded(), captions)

    texts = ["", *prompts, *images.source.captions]
    text_cache(family, folder, options, cache).build(texts, encoded, _TEXTS_AT_ONCE, progress)
