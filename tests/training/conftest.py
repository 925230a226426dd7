from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from repa_lab.align import Regularizer, Shapes
from repa_lab.orchestration.api import run_one
from repa_lab.runs import RunDirectory, State, checkpoints
from repa_lab.runs.files import Row
from repa_lab.spec import Machine, ResolvedOptions, RunConfig, RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.aligner import build_regularizer
from repa_lab.training.batches import Batch, Images, Steps, open_images
from repa_lab.training.diffusion import Flow
from repa_lab.training.loop import train
from repa_lab.training.model import Labels
from repa_lab.training.resolve import resolved_regularizers
from tests.rounding import DENOISER, rounding

ENCODER = {"name": "efficientnet_lite0", "image_size": 32}
SETTINGS: dict[str, Any] = {
    "model": {"family": "sit", "size": "nano/2"},
    "regularizer": {"type": "repa", "encoder": ENCODER, "projector": {"width": 16}},
    "data": {"source": "digits", "holdout": 97},
    "train": {"steps": 5, "batch_size": 6, "lr": 1e-3, "ema": 0.9},
    "evaluate": {
        "every": 100,
        "samples": 16,
        "sampler": {"steps": 2},
        "extractor": {"name": "efficientnet_lite0"},
    },
}
OPTIONS: dict[str, Any] = {"device": "cpu", "log_every": 1, "wandb": {"mode": "disabled"}}
UNET = {"model.family": "unet", "model.size": "nano"}
SIT_DOWN = {"model.family": "sit_down", "model.size": "nano/2"}
OFF = {"regularizer": {"type": "none"}}
# A step of Adam's first direction is of size lr whatever the gradient, so it shows rounding and not what is computed.
PLAIN_DESCENT = {"train.optimizer": {"type": "SGD"}, "train.lr": 0.05}
# What a forward pass in another order is off by; a few steps of plain descent add less.
PASS = rounding(torch.ones(1), DENOISER)
MEASURED_SPEED = frozenset({"cost/images_per_second", "cost/flops_utilisation", "cost/peak_memory_gib"})


def make_run(seed: int = 0, **settings: Any) -> Run:
    """A tiny run; ``settings`` are laid over it by dotted path."""
    config = copy.deepcopy(SETTINGS)
    for path, value in settings.items():
        *sections, field = path.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return Run(f"run{seed}", RunConfig.model_validate(config), seed)


@dataclass(frozen=True)
class Batches:
    """The batches of a run by their step, as a training step on the CPU gets them."""

    steps: Steps

    def __getitem__(self, step: int) -> Batch:
        return self.steps.draw(self.steps[step])


def make_steps(images: Images, seed: int = 0, part: tuple[int, int] = (0, 1), **settings: Any) -> Batches:
    """The batches of a tiny run on these images, with nothing loaded for targets."""
    labels = Labels(images.source.labels, images.source.num_classes, images.source.num_classes)
    config = make_run(seed, **settings).config
    return Batches(Steps(config, seed, images, partial(Flow().times, config.train.times), labels, part))


def make_regularizer(run: Run, width: int = 64, *dims: int) -> Regularizer:
    """The regularizer that a run trains, for a tap and encoders of these widths."""
    (settings,) = resolved_regularizers(run.config)
    return build_regularizer(settings, Shapes((width,), dims or (12,)), run.seed)


def make_options(**options: Any) -> ResolvedOptions:
    return RunOptions.model_validate({**OPTIONS, **options}).resolved(Machine())


def weights(directory: RunDirectory) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by file and name."""
    found = checkpoints.latest(directory.checkpoints)
    assert found
    tensors = {}
    for path in sorted(found[1].glob("*.safetensors")):
        tensors |= {f"{path.stem}:{name}": value for name, value in load_file(path).items()}
    return tensors


def rows(directory: RunDirectory) -> list[Row]:
    """The metric rows without what is measured of time and memory, which no two runs share."""
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds") and key not in MEASURED_SPEED}
        for row in directory.rows()
    ]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], *, only: str = "") -> None:
    """The tensors whose names begin with ``only`` are equal bit by bit."""
    names = [name for name in first if name.startswith(only)]
    assert names
    assert names == [name for name in second if name.startswith(only)]
    different = [name for name in names if not torch.equal(first[name], second[name])]
    assert not different


def stop_after(steps: int, state: State = State.INTERRUPTED) -> Callable[[], State | None]:
    """A `should_stop` that says so after so many steps of this process."""
    taken = iter(range(1, 10**6))
    return lambda: state if next(taken) == steps else None


def run_to_end(run: Run, directory: RunDirectory, cache: Path, **options: Any) -> RunDirectory:
    assert train(run, directory, make_options(**options), cache) is State.DONE
    return directory


def run_steps(run: Run, directory: RunDirectory, cache: Path, steps: int = 4, **options: Any) -> RunDirectory:
    """Train so many steps, with a checkpoint after the last; nothing is measured, which is what takes the time."""
    assert train(run, directory, make_options(**options), cache, should_stop=stop_after(steps)) is State.INTERRUPTED
    return directory


def write_spec(folder: Path, spec: dict[str, Any], cache: Path | None = None, **options: Any) -> Path:
    """Write a spec of one run into a folder, whose root uses this cache, or one of its own."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
        (folder / "runs" / "cache").symlink_to(cache)
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({**spec, "run": make_options(**options).model_dump(mode="json")}))
    return file


def start_processes(spec: Path, world: int) -> list[BaseProcess]:
    """Train a spec of :func:`write_spec` in processes as torchrun's would.

    They are forked from a server that has torch imported. This process may have started threads of autograd, with which
    a fork of it could not train.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["repa_lab.training.loop", "diffusers"])
    processes = [context.Process(target=_train_as, args=(rank, world, port, spec)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _train_as(rank: int, world: int, port: int, spec: Path) -> None:
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    run_one(spec, None, None, spec.parent / "runs")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Encoder features and reference statistics, computed by the first test that needs them, in whichever process."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "repa-lab-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def images(cache) -> Images:
    return open_images(make_run().config.data, cache)


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Callable[..., RunDirectory]:
    """Runs after some steps, each trained once for all tests of a module; nothing may be written to them."""
    root, runs = tmp_path_factory.mktemp("trained"), {}

    def go(steps: int = 4, options: dict[str, Any] | None = None, **settings: Any) -> RunDirectory:
        key = repr((steps, options, settings))
        if key not in runs:
            directory = RunDirectory(root / str(len(runs)))
            runs[key] = run_steps(make_run(**settings), directory, cache, steps, **(options or {}))
        return runs[key]

    return go


@pytest.fixture
def fresh(tmp_path) -> Callable[[str], RunDirectory]:
    """Run directories by name."""
    return lambda name="run": RunDirectory(tmp_path / "runs" / name)
