"""What a report says of how its numbers came about."""

from __future__ import annotations

import json

import pytest

from repa_lab.report import load_results
from repa_lab.report.text import methods

from .conftest import METRIC, Build, FakeArm, FakeRun

NOTE = "300 images for 1280 features make a covariance singular and bias the distance upward: it ranks arms, no more."


@pytest.mark.parametrize(
    ("protocol", "is_told"),
    [
        ({"samples": 300, "real": 1541, "features": 1280}, True),
        ({"samples": 5000, "real": 300, "features": 1280}, True),
        ({"samples": 1281, "real": 0, "features": 1280}, False),  # a file that does not say how many it is of
        ({"samples": 300, "real": 1541}, False),
    ],
)
def test_too_few_images_for_the_features_are_told(build: Build, protocol, is_told):
    sweep = build([FakeArm("arm", [FakeRun(0, {600: 1.0}, run_id="run")])])
    (sweep.root.run("run").path / "protocols.json").write_text(json.dumps({METRIC: protocol}))
    (line, *_) = methods(load_results(sweep.path))
    assert line.startswith(METRIC)
    assert line.endswith(NOTE) is is_told


@pytest.mark.parametrize(
    ("ema", "told"),
    [
        (
            {"ema": 0.9999},
            ["at decay 0.9999 the measured average still holds 61 % of the initial weights after 5,000 steps"],
        ),
        ({"ema": {"decay": 0.9999, "warmup": True}}, []),
        ({"ema": 0.999}, []),
        ({"ema": "damaged"}, []),
        ({}, []),
    ],
)
def test_an_average_that_still_holds_initial_weights_is_told(build: Build, ema, told):
    settled = FakeArm(
        "settled", [FakeRun(0, {600: 1.0})], config={"train": {"steps": 5000, "ema": {"decay": 0.9, "warmup": True}}}
    )
    arm = FakeArm("arm", [FakeRun(seed, {600: 1.0}) for seed in (0, 1)], config={"train": {"steps": 5000, **ema}})
    lines = [line for line in methods(load_results(build([settled, arm]).path)) if line.startswith("train.ema")]
    assert lines == [f"train.ema: {text}; set train.ema.warmup, or lower the decay." for text in told]
