"""Tensors that are computed once and kept on disk: one for every image of a source, and the embeddings of texts.

The cache of a source is a folder named by a digest of everything that decides its content:

- ``manifest.json``: the format, that content, the dtype, and the shape of the tensors of each image size;
- ``images.bin``: a record for every image (:data:`RECORD`): how it was cut, a checksum, and whether it is done;
- ``values-HxW.bin``: the tensors of all images of height H and width W, one after the other, to be memory-mapped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repa_lab.data import DataError
from repa_lab.data.sources import ImageSource, groups
from repa_lab.files import digest, replace_atomically

FORMAT = 1
# `frame` is `crop.Framing.frame`; `crc32` covers what the cache holds, the frame and the tensor.
RECORD = np.dtype([("frame", "<i4", (6,)), ("crc32", "<u4"), ("done", "?")])
_MANIFEST, _IMAGES, _CHECKED = "manifest.json", "images.bin", "checked.json"
_ALWAYS_CHECKED_BYTES = 2 << 30
_CHECKED_ROWS = 256

T = TypeVar("T")
Progress = Callable[[int, int], None]
Embeddings = dict[str, torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in torch, such as ``float16``."""
    return str(dtype).removeprefix("torch.")


def encode_batches(
    batches: Iterable[Sequence[int]],
    read: Callable[[Sequence[int]], T],
    finish: Callable[[Sequence[int], T], None],
    readers: int = 1,
    encoders: Executor | None = None,
    ahead: int = 1,
) -> Iterator[Sequence[int]]:
    """Read batches of images in threads ahead of time, encode and write them, and yield each when it is written.

    Args:
        batches: numbers of images.
        read: loads the pixels of a batch.
        finish: encodes what ``read`` returned and writes the result.
        readers: number of threads that read.
        encoders: where ``finish`` runs; None runs it in this thread.
        ahead: number of batches that are begun before the first of them is finished.
    """

    def finish_when_read(batch: Sequence[int], reading: Future[T]) -> Sequence[int]:
        finish(batch, reading.result())
        return batch

    with ThreadPoolExecutor(readers) as pool:
        begun = deque[Callable[[], Sequence[int]]]()
        for batch in batches:
            task = functools.partial(finish_when_read, batch, pool.submit(read, batch))
            begun.append(encoders.submit(task).result if encoders else task)
            if len(begun) > ahead:
                yield begun.popleft()()
        while begun:
            yield begun.popleft()()


@dataclass(frozen=True)
class Manifest:
    """What the cache of a source holds.

    Attributes:
        identity: everything that decides the content.
        count: number of images.
        dtype: name of the tensors' dtype in torch.
        shapes: shape of a tensor by the size of its image, such as ``256x256``.
        about: what helps a person to recognise the cache; never compared.
        format: number of this format.
    """

    identity: Mapping[str, Any]
    count: int
    dtype: str
    shapes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any]
    format: int = FORMAT

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def row_bytes(self, size: str) -> int:
        """Return the number of bytes of the tensor of an image of ``size``."""
        return math.prod(self.shapes[size]) * self.torch_dtype.itemsize

    def seed(self, size: str) -> int:
        """Return the start of all checksums of ``size``: tensors of another cache do not pass for those of this one."""
        return zlib.crc32(f"{digest(self.identity)} {self.dtype} {self.shapes[size]}".encode())


class ArrayCache:
    """One tensor for every image of a source, memory-mapped; images of one size have tensors of one shape.

    Args:
        folder: the folder of the cache, which is complete.
        manifest: what the cache holds.
        sizes: height and width of every image ``(n, 2)``.
    """

    def __init__(self, folder: Path, manifest: Manifest, sizes: torch.Tensor) -> None:
        self._folder, self._manifest, self._sizes = folder, manifest, sizes
        self._file, self._row = torch.empty(len(sizes), dtype=torch.long), torch.empty(len(sizes), dtype=torch.long)
        self._files, self._shapes = list[np.ndarray](), list[torch.Size]()
        for number, members in enumerate(groups(sizes)):
            size = _size_name(sizes[members[0]])
            self._files.append(_map_rows(folder, size, len(members)))
            self._shapes.append(torch.Size(manifest.shapes[size]))
            self._file[members], self._row[members] = number, torch.arange(len(members))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files itself instead of sending it their content."""
        return ArrayCache, (self._folder, self._manifest, self._sizes)

    def shape(self, index: torch.Tensor) -> torch.Size:
        """Return the shape of one tensor of the images ``index`` ``(n,)``, which are of one size."""
        return self._shapes[int(self._file[index[0]])]

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tensors ``(n, *shape)`` of the images ``index`` ``(n,)``, which are of one size."""
        rows = self._files[int(self._file[index[0]])][self._row[index].numpy()]  # NumPy gathers twice as fast as torch
        return torch.from_numpy(rows).view(self._manifest.torch_dtype).view(len(index), *self.shape(index))


