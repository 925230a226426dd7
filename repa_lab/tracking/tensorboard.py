"""A run as TensorBoard files, through accelerate's tracker: curves over steps, sample grids, the resolved settings."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from repa_lab.runs import RunDirectory, State
from repa_lab.runs.files import Row

FOLDER = "tensorboard"


def is_installed() -> bool:
    """Return whether TensorBoard files can be written here."""
    return any(importlib.util.find_spec(package) for package in ("tensorboard", "tensorboardX"))


class TensorBoardListener:
    """Writes a run's rows to ``tensorboard/`` in its directory.

    Every start writes the files again from the run directory, so each row is there once, also after a kill and for a
    run that shares its first steps with another. ``config`` are the resolved settings.
    """

    def __init__(self, run: RunDirectory, config: dict[str, Any]) -> None:
        self._directory, self._config = run, config
        self._tracker: Any = None

    def row(self, row: Row) -> None:
        """Write a row without values that are no numbers, such as ``None`` for one that was not finite."""
        if self._tracker is None:
            self._start()  # writes this row too: it is in the directory already
        else:
            self._write(row)

    def image(self, step: int, path: Path) -> None:
        """Write a sample grid."""
        if self._tracker is None:
            self._start()
        self._show(step, path)

    def finish(self, state: State) -> None:
        """Close the files."""
        if self._tracker is not None:
            self._tracker.finish()

    def _start(self) -> None:
        from accelerate.tracking import TensorBoardTracker  # 1 s

        shutil.rmtree(self._directory.path / FOLDER, ignore_errors=True)
        self._tracker = TensorBoardTracker(FOLDER, self._directory.path)
        self._tracker.start()
        code = "".join(f"    {line}\n" for line in json.dumps(self._config, indent=2).splitlines())  # in Markdown
        self._tracker.log({"spec": code}, step=0)
        rows = self._directory.rows()
        for row in rows:
            self._write(row)
        for step, path in self._directory.sample_grids().items():
            if step < rows[-1]["step"]:  # a later grid was drawn before a kill, and will be drawn again
                self._show(step, path)

    def _write(self, row: Row) -> None:
        values = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        self._tracker.log(values, step=row["step"])

    def _show(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
