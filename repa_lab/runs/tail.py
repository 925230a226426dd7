"""Following a run's rows while another process writes them."""

from __future__ import annotations

import json

from repa_lab.runs.directory import RunDirectory
from repa_lab.runs.files import Row


class RowTail:
    """Yields each metric row of a run once, as it appears; a rewound file is read again from its start."""

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.path / "metrics.jsonl"
        self._offset = 0
        self._inode = 0

    def new_rows(self) -> list[Row]:
        """The complete rows that were not seen before."""
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self._offset += len(complete) + 1 if complete else 0
        return [json.loads(line) for line in complete.splitlines()]
