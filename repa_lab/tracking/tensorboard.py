"""A run in TensorBoard's files, through accelerate's tracker: curves over steps, sample grids, the resolved settings."""

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
    """Whether TensorBoard's files can be written here."""
    return any(importlib.util.find_spec(package) for package in ("tensorboard", "tensorboardX"))


class TensorBoardListener:
    """Writes a run's rows to ``tensorboard/`` in its directory.

    The files hold nothing of their own, so every start writes them again from the run directory: a run that was killed,
    or that began with steps of another one, has each row once.

    Args:
        run: the run's directory.
        config: the resolved settings.
    """

    def __init__(self, run: RunDirectory, config: dict[str, Any]) -> None:
        self._directory, self._config = run, config
        self._tracker: Any = None

    def row(self, row: Row) -> None:
        """Write a row; what is not a number, as ``None`` for one that was not finite, is left out."""
        if self._tracker is None:
            self._start()  # which writes this row too: it stands in the directory already
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
        self._tracker.log({"spec": _as_code(self._config)}, step=0)
        rows = self._directory.rows()
        for row in rows:
            self._write(row)
        for step, path in self._directory.sample_grids().items():
            if step < rows[-1]["step"]:  # one of a later step was drawn before a kill, and will be drawn again
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


def _as_code(config: dict[str, Any]) -> str:
    """Markdown that shows the settings as they are."""
    return "".join(f"    {line}\n" for line in json.dumps(config, indent=2).splitlines())
