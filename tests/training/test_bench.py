"""The ways that `repa-lab bench` compares: that they compute the same thing, and what its numbers are of."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from repa_lab.orchestration.api import bench as bench_spec
from repa_lab.training.costs import cost_of
from repa_lab.training.speed import ReferenceLoop, bench, variants
from repa_lab.training.trainer import Trainer
from tests.training.conftest import OFF, PASS, PLAIN_DESCENT, SETTINGS, UNET, make_options, make_run

UREPA = {**UNET, "regularizer.type": "urepa", "regularizer.manifold_weight": 2.0}


@pytest.mark.parametrize("settings", [{}, UREPA], ids=["repa", "urepa"])
def test_the_papers_way_computes_what_the_lab_does(cache, settings):
    online = {"regularizer.encoder": {"name": "efficientnet_lite0", "image_size": 32, "cache": False}}
    run = make_run(**{**settings, **online, **PLAIN_DESCENT, "train.grad_clip": 0.5})
    lab, reference = (Trainer(run, make_options(), cache) for _ in range(2))
    loop, before = ReferenceLoop(reference), {name: v.clone() for name, v in lab.state.ema.average.items()}
    for batch, same in islice(zip(lab.batches(), reference.batches(), strict=True), 3):
        row = lab.step(batch).row()
        assert loop.step(same) == pytest.approx(
            (row["loss/denoise"], row["loss/aligned"] / row["align/weight"]), rel=PASS
        )
    for name, average in lab.state.ema.average.items():
        torch.testing.assert_close(reference.state.ema.average[name], average, rtol=1e-3, atol=1e-6)
    moved = [name for name, average in lab.state.ema.average.items() if not torch.equal(average, before[name])]
    assert any(name.startswith("regularizer.") for name in moved)
    assert any(name.startswith("denoiser.") for name in moved)


def test_numbers_are_of_the_same_images(cache):
    run = make_run()
    measured = bench(run, make_options(), cache, rounds=2, steps=2)
    ways = {way["name"]: way for way in measured["ways"]}
    plain = ways["plain step"]
    assert plain["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for way in ways.values():
        assert 0 < way["ratio"]["low"] <= way["ratio"]["median"] <= way["ratio"]["high"]
    flops = {name: cost_of(config, make_options()).image_flops for name, config in variants(run.config)}
    assert ways.keys() == {*flops, "the papers' way", "data path alone", "evaluation"}
    for name, of_image in flops.items():
        assert ways[name]["flops_ratio"] == pytest.approx(of_image / flops["plain step"])
        share = of_image * ways[name]["images_per_second"] / measured["matmul_flops"]
        assert ways[name]["flops_utilisation"] == pytest.approx(share)
    assert (
        ways["the papers' way"]["flops_ratio"]
        == ways["online encoder"]["flops_ratio"]
        > ways["cached features"]["flops_ratio"]
        > 1
    )
    assert "flops_ratio" not in ways["data path alone"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [(OFF, ["plain step"]), ({"regularizer": {"type": "dispersive"}}, ["plain step", "regularized step"])],
    ids=["none", "dispersive"],
)
def test_a_spec_without_alignment_is_measured_in_the_ways_that_it_has(tmp_path, cache, settings, steps):
    (tmp_path / "cache").symlink_to(cache)
    spec = {**SETTINGS, "name": "plain", **settings, "run": make_options().model_dump(mode="json")}
    measured = bench_spec(spec, tmp_path, rounds=1, steps=1)
    assert [way["name"] for way in measured["ways"]] == [*steps, "data path alone", "evaluation"]
