"""Sample grids side by side: arms below each other, training from left to right, all of one seed."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from repa_lab.report.results import Results
from repa_lab.report.search import ordered_trials

_MOST_ARMS = 12
_MOST_STEPS = 5
_MOST_WIDE = 640
_MOST_BYTES = 60_000
Grids = Mapping[int, Mapping[int, Path]]


@dataclass(frozen=True)
class Sample:
    """One grid of samples; ``link`` leads to it from the sweep's folder."""

    path: Path
    link: str

    @cached_property
    def data(self) -> str | None:
        """The image as a data URI no wider than a page has room for, None if the file is damaged."""
        try:
            with Image.open(self.path) as image:
                image.load()
                return _data_uri(image)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files
            return None


@dataclass(frozen=True)
class Sheet:
    """The grids of arms that share a baseline.

    Attributes:
        seed: of every run in it.
        steps: the columns.
        rows: by arm, a sample for each step, None where that run has none.
        left_out: how many arms more there are.
    """

    seed: int
    steps: tuple[int, ...]
    rows: Mapping[str, tuple[Sample | None, ...]]
    left_out: int


def sheets(results: Results, folder: Path) -> list[Sheet]:
    """A sheet for every group of arms that share a baseline; arms of a search stand in the order of their trials.

    Args:
        results: of one sweep.
        folder: the sweep's, from which links lead.
    """
    order = {trial["arm"]: place for place, trial in enumerate(ordered_trials(results))}
    groups: dict[str, list[str]] = {}
    for arm, baseline in results.baselines.items():
        referenced = arm in results.baselines.values()
        groups.setdefault(baseline or (arm if referenced else ""), []).append(arm)
    found = (_sheet(sorted(arms, key=lambda arm: order.get(arm, -1)), results, folder) for arms in groups.values())
    return [sheet for sheet in found if sheet is not None]


def _sheet(arms: list[str], results: Results, folder: Path) -> Sheet | None:
    grids = {arm: found for arm in arms if (found := _grids(results, arm))}
    seeds = sorted({seed for by_seed in grids.values() for seed in by_seed})
    if not seeds:
        return None
    seed = max(seeds, key=lambda one: (sum(one in by_seed for by_seed in grids.values()), -one))
    shown = {arm: by_seed[seed] for arm, by_seed in grids.items() if seed in by_seed}
    steps = _spread(sorted({step for by_step in shown.values() for step in by_step}))
    rows = {arm: tuple(_sample(by_step.get(step), folder) for step in steps) for arm, by_step in shown.items()}
    return Sheet(seed, steps, dict([*rows.items()][:_MOST_ARMS]), len(arms) - min(len(rows), _MOST_ARMS))


def _grids(results: Results, arm: str) -> Grids:
    own = results.samples[results.samples["arm"] == arm]
    return {int(seed): dict(zip(rows["step"], rows["path"], strict=True)) for seed, rows in own.groupby("seed")}


def _spread(steps: list[int]) -> tuple[int, ...]:
    """A few of them, evenly, with the first and the last."""
    if len(steps) <= _MOST_STEPS:
        return tuple(steps)
    return tuple(steps[round(place * (len(steps) - 1) / (_MOST_STEPS - 1))] for place in range(_MOST_STEPS))


def _sample(path: Path | None, folder: Path) -> Sample | None:
    return None if path is None else Sample(path, Path(os.path.relpath(path, folder)).as_posix())


def _data_uri(image: Image.Image) -> str:
    if image.width > _MOST_WIDE:
        image = image.convert("RGB").resize(
            (_MOST_WIDE, round(image.height * _MOST_WIDE / image.width)), Image.Resampling.LANCZOS
        )
    kind, content = "png", _encoded(image, "PNG")
    if len(content) > _MOST_BYTES:
        kind, content = "jpeg", _encoded(image.convert("RGB"), "JPEG")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=85)
    return buffer.getvalue()
