"""Arrays computed once per image and kept: safetensors shards under a manifest, built resumably, read by index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from repa_lab.data.fingerprint import digest

_SHARD = 4096
_IN_MEMORY_BYTES = 2 << 30
Progress = Callable[[int, int], None]


class ArrayStore:
    """One tensor per image of a source, on disk; small stores are held in memory, large ones read by slice.

    Args:
        folder: where the shards of this content stand.
        count: number of images.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._files = [_shard_path(folder, start) for start in range(0, count, _SHARD)]
        with safe_open(self._files[0], framework="pt") as file:
            first = file.get_slice("values")[:1]
        self.shape, self.dtype = first.shape[1:], first.dtype
        fits = first.nbytes * count <= _IN_MEMORY_BYTES
        self._values = torch.cat([load_file(path)["values"] for path in self._files]) if fits else None

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The tensors of the images ``index`` ``(n,)``: ``(n, *shape)``."""
        if self._values is not None:
            return self._values[index]
        out = torch.empty((len(index), *self.shape), dtype=self.dtype)
        for shard in index.div(_SHARD, rounding_mode="floor").unique().tolist():
            rows = (index.div(_SHARD, rounding_mode="floor") == shard).nonzero().flatten()
            with safe_open(self._files[shard], framework="pt") as file:
                values = file.get_slice("values")
                for row in rows.tolist():
                    out[row] = values[int(index[row]) % _SHARD]
        return out


def open_or_build(
    root: Path,
    identity: Mapping[str, Any],
    count: int,
    compute: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = 128,
    progress: Progress | None = None,
) -> ArrayStore:
    """The store of ``identity`` under ``root``; what is missing is computed, shard by shard, so that a kill loses one shard.

    Args:
        root: the cache folder; the store's folder in it is named by the hash of ``identity``.
        identity: all that decides the content: data fingerprint, model, preprocessing.
        count: number of images.
        compute: maps indices ``(b,)`` to a tensor ``(b, *shape)``.
        batch_size: images per call of ``compute``.
        progress: told how many of how many images are done.
    """
    folder = root / digest(identity)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        manifest = folder / "manifest.json"  # for people: what reads a store knows its identity
        if not manifest.exists():
            manifest.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        for path, span in _shards(folder, count):
            if not _is_whole(path, len(span)):
                _build_shard(path, span, compute, batch_size, count, progress)
    return ArrayStore(folder, count)


def is_built(root: Path, identity: Mapping[str, Any], count: int) -> bool:
    """Whether :func:`open_or_build` would find everything there."""
    folder = root / digest(identity)[:16]
    return all(_is_whole(path, len(span)) for path, span in _shards(folder, count))


def _build_shard(
    path: Path,
    span: range,
    compute: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    count: int,
    progress: Progress | None,
) -> None:
    values = torch.empty(0)
    for begin in range(span.start, span.stop, batch_size):
        end = min(begin + batch_size, span.stop)
        part = compute(torch.arange(begin, end))
        if begin == span.start:  # one allocation: a shard of a large encoder's features is gigabytes
            values = torch.empty((len(span), *part.shape[1:]), dtype=part.dtype)
        values[begin - span.start : end - span.start] = part
        if progress:
            progress(end, count)
    temporary = path.with_suffix(".tmp")
    save_file({"values": values}, temporary)
    temporary.replace(path)


def _is_whole(path: Path, rows: int) -> bool:
    """The header of a safetensors file states its length, so a truncated file does not open."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.get_slice("values").get_shape()[0] == rows)
    except SafetensorError:
        return False


def _shards(folder: Path, count: int) -> Iterator[tuple[Path, range]]:
    for start in range(0, count, _SHARD):
        yield _shard_path(folder, start), range(start, min(start + _SHARD, count))


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"values-{start:08d}.safetensors"
