"""Sweeps fabricated on disk through the real writers: what the report reads is what training writes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repa_lab.runs import RunsRoot, RunWriter, State, SweepDirectory, SweepManifest

METRIC = "frechet:efficientnet_lite0@500/ode-euler20"
STEPS = (100, 200, 300, 400, 500, 600)


@dataclass
class FakeRun:
    """One run to fabricate: its curve by step, and where it ended."""

    seed: int
    curve: Mapping[int, float]
    state: State = State.DONE
    error: str | None = None
    metric: str = METRIC
    cka: float | None = None
    run_id: str | None = None
    batch_size: int = 64
    flops: float | None = None  # of a step
    protocol: Mapping[str, Any] | None = None


@dataclass
class FakeArm:
    """One arm to fabricate; ``runs`` may hold None for a seed that never started."""

    label: str
    runs: Sequence[FakeRun | int]
    baseline: str | None = None
    levels: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    unmatched: str = ""


Build = Callable[..., SweepDirectory]


@pytest.fixture
def root(tmp_path: Path) -> RunsRoot:
    return RunsRoot(tmp_path / "runs")


@pytest.fixture
def build(root: RunsRoot) -> Build:
    return builder(root)


def builder(root: RunsRoot) -> Build:
    """Write a sweep: ``build(arms, name=..., metric=..., goal=..., targets=..., search=...)``."""

    def build(
        arms: Sequence[FakeArm], name: str = "trial", metric: str = METRIC, goal: str = "min", **extra: Any
    ) -> SweepDirectory:
        recorded = [_record(root, arm) for arm in arms]
        compare = {"metric": metric, "goal": goal, "targets": extra.pop("targets", {})}
        seeds = sorted({run["seed"] for arm in recorded for run in arm["runs"]})
        sweep = root.sweep(name)
        sweep.path.mkdir(parents=True)
        manifest = {"name": name, "question": "Does it help?", "seeds": seeds, "compare": compare, "arms": recorded}
        search = extra.pop("search", None)
        manifest["search"] = _search_record(**search) if search else None
        sweep.record(SweepManifest.model_validate(manifest))
        return sweep

    return build


def _search_record(trials: list[dict[str, Any]], metric: str, goal: str = "min", **others: Any) -> dict[str, Any]:
    """A search's record; one objective is the metric, and the trials' values are those of the metric."""
    objectives = [{"metric": metric, "goal": goal}]
    whole = [
        {"values": {metric: trial["value"]} if trial.get("value") is not None else {}, **trial} for trial in trials
    ]
    return {"metric": metric, "goal": goal, "objectives": objectives, "trials": whole, **others}


def decay(start: float, end: float, rate: float = 150.0, noise: float = 0.0, seed: int = 0) -> dict[int, float]:
    """A convergence curve over STEPS."""
    jitter = np.random.default_rng(seed).normal(0, noise, len(STEPS)) if noise else np.zeros(len(STEPS))
    return {
        step: end + (start - end) * math.exp(-step / rate) + float(j) for step, j in zip(STEPS, jitter, strict=True)
    }


def constant_runs(values: Sequence[float], **facts: Any) -> list[FakeRun]:
    """A run per value, seeds from 0, at that value from step 100 to 600."""
    return [FakeRun(seed, dict.fromkeys(STEPS, value), **facts) for seed, value in enumerate(values)]


@pytest.fixture
def quickstart(build: Build) -> SweepDirectory:
    return build_quickstart(build)


def build_quickstart(build: Build) -> SweepDirectory:
    """Two denoisers, aligned and not, three seeds: what the quick start leaves behind."""
    ends = {
        ("sit", "baseline"): 245.0,
        ("sit", "aligned"): 224.0,
        ("unet", "baseline"): 180.0,
        ("unet", "aligned"): 178.0,
    }
    arms = [_quickstart_arm(denoiser, alignment, end) for (denoiser, alignment), end in ends.items()]
    return build(arms, name="quickstart", targets={METRIC: [260.0, 100.0]})


def _quickstart_arm(denoiser: str, alignment: str, end: float) -> FakeArm:
    aligned = alignment == "aligned"
    runs = [
        FakeRun(
            seed,
            decay(640 + 9 * seed, end + 6 * seed, noise=2.0, seed=seed + 10 * aligned),
            cka=0.5 if aligned else 0.3,
        )
        for seed in range(3)
    ]
    levels = {"denoiser": denoiser, "alignment": alignment}
    config = {"model": {"family": denoiser}, "regularizer": {"type": "repa" if aligned else "none"}}
    return FakeArm(f"{denoiser}, {alignment}", runs, f"{denoiser}, baseline" if aligned else None, levels, config)


def _record(root: RunsRoot, arm: FakeArm) -> dict[str, Any]:
    runs = [_place(root, arm, run) for run in arm.runs]
    matched = {"baseline": arm.baseline, "unmatched": arm.unmatched}
    return {"label": arm.label, "levels": dict(arm.levels), **matched, "runs": runs}


def _place(root: RunsRoot, arm: FakeArm, run: FakeRun | int) -> dict[str, Any]:
    if isinstance(run, int):
        return {"seed": run, "run_id": _identity(arm.label, run)}
    run_id = run.run_id or _identity(arm.label, run.seed)
    if not root.run(run_id).path.exists():
        _write(root, arm, run, run_id)
    return {"seed": run.seed, "run_id": run_id}


def _identity(label: str, seed: int) -> str:
    return hashlib.sha256(f"{label} {seed}".encode()).hexdigest()[:12]


def _write(root: RunsRoot, arm: FakeArm, run: FakeRun, run_id: str) -> None:
    spec = {"model": {"family": "sit"}, "regularizer": {"type": "none"}, "train": {"steps": 600, "batch_size": 64}}
    provenance = {
        "time": "2025-01-01T00:00:00Z",
        "packages": {"repa-lab": "0.1.0", "torch": "2.9.0"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "python": "3.11.7",
        "platform": "Linux",
        "cpus": 2,
    }
    with RunWriter(root.run(run_id)) as writer:
        writer.describe({**spec, **arm.config, "seed": run.seed}, provenance)
        if run.protocol is not None:
            writer.protocols({run.metric: run.protocol})
        for step, value in run.curve.items():
            images = run.batch_size * step
            writer.row({"step": step, "images": images, "seconds": 0.1 * step, "loss/total": 1.0, "grad_norm": 0.5})
            writer.row(
                {
                    "step": step,
                    "images": images,
                    run.metric: value if math.isfinite(value) else None,
                    **_alignment(run, step),
                    **_cost(run, step),
                }
            )
        writer.state(run.state, max(run.curve, default=0), run.error)
    for step in sorted(run.curve)[-2:]:
        _sample(root.run(run_id).samples / f"step-{step:08d}.png", run.seed)


def _alignment(run: FakeRun, step: int) -> dict[str, float]:
    if run.cka is None:
        return {}
    cka = run.cka * (1 - math.exp(-step / 200)) + 0.005 * run.seed
    return {"heldout/cka": cka} | (
        {"heldout/cosine": 1.2 * cka, "heldout/gap": 0.02 + 1e-5 * step} if run.cka > 0.4 else {}
    )


def _cost(run: FakeRun, step: int) -> dict[str, float]:
    if run.flops is None:
        return {}
    flops = {"cost/train_flops": 0.8 * run.flops * step, "cost/encoder_flops": 0.2 * run.flops * step}
    return {**flops, "cost/evaluation_flops": 5.0 * step, "cost/evaluation_seconds": 0.05 * step}


def _sample(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
