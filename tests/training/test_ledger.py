"""What a run's rows say that it has cost."""

import pytest

from repa_lab.spec import RunOptions
from repa_lab.training.checkpoint import Progress
from repa_lab.training.costs import cost_of, costs_so_far
from tests.training.conftest import OFF, make_options, make_run, run_to_end

METRIC = "frechet:efficientnet_lite0@16/ode2"
FULL = "frechet:efficientnet_lite0@20/sde3"
ONLINE = {"regularizer.encoder": {"name": "efficientnet_lite0", "image_size": 32, "cache": False}}


def of(step, **settings):
    config = make_run(**{"train.steps": 100, **settings}).config
    return costs_so_far(config, RunOptions(), Progress(step, 6 * step, 0.0, 1.5, 0.25)), cost_of(config, RunOptions())


def test_training_and_measuring_grow_with_the_steps():
    early, cost = of(50, **{"evaluate.every": 25})
    late, _ = of(100, **{"evaluate.every": 25})
    assert early["cost/train_flops"] == 300 * cost.image_flops
    assert (early["cost/evaluation_flops"], late["cost/evaluation_flops"]) == (
        2 * cost.evaluation_flops,
        4 * cost.evaluation_flops,
    )
    assert (early["cost/evaluation_seconds"], early["cost/encoder_seconds"]) == (1.5, 0.25)


def test_encoders_in_the_steps_are_told_apart_and_end_with_the_cutoff():
    known = {"dinov2_vits14": 224}
    ((name, size),) = known.items()
    online = {"regularizer.encoder": {"name": name, "image_size": size, "cache": False}}
    whole, cost = of(60, **online)
    assert whole["cost/encoder_flops"] == 360 * cost.encoder_flops > 0
    assert whole["cost/train_flops"] == pytest.approx(360 * (cost.image_flops - cost.encoder_flops))
    cut = [
        of(step, **online, **{"regularizer.schedule": {"cutoff_step": 40}})[0]["cost/encoder_flops"]
        for step in (20, 40, 60)
    ]
    assert cut == pytest.approx([120 * cost.encoder_flops, 240 * cost.encoder_flops, 240 * cost.encoder_flops])


def test_a_projector_is_trained_no_more_after_the_cutoff_and_never_at_weight_0():
    cut = {"regularizer.schedule": {"cutoff_step": 40}}
    off, whole = (
        {step: of(step, **settings)[0]["cost/train_flops"] for step in (20, 40, 60, 100)} for settings in (OFF, {})
    )
    for settings, active in ((cut, (20, 40, 40, 40)), ({"regularizer.weight": 0.0}, (0, 0, 0, 0))):
        spent = [of(step, **settings)[0]["cost/train_flops"] - off[step] for step in (20, 40, 60, 100)]
        assert spent == pytest.approx([(whole[20] - off[20]) * steps / 20 for steps in active], abs=1)
    assert whole[20] > off[20]


def test_a_milestone_has_a_row_of_its_own_and_is_paid_for(cache, tmp_path):
    full = {"samples": 20, "sampler": {"type": "sde", "steps": 3}, "at": [2]}
    run = make_run(**{"evaluate.every": 2, "evaluate.full": full})
    from repa_lab.runs import RunDirectory

    directory = run_to_end(run, RunDirectory(tmp_path / run.run_id), cache)
    measured = [(row["step"], METRIC in row, FULL in row) for row in directory.rows() if "loss/total" not in row]
    assert measured == [(2, True, False), (2, False, True), (4, True, False), (5, True, False)]
    costs = [row["cost/evaluation_flops"] for row in directory.rows() if METRIC in row]
    cost = cost_of(run.config, make_options())
    assert costs == [count * cost.evaluation_flops + cost.milestone_flops for count in (1, 2, 3)]
    seconds = [row["cost/evaluation_seconds"] for row in directory.rows() if METRIC in row]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
