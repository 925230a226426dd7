from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.runs.files import Row
from repa_lab.runs.root import TrackingRecord
from repa_lab.tracking import Listener, Listeners
from repa_lab.tracking.wandb import WandbRun

from .server import KEY, Server, serving

METRIC = "fid:inception@16/ode2"
ROWS = [
    {"step": 1, "images": 8, "seconds": 0.1, "loss/total": 0.5},
    {"step": 2, "images": 16, "seconds": 0.2, "loss/total": None},
    {"step": 2, "images": 16, "seconds": 0.2, METRIC: 30.0, "heldout/cka": None},
    {"step": 3, "images": 24, "seconds": 0.3, METRIC: 20.0, "heldout/cka": 0.25},
]
TOLD = WandbRun(TrackingRecord(project="p", entity="us", tags=("slow", "sit")), "arm, seed 3", "mine")
SPEC = {"model": {"family": "sit"}, "regularizer": {"type": "repa"}, "train": {"lr": 0.1, "ema": None}, "seed": 3}


@pytest.fixture
def clean(tmp_path, monkeypatch) -> Iterator[None]:
    """Neither settings of W&B nor a client from before; W&B's client reads its environment once in a process."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(clean, monkeypatch) -> Iterator[Server]:
    """A server of W&B's, and a key for it."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def record(run: RunDirectory, rows: list[Row], state: State, *listeners: Listener) -> list[Row]:
    """Write rows and a state as training does, and let listeners hear of them; return their failures."""
    with RunWriter(run) as writer:
        writer.describe(SPEC, {})
        everyone = Listeners(writer, listeners)
        for row in rows:
            writer.row(row)
            everyone.row(row)
        writer.state(state, rows[-1]["step"])
        everyone.finish(state)
    return [event for event in run.events() if event["event"] == "listener-failed"]


def draw(run: RunDirectory, step: int) -> Path:
    """Write a sample grid."""
    from PIL import Image

    run.samples.mkdir(parents=True, exist_ok=True)
    path = run.samples / f"step-{step:08d}.png"
    Image.new("RGB", (4, 4), (step, 0, 0)).save(path)
    return path


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "abcdef012345")


def numbers(server: Server, run: RunDirectory) -> list[dict]:
    """The metric rows that the server has, without grids and tables."""
    return [row for row in server.history(run.run_id) if not row.keys() & {"samples", "evaluations"}]


def without_none(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if value is not None} for row in rows]
