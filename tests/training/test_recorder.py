"""Samples are written beside the steps that follow: nothing waits, and nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest
import torch

from repa_lab.runs import State
from repa_lab.training import loop
from repa_lab.training.evaluate import write_grid
from repa_lab.training.loop import train
from tests.training.conftest import OFF, make_options, make_run


def test_steps_do_not_wait_for_the_samples_to_be_written(cache, fresh, monkeypatch):
    """The writer waits for a step that is taken after the measurement."""
    later, waited = Event(), []

    def write(pixels: torch.Tensor, path: Path) -> None:
        waited.append(later.wait(60))
        write_grid(pixels, path)

    monkeypatch.setattr(loop, "write_grid", write)
    steps = iter(range(1, 100))
    run, directory = make_run(**OFF, **{"evaluate.every": 2, "train.steps": 3}), fresh()
    options = make_options(log_every=100)
    assert train(run, directory, options, cache, should_stop=lambda: next(steps) == 3 and later.set()) is State.DONE
    assert waited == [True, True]
    assert sorted(directory.sample_grids()) == [2, 3]


def test_samples_that_cannot_be_written_fail_the_run(cache, fresh):
    directory = fresh()
    directory.path.mkdir(parents=True)
    directory.samples.write_text("not a folder")
    with pytest.raises(OSError, match="samples"):
        train(make_run(**OFF), directory, make_options(), cache)
    assert directory.state.state is State.FAILED
