"""What W&B wrote offline for a run, read back from its files (LevelDB's log format, records of W&B's own protocol buffers)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from repa_lab.runs import RunDirectory
from repa_lab.tracking.wandb import offline_folders

BLOCK, HEAD = 32768, 7
FULL, LAST = 1, 4


def records(run: RunDirectory) -> list[Record]:
    """All records of a run, in the order in which they were made; waits for W&B's own process, which writes the files."""
    wandb.teardown()
    return [record for folder in offline_folders(run) for path in folder.glob("*.wandb") for record in _read(path)]


def history(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows that W&B was told, without what it adds to them."""
    rows = [
        {_key(item): json.loads(item.value_json) for item in record.history.item}
        for record in records(run)
        if record.HasField("history")
    ]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def summary(run: RunDirectory) -> dict[str, Any]:
    """What a run's summary ended with."""
    updates = [item for record in records(run) if record.HasField("summary") for item in record.summary.update]
    return {_key(item): json.loads(item.value_json) for item in updates}


def config(record: Record) -> dict[str, Any]:
    """The config of a run's record."""
    return {
        _key(item): json.loads(item.value_json) for item in record.run.config.update if not _key(item).startswith("_")
    }


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _read(path: Path) -> Iterator[Record]:
    content, place, pending = path.read_bytes(), HEAD, b""
    while place < len(content):
        if BLOCK - place % BLOCK < HEAD:  # no head fits into what is left of the block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += HEAD + length
        pending += content[place - length : place]
        if kind in (FULL, LAST):
            yield Record.FromString(pending)
            pending = b""
