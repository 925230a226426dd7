"""A store of arrays on disk: safetensors shards with a checksum for every row, and the manifest that says whose they are."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repa_lab.data.errors import DataError
from repa_lab.files import digest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        identity: all that decides the content.
        dtype: name of the arrays' dtype in torch.
        shape: of one array.
        count: number of arrays, one per image.
        rows: arrays in a shard; the last may have fewer.
    """

    identity: Mapping[str, Any]
    dtype: str
    shape: tuple[int, ...]
    count: int
    rows: int

    @property
    def key(self) -> str:
        """A hash of all that is said here; every shard carries it."""
        return digest(asdict(self))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return self.count * math.prod(self.shape) * self.torch_dtype.itemsize

    def shards(self, folder: Path) -> Iterator[tuple[Path, range]]:
        """The files of the store, and which images each holds."""
        for start in range(0, self.count, self.rows):
            yield shard_path(folder, start), range(start, min(start + self.rows, self.count))


def shard_path(folder: Path, start: int) -> Path:
    """The shard whose first image is ``start``."""
    return folder / f"values-{start:08d}.safetensors"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in torch: ``float16``."""
    return str(dtype).removeprefix("torch.")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` whole or not at all."""
    temporary = folder / f"{MANIFEST}.tmp"
    held = {**asdict(manifest), "checksum": manifest.key}
    temporary.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def read_manifest(folder: Path, wanted: Mapping[str, Any]) -> Manifest | None:
    """The manifest in ``folder``; None if there is none, or none that is whole.

    Args:
        folder: of the store.
        wanted: what the manifest must say, by field.

    Raises:
        DataError: the folder is another store's.
    """
    manifest = _whole_manifest(folder)
    if manifest is None:
        return None
    if differing := _differing(asdict(manifest), wanted):
        message = f"'{folder}' is not the cache of these images and settings, but perhaps a copy of another: "
        raise DataError("source", f"{message}{', '.join(differing)} differ; delete it")
    return manifest


def write_shard(path: Path, values: torch.Tensor, manifest: Manifest) -> None:
    """Write the arrays ``values`` ``(rows, *shape)`` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_file({"values": values, "crc32": checksums(values)}, temporary, metadata={"store": manifest.key})
    temporary.replace(path)


def is_whole(path: Path, manifest: Manifest) -> bool:
    """Whether there is a shard of this store that is not cut short; its header states its length. The rows are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("store") == manifest.key)
    except (OSError, SafetensorError):
        return False


def read_shard(path: Path, manifest: Manifest) -> torch.Tensor | None:
    """All arrays of a shard ``(rows, *shape)``; None if it is missing, another store's, or damaged in any row."""
    if not is_whole(path, manifest):
        return None
    with safe_open(path, framework="pt") as file:
        values: torch.Tensor = file.get_tensor("values")
        sums: torch.Tensor = file.get_tensor("crc32")
    return values if torch.equal(checksums(values), sums) else None


def read_rows(path: Path, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some arrays of a shard, ``(len(rows), *shape)``, and the checksums they should have.

    Raises:
        DataError: the shard is missing or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values, sums = file.get_slice("values"), file.get_tensor("crc32")
            return torch.stack([values[row] for row in rows.tolist()]), sums[rows]
    except (OSError, SafetensorError):
        raise damaged(path) from None


def damaged(path: Path) -> DataError:
    """The error of a shard that cannot be used and cannot be computed again on the spot."""
    return DataError("source", f"the cache file '{path}' is damaged; delete it, and it is computed again")


def checksums(values: torch.Tensor) -> torch.Tensor:
    """CRC-32 of every row of ``values`` ``(n, ...)``: int64 ``(n,)``."""
    return torch.tensor([zlib.crc32(row.reshape(-1).view(torch.uint8).numpy()) for row in values], dtype=torch.int64)


def _whole_manifest(folder: Path) -> Manifest | None:
    try:
        held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = held.pop("checksum")
        manifest = Manifest(**{**held, "shape": tuple(held["shape"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest if manifest.key == checksum else None


def _differing(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The fields that are not as wanted, those of the identity by their own names."""
    ours, theirs = {**wanted, **wanted["identity"]}, {**held, **held["identity"]}
    names = {*wanted, *wanted["identity"], *held["identity"]} - {"identity"}
    return sorted(name for name in names if _json(ours, name) != _json(theirs, name))


def _json(values: Mapping[str, Any], name: str) -> str | None:
    return json.dumps(values[name], sort_keys=True) if name in values else None
