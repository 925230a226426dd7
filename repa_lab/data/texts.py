"""What texts are encoded to, a file for each: computed once, whichever data sets and runs the text appears in."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repa_lab.data.errors import DataError
from repa_lab.data.store import Progress
from repa_lab.files import digest

Encoded = dict[str, torch.Tensor]
Encode = Callable[[Sequence[str]], Encoded]
_ABOUT = "about.json"
_SUM = "crc32"
_CHECKED_BYTES = 2 << 30


class TextCache:
    """Named tensors of every text, those of one name all of one shape.

    Args:
        root: the cache folder.
        identity: all that decides the content: the text encoders, their weights and precision.
        about: what a person wants to know beside it; written into ``about.json``, never read.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self._folder, self._identity, self._about = root / digest(identity)[:16], dict(identity), dict(about or {})

    def build(self, texts: Iterable[str], encode: Encode, batch_size: int, progress: Progress | None = None) -> None:
        """Encode the texts that are not there, ``batch_size`` at a time; a kill loses one batch.

        Raises:
            DataError: a text is encoded to what is not finite.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / ".lock"):
            missing = self._missing(tuple(dict.fromkeys(texts)))
            about = {**self._identity, **self._about}
            (self._folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            for start in range(0, len(missing), batch_size):
                part = missing[start : start + batch_size]
                encoded = encode(part)
                for row, text in enumerate(part):
                    self._write(text, {name: values[row] for name, values in encoded.items()})
                if progress:
                    progress(start + len(part), len(missing))

    def read(self, texts: Sequence[str]) -> Encoded:
        """What the texts were encoded to: for each name ``(len(texts), ...)``.

        Raises:
            DataError: a text is missing or its file is damaged.
        """
        known = {text: self._read(text) for text in texts}
        rows = [self._found(text, known[text]) for text in texts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _missing(self, texts: Sequence[str]) -> list[str]:
        """The texts that are not there whole; where reading all would take long, damage shows when a text is read."""
        held = sum(path.stat().st_size for path in map(self._path, texts) if path.is_file())
        if held > _CHECKED_BYTES:
            return [text for text in texts if not self._is_whole(text)]
        return [text for text in texts if self._read(text) is None]

    def _is_whole(self, text: str) -> bool:
        try:
            with safe_open(self._path(text), framework="pt") as file:  # its header states its length
                return _SUM in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def _found(self, text: str, row: Encoded | None) -> Encoded:
        if row is None:
            what = f"the cached embedding of {text[:50]!r} is missing or damaged"
            raise DataError("source", f"{what}; delete '{self._path(text)}' and start again")
        return row

    def _path(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, text: str) -> Encoded | None:
        try:
            with safe_open(self._path(text), framework="pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
                return row if (file.metadata() or {}).get(_SUM) == _checksum(text, row) else None
        except (OSError, SafetensorError):
            return None

    def _write(self, text: str, row: Encoded) -> None:
        kept = {name: value.cpu().contiguous().clone() for name, value in row.items()}
        broken = [name for name, value in kept.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            message = f"{text[:50]!r} is encoded to what is not finite ({broken[0]}); use run.encoder_precision: fp32"
            raise DataError("source", message)
        temporary = self._path(text).with_suffix(".tmp")
        save_file(kept, temporary, metadata={_SUM: _checksum(text, kept)})
        temporary.replace(self._path(text))


def _checksum(text: str, row: Encoded) -> str:
    """CRC-32 of the text, and of its tensors' names, types and values."""
    held = zlib.crc32(text.encode())
    for name, value in sorted(row.items()):
        held = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), held)
        held = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, held)
    return str(held)
