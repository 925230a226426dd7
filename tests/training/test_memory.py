"""The estimated memory against what torch's allocator counts in a real step on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from repa_lab.training.costs import cost_of
from repa_lab.training.trainer import Trainer
from tests.training.conftest import SIT_DOWN, UNET, make_options, make_run

UREPA = {"regularizer.type": "urepa"}
WIDE = {"regularizer.projector": {"width": 2048}}


def peak_of_step(trainer: Trainer) -> int:
    """Return the most bytes of tensors that the third step holds at a time, beyond those that it begins with."""
    batches = trainer.batches()
    for batch in itertools.islice(batches, 2):
        trainer.step(batch)
    batch = next(batches)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step(batch)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"train.batch_size": 64}, {}),
        ({"train.batch_size": 16, "model.size": "S/2"}, {}),
        ({"train.batch_size": 64}, {"micro_batch": 16}),
        ({"train.batch_size": 64}, {"gradient_checkpointing": True}),
        ({"train.batch_size": 64, **UNET, **UREPA}, {}),
        ({"train.batch_size": 16, **UNET, **UREPA, "model.size": "S"}, {}),
        ({"train.batch_size": 64, **SIT_DOWN, **UREPA}, {}),
        ({"train.batch_size": 64, **SIT_DOWN, **UREPA}, {"precision": "bf16"}),
        ({"train.batch_size": 64, **WIDE}, {}),
        ({"train.batch_size": 64, **WIDE}, {"precision": "bf16"}),
        ({"train.batch_size": 64, **SIT_DOWN, **UREPA, **WIDE}, {}),
        ({"train.batch_size": 64, **UNET, **UREPA}, {"gradient_checkpointing": True}),
        ({"train.batch_size": 64, **SIT_DOWN, **UREPA}, {"gradient_checkpointing": True}),
    ],
)
def test_the_estimate_is_within_15_percent_of_a_real_step(settings, options, cache: Path):
    chosen = make_options(**options)
    trainer = Trainer(make_run(**settings), chosen, cache)
    held = sum(parameter.nbytes for parameter in trainer.state.ema.live.values()) * 4  # weights, two moments, averages
    found = cost_of(trainer.config, chosen).memory
    assert found.total == pytest.approx(held + peak_of_step(trainer), rel=0.15)
