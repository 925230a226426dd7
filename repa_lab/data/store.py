"""Arrays computed once per image and kept: safetensors shards under a manifest, built resumably, checked, read by index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from repa_lab.data.errors import DataError
from repa_lab.data.shards import (
    Manifest,
    checksums,
    damaged,
    dtype_name,
    is_whole,
    read_manifest,
    read_rows,
    read_shard,
    shard_path,
    write_manifest,
    write_shard,
)
from repa_lab.files import digest

_SHARD_BYTES = 256 << 20
_SHARD_ROWS = 1024  # small arrays can be slow to compute, and a kill loses a shard
_IN_MEMORY_BYTES = 2 << 30
Progress = Callable[[int, int], None]
Compute = Callable[[torch.Tensor], torch.Tensor]


class ArrayStore:
    """One tensor per image of a source: ``shape`` and ``dtype`` are one tensor's.

    Small stores are held in memory. Of large ones rows are read from disk, and checked when they are first read.

    Args:
        folder: where the shards stand.
        manifest: what they hold.
        values: all tensors ``(n, *shape)``, checked; None reads them from disk.
    """

    def __init__(self, folder: Path, manifest: Manifest, values: torch.Tensor | None) -> None:
        self._folder, self._manifest, self._values = folder, manifest, values
        self.shape, self.dtype = torch.Size(manifest.shape), manifest.torch_dtype
        self._checked = torch.zeros(manifest.count, dtype=torch.bool)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The tensors of the images ``index`` ``(n,)``: ``(n, *shape)``, as they are stored.

        Raises:
            DataError: a shard is damaged.
        """
        if self._values is not None:
            return self._values[index]
        out = torch.empty((len(index), *self.shape), dtype=self.dtype)
        starts = index - index % self._manifest.rows
        for start in starts.unique().tolist():
            out[starts == start] = self._read(start, index[starts == start])
        return out

    def _read(self, start: int, index: torch.Tensor) -> torch.Tensor:
        path = shard_path(self._folder, start)
        values, sums = read_rows(path, index - start)
        new = ~self._checked[index]
        if not torch.equal(checksums(values[new]), sums[new]):
            raise damaged(path)
        self._checked[index] = True
        return values


def open_or_build(
    root: Path,
    identity: Mapping[str, Any],
    count: int,
    compute: Compute,
    batch_size: int = 128,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> ArrayStore:
    """The store of ``identity`` under ``root``; what is missing or damaged is computed; a kill loses one shard.

    Args:
        root: the cache folder; the store's folder in it is named by the hash of ``identity``.
        identity: all that decides the content: data fingerprint, model, preprocessing.
        count: number of images.
        compute: maps indices ``(b,)`` to a tensor ``(b, *shape)``; not called if nothing is missing.
        batch_size: images per call of ``compute``.
        progress: told how many of how many images are done.
        dtype: how tensors are stored; None keeps what ``compute`` gives.
        about: what a person wants to know of the store beside its identity; written into ``about.json``, never read.

    Raises:
        DataError: the folder is another store's, or a value has no place in ``dtype``.
    """
    folder = root / digest(identity)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        manifest = read_manifest(folder, _wanted(identity, count, dtype))
        if manifest is None:  # what one tensor is like, the first ones tell
            head = _stored(compute(torch.arange(min(batch_size, count))), dtype)
            manifest = _describe(head, identity, count)
            compute = _remember(head, compute)
            write_manifest(folder, manifest)
            (folder / "about.json").write_text(json.dumps(about or {}, indent=2) + "\n", encoding="utf-8")
        builder = _Builder(manifest, compute, batch_size, progress, dtype)
        return ArrayStore(folder, manifest, builder.complete(folder))


@dataclass(frozen=True)
class _Builder:
    """Computes the shards of a store that are not there."""

    manifest: Manifest
    compute: Compute
    batch_size: int
    progress: Progress | None
    dtype: torch.dtype | None

    def complete(self, folder: Path) -> torch.Tensor | None:
        """Build what is missing in ``folder``; all values, if they fit in memory."""
        manifest = self.manifest
        if manifest.nbytes > _IN_MEMORY_BYTES:
            for path, span in manifest.shards(folder):
                if not is_whole(path, manifest):
                    write_shard(path, self._values(span), manifest)
            return None
        values = torch.empty((manifest.count, *manifest.shape), dtype=manifest.torch_dtype)
        for path, span in manifest.shards(folder):
            values[span.start : span.stop] = self._shard(path, span)
        return values

    def _shard(self, path: Path, span: range) -> torch.Tensor:
        held = read_shard(path, self.manifest)
        if held is None:
            held = self._values(span)
            write_shard(path, held, self.manifest)
        return held

    def _values(self, span: range) -> torch.Tensor:
        values = torch.empty((len(span), *self.manifest.shape), dtype=self.manifest.torch_dtype)
        for begin in range(span.start, span.stop, self.batch_size):
            end = min(begin + self.batch_size, span.stop)
            part = _stored(self.compute(torch.arange(begin, end)), self.dtype)
            self._require_same(part)
            values[begin - span.start : end - span.start] = part
            if self.progress:
                self.progress(end, self.manifest.count)
        return values

    def _require_same(self, part: torch.Tensor) -> None:
        held, seen = (self.manifest.shape, self.manifest.torch_dtype), (tuple(part.shape[1:]), part.dtype)
        if held != seen:
            raise DataError("source", f"arrays of one cache must be alike: {held} were kept, now there are {seen}")


def _wanted(identity: Mapping[str, Any], count: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the manifest of a store must say; what is left out, the store itself decides."""
    return {"identity": identity, "count": count, **({"dtype": dtype_name(dtype)} if dtype else {})}


def _describe(head: torch.Tensor, identity: Mapping[str, Any], count: int) -> Manifest:
    shape = tuple(head.shape[1:])
    fitting = _SHARD_BYTES // max(1, math.prod(shape) * head.dtype.itemsize)
    return Manifest(identity, dtype_name(head.dtype), shape, count, rows=max(1, min(fitting, _SHARD_ROWS)))


def _remember(head: torch.Tensor, compute: Compute) -> Compute:
    """``compute``, but for the first tensors, which are there."""

    def remembering(index: torch.Tensor) -> torch.Tensor:
        known = int(index[0]) == 0 and len(index) <= len(head)
        return head[: len(index)] if known else compute(index)

    return remembering


def _stored(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return values.cpu()
    stored = values.to(dtype)
    lost = values[values.isfinite() & ~stored.isfinite()]
    if len(lost):
        largest, limit = lost.abs().max().item(), torch.finfo(dtype).max
        message = f"a value of {largest:g} is too large to be kept as {dtype_name(dtype)} (up to {limit:g})"
        raise DataError("encoder_storage", f"{message}; set run.encoder_storage: fp32")
    return stored.cpu()
