"""Tensors that are computed once and kept on disk: one for every image of a source, and the embeddings of texts.

A cache is a folder named by a digest of everything that decides its content. Its tensors lie one after the other in
files that are memory-mapped, beside a record with a checksum for each image or text. Tensors are checked when the cache
is opened for building, whole files in threads, and not again when they are read.

- the cache of a source: ``manifest.json``, ``images.bin`` (:data:`RECORD`), and ``values-HxW.bin`` with the tensors of
  all images of height H and width W;
- the cache of texts: ``manifest.json``, ``texts.bin`` (:data:`TEXT_RECORD`), and ``NAME.bin`` for each named tensor.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from repa_lab.data import DataError
from repa_lab.data.rows import (
    Rows,
    bytes_of,
    checksums,
    dtype_name,
    is_checked,
    locked,
    note_checked,
    read_manifest,
    write_manifest,
    writing,
)
from repa_lab.data.sources import Source, groups
from repa_lab.files import digest, replace_atomically

FORMAT = 1
# `frame` is `crop.Framing.frame`; `crc32` covers what the cache holds, the frame and the tensor.
RECORD = np.dtype([("frame", "<i4", (6,)), ("crc32", "<u4"), ("done", "?")])
# `text` is the SHA-256 of a text; `crc32` covers it and the text's tensors.
TEXT_RECORD = np.dtype([("text", "V32"), ("crc32", "<u4")])
READERS = min(8, os.cpu_count() or 1)
_IMAGES, _TEXTS = "images.bin", "texts.bin"
_ALWAYS_CHECKED_BYTES = 2 << 30  # larger caches are compared with their checksums only if their files have changed

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
Progress = Callable[[int, int], None]
Embeddings = dict[str, torch.Tensor]


def encode_batches(
    batches: Iterable[A],
    read: Callable[[A], B],
    encode: Callable[[B], C],
    write: Callable[[A, C], None],
    readers: int = 1,
    encoders: tuple[Executor, int] | None = None,
) -> Iterator[A]:
    """Read batches of images ahead in threads, encode them, write them behind, and yield each that is written.

    Pillow decodes and resizes images without Python's lock, so threads read as many at a time as processes would.

    Args:
        batches: the numbers of the images of each batch.
        readers: number of threads that read, and of batches that are read ahead.
        encoders: where ``encode`` runs, and on how many batches at a time; None runs it in this thread.
    """

    def encoded(loaded: tuple[A, B]) -> tuple[A, C]:
        return loaded[0], encode(loaded[1])

    def written(batch: tuple[A, C]) -> A:
        write(*batch)
        return batch[0]

    with ThreadPoolExecutor(readers) as reading, ThreadPoolExecutor(1) as writing:
        loaded = _in_order(reading, lambda batch: (batch, read(batch)), batches, readers)
        done = _in_order(encoders[0], encoded, loaded, encoders[1]) if encoders else map(encoded, loaded)
        yield from _in_order(writing, written, done, 1)


def _in_order(pool: Executor, function: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """Yield the results of a function in order; ``ahead`` items are begun before the first result is waited for."""
    begun = deque[Future[B]]()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


class ArrayCache:
    """One tensor for every image of a source, memory-mapped; images of one size have tensors of one shape."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._arguments = folder, manifest
        self._frames = np.fromfile(folder / _IMAGES, RECORD)["frame"]
        sizes = torch.from_numpy(self._frames[:, 4:].copy())
        self._file, self._row = np.empty(len(sizes), dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
        self._files = list[Rows]()
        for number, members in enumerate(groups(sizes)):
            self._files.append(_values(folder, manifest, _size_name(sizes[members[0]]), len(members)))
            self._files[-1].bytes  # noqa: B018  maps the file now
            self._file[members.numpy()], self._row[members.numpy()] = number, np.arange(len(members))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files itself instead of sending it their content."""
        return ArrayCache, self._arguments

    def shape(self, index: torch.Tensor) -> torch.Size:
        """Return the shape of one tensor of the images ``index`` ``(n,)``, which are of one size."""
        return self._files[int(self._file[index[0]])].shape

    def frames(self, index: torch.Tensor) -> torch.Tensor:
        """Return how the images ``index`` ``(n,)`` were cut, ``(n, 6)``; see :meth:`Source.frames`."""
        return torch.from_numpy(self._frames[index.numpy()]).long()

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Return the tensors ``(n, *shape)`` of the images ``index`` ``(n,)``, which are of one size.

        Raises:
            DataError: a file has been cut short.
        """
        return self._files[int(self._file[index[0]])][self._row[index.numpy()]]


def open_cache(
    root: Path,
    identity: Mapping[str, Any],
    source: Source,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = 128,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
    readers: int = READERS,
) -> ArrayCache:
    """Open the cache of a source, after encoding the images that are missing or damaged.

    Images are encoded in fixed batches, so that interruptions do not change the result; a kill loses the batches that
    are not written. Processes that want the same cache wait for each other.

    Args:
        root: the folder of all caches of one kind.
        identity: everything that decides the content: fingerprint of the images, model, preprocessing.
        encode: maps uint8 pixels ``(b, C, H, W)`` to tensors ``(b, *shape)``; not called if nothing is missing.
        progress: told how many images are done, of how many.
        about: what helps a person to recognise the cache.
        readers: number of threads that read images.

    Raises:
        DataError: the folder holds another cache or cannot be written.
    """
    folder = root / digest({"format": FORMAT, **identity})[:16]
    with locked(folder):
        manifest = _matching_manifest(folder, identity, len(source)) or {
            "identity": identity,
            "count": len(source),
            "dtype": "",  # that of the first tensor
            "shapes": {},  # of a tensor, by the size of its image, such as 256x256
            "about": about or {},
            "format": FORMAT,
        }
        _Builder(folder, manifest, source, encode, readers).complete(batch_size, progress)
        return ArrayCache(folder, manifest)


class _Builder:
    """Encodes the images of a source that a cache lacks, while this process holds the lock of the cache."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        source: Source,
        encode: Callable[[torch.Tensor], torch.Tensor],
        readers: int,
    ) -> None:
        self._folder, self._manifest, self._source = folder, manifest, source
        self._encode, self._readers = encode, readers
        self._members = {_size_name(source.sizes[members[0]]): members for members in groups(source.sizes)}
        self._row = {image: row for members in self._members.values() for row, image in enumerate(members.tolist())}
        self._images = Rows(folder / _IMAGES, len(source), (RECORD.itemsize,), "uint8")
        self._records = self._read_records()

    def complete(self, batch_size: int, progress: Progress | None) -> None:
        """Encode what is missing; the first batch of each size shows the shape of its tensors."""
        unknown = [members for size, members in self._members.items() if size not in self._manifest["shapes"]]
        self._encode_all([members[:batch_size].tolist() for members in unknown], progress)
        self._check()
        batches = [batch.tolist() for members in self._members.values() for batch in members.split(batch_size)]
        self._encode_all([batch for batch in batches if not self._records["done"][batch].all()], progress)
        note_checked(self._folder, self._files)

    @property
    def _files(self) -> list[Path]:
        return [self._images.path, *(self._values(size).path for size in self._members)]

    def _values(self, size: str) -> Rows:
        return _values(self._folder, self._manifest, size, len(self._members[size]))

    def _seed(self, size: str) -> int:
        """Return the start of all checksums of a size: tensors of another cache do not pass for those of this one."""
        shape = tuple(self._manifest["shapes"][size])
        return zlib.crc32(f"{digest(self._manifest['identity'])} {self._manifest['dtype']} {shape}".encode())

    def _encode_all(self, batches: Sequence[list[int]], progress: Progress | None) -> None:
        is_done = self._records["done"].copy()
        for batch in encode_batches(batches, self._source.read, self._encode, self._write, self._readers):
            is_done[batch] = True
            if progress:
                progress(int(is_done.sum()), len(is_done))

    def _write(self, batch: list[int], encoded: torch.Tensor) -> None:
        """Write the tensors of a batch that are missing; only then are the images marked as done."""
        size, values = _size_name(self._source.sizes[batch[0]]), encoded.cpu().contiguous()
        frames = self._source.frames(batch).numpy().astype("<i4")
        with writing(self._folder):
            self._require_shape(size, values)
            data, seed = bytes_of(values), self._seed(size)
            missing = [(number, image) for number, image in enumerate(batch) if not self._records["done"][image]]
            self._values(size).write((self._row[image], data[number]) for number, image in missing)
            for number, image in missing:
                checksum = zlib.crc32(data[number].data, zlib.crc32(frames[number].tobytes(), seed))
                self._records[image] = frames[number], checksum, True
            self._images.write((image, self._records[image]) for _, image in missing)

    def _require_shape(self, size: str, values: torch.Tensor) -> None:
        """Note the shape of the first tensors of a size, and refuse those that differ from it."""
        shape, dtype, manifest = tuple(values.shape[1:]), dtype_name(values.dtype), self._manifest
        if size not in manifest["shapes"] and manifest["dtype"] in ("", dtype):
            manifest["dtype"], manifest["shapes"] = dtype, {**manifest["shapes"], size: shape}
            write_manifest(self._folder, manifest)
            self._values(size).resize()
        expected = tuple(manifest["shapes"].get(size, shape)), manifest["dtype"]
        if (shape, dtype) != expected:
            message = f"tensors of one cache must be alike: {expected} were stored, now there are {(shape, dtype)}"
            raise DataError("source", message)

    def _read_records(self) -> np.ndarray:
        """Return the records of all images; an image whose size is not as recorded is not done."""
        path, count = self._images.path, len(self._source)
        if not path.is_file() or path.stat().st_size != count * RECORD.itemsize:
            with writing(self._folder):
                replace_atomically(path, lambda new: new.write_bytes(bytes(count * RECORD.itemsize)))
        records = np.fromfile(path, RECORD)
        records["done"] &= (records["frame"][:, 4:] == self._source.sizes.numpy()).all(1)
        return records

    def _check(self) -> None:
        """Compare every tensor that is done with its checksum, in threads; one that differs is not done."""
        with writing(self._folder):
            total = sum(self._values(size).resize() for size in self._members)
        if total > _ALWAYS_CHECKED_BYTES and is_checked(self._folder, self._files):
            return
        for size, members in self._members.items():
            records, seed = self._records[members.numpy()], self._seed(size)
            starts = [zlib.crc32(frame.tobytes(), seed) for frame in records["frame"]]
            is_whole = checksums([self._values(size).bytes], starts) == records["crc32"]
            self._records["done"][members.numpy()] &= is_whole


def _size_name(size: torch.Tensor) -> str:
    return "x".join(map(str, size.tolist()))


def _values(folder: Path, manifest: Mapping[str, Any], size: str, count: int) -> Rows:
    """Return the file of the tensors of all images of a size."""
    return Rows(folder / f"values-{size}.bin", count, manifest["shapes"][size], manifest["dtype"])


def _matching_manifest(folder: Path, identity: Mapping[str, Any], count: int) -> dict[str, Any] | None:
    """Return the manifest of a source's cache, or None if there is none that is whole; refuse another cache's."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    present = {"format": manifest.get("format"), "count": manifest.get("count"), **manifest.get("identity", {})}
    expected = {"format": FORMAT, "count": count, **identity}
    differing = [name for name in {**expected, **present} if digest(expected.get(name)) != digest(present.get(name))]
    if differing:
        message = f"'{folder}' is not the cache of these images and settings, but perhaps a copy of another: "
        raise DataError("source", f"{message}{', '.join(sorted(differing))} differ; delete it")
    return manifest


class TextCache:
    """Named tensors for every text, whichever data sets and runs the text appears in; tensors of a name are alike.

    Args:
        root: the folder of all caches of texts.
        identity: everything that decides the content: the text encoders, their weights and precision.
        about: what helps a person to recognise the cache.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self._folder = root / digest(identity)[:16]
        self._records = self._folder / _TEXTS
        self._manifest: dict[str, Any] = {"identity": identity, "about": about or {}, "format": FORMAT, "tensors": {}}
        self._tensors = dict[str, Rows]()
        self._row = dict[bytes, int]()  # by the digest of the text

    def build(
        self,
        texts: Iterable[str],
        encode: Callable[[Sequence[str]], Embeddings],
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        """Encode the texts that are missing or damaged, ``batch_size`` at a time; a kill loses one batch.

        Raises:
            DataError: an embedding is not finite, or the folder cannot be written.
        """
        with locked(self._folder):
            self._open(is_building=True)
            missing = [text for text in dict.fromkeys(texts) if _text_digest(text) not in self._row]
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                self._append(batch, encode(batch))
                if progress:
                    progress(start + len(batch), len(missing))
            self._open(is_building=False)
            note_checked(self._folder, [self._records, *(rows.path for rows in self._tensors.values())])

    def read(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of texts: for each name a tensor ``(len(texts), ...)``.

        Raises:
            DataError: the embedding of a text is missing.
        """
        if not self._row:
            self._open(is_building=False)
        rows = [self._row.get(_text_digest(text), -1) for text in texts]
        if -1 in rows:
            message = f"the embedding of {texts[rows.index(-1)][:50]!r} is not in the cache '{self._folder}'"
            raise DataError("source", f"{message}; start again, and it is computed")
        return {name: tensors[np.array(rows)] for name, tensors in self._tensors.items()}

    def _rows(self, count: int) -> dict[str, Rows]:
        """Return the files of the tensors of ``count`` texts, by name."""
        tensors = self._manifest["tensors"].items()
        return {name: Rows(self._folder / f"{name}.bin", count, shape, dtype) for name, (dtype, shape) in tensors}

    def _open(self, is_building: bool) -> None:
        """Map the files; to build, mend their lengths and leave out texts whose tensors do not fit their checksum."""
        manifest = read_manifest(self._folder)
        if manifest is None or digest(manifest["identity"]) != digest(self._manifest["identity"]):
            if is_building:
                self._records.unlink(missing_ok=True)  # nobody knows the shapes of what is recorded there
            return
        self._manifest = manifest
        records = np.fromfile(self._records, TEXT_RECORD) if self._records.is_file() else np.empty(0, TEXT_RECORD)
        if not len(records):
            return
        self._tensors, is_whole = self._rows(len(records)), np.ones(len(records), dtype=bool)
        if is_building:
            with writing(self._folder):
                total = sum(rows.resize() for rows in self._tensors.values())
            files = [self._records, *(rows.path for rows in self._tensors.values())]
            if total <= _ALWAYS_CHECKED_BYTES or not is_checked(self._folder, files):
                starts = [zlib.crc32(text.tobytes()) for text in records["text"]]
                is_whole = checksums([rows.bytes for rows in self._tensors.values()], starts) == records["crc32"]
        self._row = {records["text"][row].tobytes(): int(row) for row in np.flatnonzero(is_whole)}

    def _append(self, texts: Sequence[str], embeddings: Embeddings) -> None:
        """Write the tensors of texts after those that are there; only then are the texts recorded."""
        stored = {name: values.cpu().contiguous() for name, values in embeddings.items()}
        for name, values in stored.items():
            if values.is_floating_point() and not values.isfinite().all():
                broken = next(text for text, row in zip(texts, values, strict=True) if not row.isfinite().all())
                message = f"{broken[:50]!r} is encoded to what is not finite ({name}); use run.encoder_precision: fp32"
                raise DataError("source", message)
        tensors = {name: [dtype_name(values.dtype), list(values.shape[1:])] for name, values in stored.items()}
        with writing(self._folder):
            if not self._manifest["tensors"]:
                self._manifest["tensors"] = tensors
                write_manifest(self._folder, self._manifest)
            if tensors != self._manifest["tensors"]:
                message = f"tensors of all texts must be alike: {self._manifest['tensors']} were stored, not {tensors}"
                raise DataError("source", message)
            size = TEXT_RECORD.itemsize
            first = self._records.stat().st_size // size if self._records.is_file() else 0
            data = {name: bytes_of(stored[name]) for name in self._manifest["tensors"]}
            for name, rows in self._rows(first + len(texts)).items():
                rows.write(enumerate(data[name], first))
            records, digests = np.empty(len(texts), TEXT_RECORD), [_text_digest(text) for text in texts]
            records["text"] = np.frombuffer(b"".join(digests), "V32")
            records["crc32"] = checksums(list(data.values()), list(map(zlib.crc32, digests)))
            Rows(self._records, first + len(texts), (size,), "uint8").write(enumerate(records, first))


def _text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