def open_cache(
    root: Path,
    identity: Mapping[str, Any],
    source: ImageSource,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = 128,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> ArrayCache:
    """Open the cache of a source, after encoding the images that are missing or damaged.

    Images are encoded in fixed batches, so that interruptions do not change the result; a kill loses one batch.
    Processes that want the same cache wait for each other. Every tensor is checked here, and none when it is read.

    Args:
        root: the folder of all caches of one kind.
        identity: everything that decides the content: fingerprint of the images, model, preprocessing.
        source: the images.
        encode: maps uint8 pixels ``(b, C, H, W)`` to tensors ``(b, *shape)``; not called if nothing is missing.
        batch_size: images that are encoded at a time.
        progress: told how many images are done, of how many.
        dtype: how tensors are stored; None keeps the dtype that ``encode`` returns.
        about: what helps a person to recognise the cache.

    Raises:
        DataError: the folder holds another cache or cannot be written, or a value is too large for ``dtype``.
    """
    folder = root / digest({"format": FORMAT, **identity})[:16]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        manifest = _read_manifest(folder, {"format": FORMAT, "count": len(source)}, identity, dtype)
        manifest = manifest or Manifest(identity, len(source), dtype_name(dtype) if dtype else "", {}, about or {})
        builder = _Builder(folder, manifest, source, encode, dtype)
        builder.complete(batch_size, progress)
        return ArrayCache(folder, builder.manifest, source.sizes)


class _Builder:
    """Encodes the images of a source that a cache lacks, while this process holds the lock of the cache."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        source: ImageSource,
        encode: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        self.manifest = manifest
        self._folder, self._source, self._encode, self._dtype = folder, source, encode, dtype
        self._members = {_size_name(source.sizes[members[0]]): members for members in groups(source.sizes)}
        self._row = {image: row for members in self._members.values() for row, image in enumerate(members.tolist())}
        self._records = self._read_records()

    def complete(self, batch_size: int, progress: Progress | None) -> None:
        """Encode what is missing; the first batch of each size shows the shape of its tensors."""
        unknown = [members for size, members in self._members.items() if size not in self.manifest.shapes]
        self._encode_all([members[:batch_size] for members in unknown], progress)
        self._check()
        batches = [batch for members in self._members.values() for batch in members.split(batch_size)]
        self._encode_all([batch for batch in batches if not self._records["done"][batch].all()], progress)
        if self._is_large:
            _write_json(self._folder / _CHECKED, self._stamps())

    def _encode_all(self, batches: Iterable[torch.Tensor], progress: Progress | None) -> None:
        for _ in encode_batches([batch.tolist() for batch in batches], self._read, self._finish):
            if progress:
                progress(int(self._records["done"].sum()), len(self._records))

    def _read(self, batch: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
        return self._source.read(batch), self._source.frames(batch).numpy().astype("<i4")

    def _finish(self, batch: Sequence[int], loaded: tuple[torch.Tensor, np.ndarray]) -> None:
        """Encode a batch and write the tensors that are missing; only then are the images marked as done."""
        pixels, frames = loaded
        values, size = _stored(self._encode(pixels), self._dtype), _size_name(self._source.sizes[batch[0]])
        with _writing(self._folder):
            self._require_shape(size, values)
            data, seed = values.reshape(len(batch), -1).view(torch.uint8).numpy(), self.manifest.seed(size)
            missing = [(number, image) for number, image in enumerate(batch) if not self._records["done"][image]]
            with _values_file(self._folder, size).open("r+b") as file:
                for number, image in missing:
                    file.seek(self._row[image] * data.shape[1])
                    file.write(data[number])
            with (self._folder / _IMAGES).open("r+b") as file:
                for number, image in missing:
                    self._records[image] = frames[number], _checksum(data[number], frames[number], seed), True
                    file.seek(image * RECORD.itemsize)
                    file.write(self._records[image].tobytes())

    def _require_shape(self, size: str, values: torch.Tensor) -> None:
        """Note the shape of the first tensors of a size, and refuse those that differ from it."""
        shape, dtype = tuple(values.shape[1:]), dtype_name(values.dtype)
        if size not in self.manifest.shapes and self.manifest.dtype in ("", dtype):
            shapes = {**self.manifest.shapes, size: shape}
            self.manifest = replace(self.manifest, dtype=dtype, shapes=shapes)
            content = asdict(self.manifest)
            _write_json(self._folder / _MANIFEST, {**content, "sha256": digest(content)})
            self._resize(size)
        expected = self.manifest.shapes.get(size, shape), self.manifest.dtype
        if (shape, dtype) != expected:
            message = f"tensors of one cache must be alike: {expected} were stored, now there are {(shape, dtype)}"
            raise DataError("source", message)

    def _resize(self, size: str) -> None:
        """Give the file of a size its length; what is new in the file is zeros, which no checksum fits."""
        path, length = _values_file(self._folder, size), len(self._members[size]) * self.manifest.row_bytes(size)
        if not path.is_file() or path.stat().st_size != length:
            with path.open("ab") as file:
                file.truncate(length)

    def _read_records(self) -> np.ndarray:
        """Return the records of all images; an image whose size is not as recorded is not done."""
        path, count = self._folder / _IMAGES, len(self._source)
        if not path.is_file() or path.stat().st_size != count * RECORD.itemsize:
            with _writing(self._folder):
                replace_atomically(path, lambda new: new.write_bytes(bytes(count * RECORD.itemsize)))
        records = np.fromfile(path, RECORD)
        records["done"] &= (records["frame"][:, 4:] == self._source.sizes.numpy()).all(1)
        return records

    def _check(self) -> None:
        """Compare every tensor that is done with its checksum, in threads; one that differs is not done."""
        with _writing(self._folder):
            for size in self._members:
                self._resize(size)
        if self._is_large and self._is_unchanged():
            return
        with ThreadPoolExecutor() as pool:
            for size, members in self._members.items():
                data, rows = (
                    _map_rows(self._folder, size, len(members)),
                    torch.arange(len(members)).split(_CHECKED_ROWS),
                )
                check = functools.partial(self._check_rows, data, members, self.manifest.seed(size))
                list(pool.map(check, rows))

    def _check_rows(self, data: np.ndarray, members: torch.Tensor, seed: int, rows: torch.Tensor) -> None:
        for row, image in zip(rows.tolist(), members[rows].tolist(), strict=True):
            record = self._records[image]
            if record["done"]:
                record["done"] = _checksum(data[row], record["frame"], seed) == record["crc32"]

    @property
    def _is_large(self) -> bool:
        sizes = self._members.items()
        return sum(len(members) * self.manifest.row_bytes(size) for size, members in sizes) > _ALWAYS_CHECKED_BYTES

    def _stamps(self) -> dict[str, list[int]]:
        files = [self._folder / _IMAGES, *(_values_file(self._folder, size) for size in self._members)]
        return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}

    def _is_unchanged(self) -> bool:
        """Return whether no file has changed since the last check; a large cache is then not read whole again."""
        try:
            return bool(json.loads((self._folder / _CHECKED).read_text()) == self._stamps())
        except (OSError, ValueError):
            return False


def _read_manifest(
    folder: Path, wanted: Mapping[str, Any], identity: Mapping[str, Any], dtype: torch.dtype | None
) -> Manifest | None:
    """Return the manifest of a cache, or None if there is none that is whole.

    Raises:
        DataError: the folder is another cache's.
    """
    try:
        content = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if content.pop("sha256") != digest(content):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    expected = {**wanted, **({"dtype": dtype_name(dtype)} if dtype else {}), **identity}
    present = {name: content.get(name) for name in ("format", "count", "dtype")} | dict(content.get("identity", {}))
    names = sorted({*expected, *content.get("identity", {})})
    differing = [name for name in names if digest(expected.get(name)) != digest(present.get(name))]
    if differing:
        message = f"'{folder}' is not the cache of these images and settings, but perhaps a copy of another: "
        raise DataError("source", f"{message}{', '.join(differing)} differ; delete it")
    shapes = {size: tuple(shape) for size, shape in content["shapes"].items()}
    return Manifest(**{**content, "shapes": shapes})


def _stored(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return tensors on the CPU in the dtype that they are stored in.

    Raises:
        DataError: a value is too large for the dtype.
    """
    if dtype is None:
        return values.cpu().contiguous()
    stored = values.to(dtype)
    lost = values[values.isfinite() & ~stored.isfinite()]
    if len(lost):
        largest, limit = lost.abs().max().item(), torch.finfo(dtype).max
        message = f"a value of {largest:g} is too large to be stored as {dtype_name(dtype)} (up to {limit:g})"
        raise DataError("encoder_storage", f"{message}; set run.encoder_storage: fp32")
    return stored.cpu().contiguous()


def _checksum(values: np.ndarray, frame: np.ndarray, seed: int) -> int:
    return zlib.crc32(values.data, zlib.crc32(frame.tobytes(), seed))


def _size_name(size: torch.Tensor) -> str:
    return "x".join(map(str, size.tolist()))


def _values_file(folder: Path, size: str) -> Path:
    return folder / f"values-{size}.bin"


def _map_rows(folder: Path, size: str, count: int) -> np.ndarray:
    """Map the file of a size for reading: the bytes of ``count`` tensors ``(count, bytes)``."""
    return np.asarray(np.memmap(_values_file(folder, size), np.uint8, "r").reshape(count, -1))


def _write_json(path: Path, content: Any) -> None:
    replace_atomically(path, lambda new: new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a full disk and the like into one line; what is done is kept."""
    try:
        yield
    except OSError as error:
        message = f"cannot write the cache '{folder}': {error.strerror or error}"
        raise DataError("source", f"{message}; mend this and start again, and what is done is kept") from None


class TextCache:
    """Named tensors for every text, in a file each, whichever data sets and runs the text appears in.

    Tensors of one name have one shape.

    Args:
        root: the folder of all caches of texts.
        identity: everything that decides the content: the text encoders, their weights and precision.
        about: what helps a person to recognise the cache; written into ``about.json`` beside the identity.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self._folder, self._about = root / digest(identity)[:16], {**identity, **(about or {})}

    def build(
        self,
        texts: Iterable[str],
        encode: Callable[[Sequence[str]], Embeddings],
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        """Encode the texts that are missing, ``batch_size`` at a time; a kill loses one batch.

        Raises:
            DataError: an embedding is not finite.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / ".lock"):
            missing = self._missing(tuple(dict.fromkeys(texts)))
            _write_json(self._folder / "about.json", self._about)
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                embeddings = encode(batch)
                for row, text in enumerate(batch):
                    self._write(text, {name: values[row] for name, values in embeddings.items()})
                if progress:
                    progress(start + len(batch), len(missing))

    def read(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of texts: for each name a tensor ``(len(texts), ...)``.

        Raises:
            DataError: the embedding of a text is missing or damaged.
        """
        embeddings = dict[str, Embeddings]()
        for text in dict.fromkeys(texts):
            if (embedding := self._read(text)) is None:
                message = f"the cached embedding of {text[:50]!r} is missing or damaged"
                raise DataError("source", f"{message}; delete '{self._path(text)}' and start again")
            embeddings[text] = embedding
        return {name: torch.stack([embeddings[text][name] for text in texts]) for name in embeddings[texts[0]]}

    def _missing(self, texts: Sequence[str]) -> list[str]:
        """Return the texts without a whole file; where reading all takes long, damage shows when a text is read."""
        if sum(path.stat().st_size for path in map(self._path, texts) if path.is_file()) > _ALWAYS_CHECKED_BYTES:
            return [text for text in texts if not self._has_header(text)]
        return [text for text in texts if self._read(text) is None]

    def _has_header(self, text: str) -> bool:
        try:
            with safe_open(self._path(text), framework="pt") as file:  # the header states the length of the file
                return "crc32" in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def _path(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, text: str) -> Embeddings | None:
        try:
            with safe_open(self._path(text), framework="pt") as file:
                embedding = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
                return embedding if (file.metadata() or {}).get("crc32") == _text_checksum(text, embedding) else None
        except (OSError, SafetensorError):
            return None

    def _write(self, text: str, embedding: Embeddings) -> None:
        stored = {name: value.cpu().contiguous().clone() for name, value in embedding.items()}
        broken = [name for name, value in stored.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            message = f"{text[:50]!r} is encoded to what is not finite ({broken[0]}); use run.encoder_precision: fp32"
            raise DataError("source", message)
        temporary = self._path(text).with_suffix(".tmp")
        save_file(stored, temporary, metadata={"crc32": _text_checksum(text, stored)})
        temporary.replace(self._path(text))


def _text_checksum(text: str, embedding: Embeddings) -> str:
    """Return the CRC-32 of a text and of the names, dtypes, shapes and values of its tensors."""
    checksum = zlib.crc32(text.encode())
    for name, value in sorted(embedding.items()):
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return str(checksum)
