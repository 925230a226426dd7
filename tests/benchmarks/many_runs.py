"""Finished sweeps of any size, fabricated through the real writers: for measuring how commands grow with the number of runs."""

from __future__ import annotations

import io
import math
import random
from unittest.mock import patch

import numpy as np
from PIL import Image

from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot, RunWriter, State, SweepDirectory, checkpoints
from repa_lab.spec import Experiment, load_spec

METRIC = "frechet:efficientnet_lite0@500/ode20"
STEPS = (200, 400, 600)
TARGET = 300.0
_SPEC = {
    "name": "many",
    "question": "How strongly should it be aligned?",
    "model": {"family": "sit", "size": "nano/2"},
    "regularizer": {"type": "repa", "encoder": {"name": "efficientnet_lite0", "image_size": 64}},
    "data": {"source": "digits"},
    "train": {"steps": STEPS[-1]},
    "evaluate": {
        "every": STEPS[0],
        "samples": 500,
        "sampler": {"steps": 20},
        "extractor": {"name": "efficientnet_lite0"},
    },
    "compare": {"baseline": {"regularizer.type": "none"}, "targets": {"frechet": [TARGET]}},
}
_PROVENANCE = {
    "time": "2026-01-01T00:00:00Z",
    "packages": {"repa-lab": "0.1.0", "torch": "2.9.0"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "python": "3.11.7",
    "platform": "Linux",
    "cpus": 2,
}


def experiment(arms: int, seeds: int, name: str = "many") -> Experiment:
    """An experiment of a baseline and ``arms - 1`` weights."""
    baseline = {"label": "baseline", "set": {"regularizer.type": "none"}}
    weights = {"axes": {"regularizer.weight": [place / 1000 for place in range(1, arms)]}} if arms > 1 else {}
    return load_spec({**_SPEC, **weights, "name": name, "include": [baseline], "seeds": seeds})


def write_sweep(root: RunsRoot, arms: int, seeds: int, name: str = "many") -> SweepDirectory:
    """Write the sweep of :func:`experiment`, all of its runs done.

    Each run has six metric rows (three of training, three evaluations), two sample grids and two checkpoints of 4 KiB.
    """
    plan, grid = make_plan(experiment(arms, seeds, name), root), _grid()
    for place, entry in enumerate(plan.runs):
        # Most of the time would be fsync's, and nothing here must survive a loss of power.
        with patch("os.fsync"), RunWriter(root.run(entry.run.run_id)) as writer:
            writer.describe(entry.run.to_json(), {**_PROVENANCE, "options": {"device": "cpu"}, "processes": 1})
            writer.protocols(_protocols(entry.run.seed))
            writer.state(State.RUNNING, 0)
            gain, noise = place // seeds / arms, random.Random(place)
            for step in STEPS:
                _write_step(writer, step, (300 - 60 * gain + noise.gauss(0, 5)) * (1 + 2 * math.exp(-step / 200)))
            for step in STEPS[-2:]:
                _write_files(writer, step, grid)
            writer.state(State.DONE, STEPS[-1])
    sweep = root.sweep(name)
    sweep.record(plan.manifest())
    return sweep


def _write_files(writer: RunWriter, step: int, grid: bytes) -> None:
    writer.run.samples.mkdir(exist_ok=True)
    (writer.run.samples / f"step-{step:08d}.png").write_bytes(grid)
    checkpoints.commit(
        writer.run.checkpoints, step, lambda folder: (folder / "ema.safetensors").write_bytes(bytes(4096))
    )


def _write_step(writer: RunWriter, step: int, value: float) -> None:
    progress = {"step": step, "images": 64 * step, "seconds": 0.1 * step}
    losses = {"loss/total": 1.0, "loss/diffusion": 0.7, "loss/regularizer": 0.3, "grad_norm": 0.5, "lr": 1e-4}
    alignment = {"heldout/cka": 1 - 1e-3 * value, "heldout/cosine": 0.4, "heldout/gap": 0.02}
    costs = {
        **{f"cost/{phase}_flops": 1e9 * step for phase in ("train", "encoder", "evaluation")},
        **{f"cost/{phase}_seconds": 0.01 * step for phase in ("encoder", "evaluation")},
    }
    writer.row({**progress, **losses})
    writer.row({**progress, METRIC: value, **alignment, **costs})


def _protocols(seed: int) -> dict[str, dict[str, object]]:
    shared = {"seed": seed, "versions": {"torch": "2.9.0"}}
    frechet = {"metric": "frechet", "reference": "f" * 64, "real": 1500, "features": 320, "samples": 500}
    aligned = {"block": 2, "timestep": 0.5, "held_out": "a" * 64, "images": 256}
    return {
        METRIC: {**frechet, **shared, "sampler": {"name": "ode-euler", "steps": 20}, "labels": "random"},
        **{f"heldout/{name}": {"metric": name, **aligned, **shared} for name in ("cka", "cosine", "gap")},
    }


def _grid() -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()
