"""What a run costs by its settings, and what its rows say that it has cost; formulas are also in tests/orchestration."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repa_lab.align import Tokens
from repa_lab.spec.identity import Run
from repa_lab.training.checkpoint import Progress
from repa_lab.training.costs import Cost, cost_of, costs_so_far
from tests.align.references import align
from tests.training.conftest import OFF, make_options, make_regularizer, make_run, run_to_end

# The tap of SiT nano/2 has 4x4 tokens of digits, EfficientNet-Lite0 one of width 112 for every 16 pixels along a side.
TAPPED, WIDTH, DIM = 4, 64, 112
BEFORE = {"regularizer.resample": {"when": "before"}}


def encoders(*sizes: int) -> dict:
    return {"regularizer.encoder": [{"name": "efficientnet_lite0", "image_size": size} for size in sizes]}


def cost(run: Run) -> Cost:
    return cost_of(run.config, make_options())


def counted(run: Run, grids: tuple[int, ...]) -> int:
    """Multiplications and additions of a regularizer's forward and backward pass for one image."""
    regularizer = make_regularizer(run, WIDTH, *[DIM] * len(grids))
    student = Tokens(torch.randn(1, TAPPED**2, WIDTH, requires_grad=True), (TAPPED, TAPPED))
    teachers = [Tokens(torch.randn(1, side**2, DIM), (side, side)) for side in grids]
    with FlopCounterMode(display=False) as counter:
        align(regularizer, student, teachers).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("resample", "takes_grid"),
    [
        ({}, False),
        ({"when": "before"}, True),
        ({"when": "after"}, False),
        ({"side": "teacher", "when": "before"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(32,), (64,), (96,), (32, 96)], ids=str)
def test_a_projector_costs_what_torch_counts_on_the_tokens_that_it_takes(resample, takes_grid, sizes):
    run = make_run(**encoders(*sizes), **{"regularizer.resample": resample})
    grids = tuple(size // 16 for size in sizes)
    found = cost(run)
    assert found.regularizers[0].projector_flops == counted(run, grids)
    assert found.image_flops - cost(make_run(**OFF)).image_flops == pytest.approx(found.regularizers[0].projector_flops)
    by_hand = sum((grid if takes_grid else TAPPED) ** 2 for grid in grids) * 6 * (WIDTH * 16 + 16 * 16 + 16 * DIM)
    assert found.regularizers[0].projector_flops == by_hand


def test_an_encoder_of_unknown_stride_leaves_the_taps_tokens():
    unknown = {"regularizer.encoder": {"name": "vit_base_patch16_224.dino", "image_size": 224}}
    assert (
        cost(make_run(**unknown, **BEFORE)).regularizers[0].projector_flops
        == cost(make_run(**unknown)).regularizers[0].projector_flops
        > 0
    )


def test_a_projector_is_paid_for_in_the_steps_that_ask_an_encoder():
    without = cost(make_run(**OFF)).image_flops
    whole = cost(make_run(**{"train.steps": 100})).image_flops - without
    cut = cost(make_run(**{"train.steps": 100, "regularizer.schedule": {"cutoff_step": 25}}))
    assert cut.image_flops - without == whole / 4
    assert cost(make_run(**{"regularizer.weight": 0.0})).image_flops == without


METRIC = "frechet:efficientnet_lite0@16/ode2"
FULL = "frechet:efficientnet_lite0@20/sde3"
ONLINE = {"regularizer.encoder": {"name": "efficientnet_lite0", "image_size": 32, "cache": False}}


def of(step, **settings):
    config = make_run(**{"train.steps": 100, **settings}).config
    return costs_so_far(config, make_options(), Progress(step, 6 * step, 0.0, 1.5, 0.25)), cost_of(
        config, make_options()
    )


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
    assert whole["cost/encoder_flops"] == 360 * cost.regularizers[0].encoder_flops > 0
    assert whole["cost/train_flops"] == pytest.approx(360 * (cost.image_flops - cost.regularizers[0].encoder_flops))
    cut = [
        of(step, **online, **{"regularizer.schedule": {"cutoff_step": 40}})[0]["cost/encoder_flops"]
        for step in (20, 40, 60)
    ]
    assert cut == pytest.approx(
        [
            120 * cost.regularizers[0].encoder_flops,
            240 * cost.regularizers[0].encoder_flops,
            240 * cost.regularizers[0].encoder_flops,
        ]
    )


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


BLOCKS = {"type": "layersync"}
TAUGHT = {"type": "self_transcendence", "weights": "model.safetensors", "projector": {"width": 16}}


def regularized(*members: dict, **settings) -> Run:
    return make_run(**{"regularizer": [*members], **settings})


def test_what_a_method_computes_anyway_costs_nothing():
    without = cost(make_run(**OFF))
    for kind in ("layersync", "dispersive"):
        found = cost(regularized({"type": kind}))
        assert (found.image_flops, found.trained, found.rough) == (without.image_flops, without.trained, without.rough)


def test_a_frozen_teacher_costs_a_pass_or_two_and_its_weights():
    without, twice = cost(make_run(**OFF)), cost(regularized(TAUGHT))
    once = cost(regularized({**TAUGHT, "guidance": 1.0}))
    forward = without.denoiser_flops / 3  # a backward pass costs two forward passes
    assert [one.regularizers[0].teacher_flops for one in (once, twice)] == [forward, 2 * forward]
    assert twice.memory.teachers == 4 * without.parameters
    assert twice.memory.total - once.memory.total == 0
    projector = 2 * (WIDTH * 16) + 16**2  # multiply-adds of a token
    assert once.image_flops == pytest.approx(without.image_flops + forward + 6 * TAPPED**2 * projector)


@pytest.mark.parametrize("kind", ["sra", "self_flow"])
def test_an_averaged_teacher_costs_a_pass_and_the_projector(kind):
    without, found = cost(make_run(**OFF)), cost(regularized({"type": kind, "projector": {"width": 16}}))
    forward = without.denoiser_flops / 3  # a backward pass costs two forward passes
    assert found.regularizers[0].teacher_flops == forward
    assert found.memory.teachers == 0  # the averages are there anyway
    projector = 2 * (WIDTH * 16) + 16**2  # multiply-adds of a token
    second_time = found.regularizers[0].second_time_flops
    assert (second_time > 0) == (kind == "self_flow")
    assert found.image_flops == pytest.approx(without.image_flops + forward + second_time + 6 * TAPPED**2 * projector)


def test_sra2_costs_its_projector():
    found = cost(regularized({"type": "sra2", "projector": {"width": 16}}))
    # A token of nano/2 stands for 2x2 pixels of one channel.
    assert found.regularizers[0].projector_flops == 6 * TAPPED**2 * (WIDTH * 16 + 16 * 16 + 16 * 4)


def test_several_cost_their_sum_each_for_its_own_steps():
    repa = make_run().config.regularizer.model_dump(mode="json")
    taught = {**TAUGHT, "schedule": {"cutoff_step": 25}}
    settings = {"train.steps": 100}
    first, second, both = (cost(regularized(*members, **settings)) for members in ((repa,), (taught,), (repa, taught)))
    off = cost(make_run(**OFF, **settings)).image_flops
    assert both.image_flops - off == pytest.approx(first.image_flops - off + second.image_flops - off)
    assert [one.active for one in both.regularizers] == [1.0, 0.25]
    row, _ = of(50, regularizer=[repa, taught])
    added = 300 * both.regularizers[0].flops + 150 * both.regularizers[1].flops
    assert row["cost/train_flops"] == pytest.approx(300 * both.denoiser_flops + added)


def test_an_encoder_that_two_ask_for_is_counted_once_for_as_long_as_either_asks():
    repa = {"type": "repa", "encoder": {"name": "dinov2_vits14", "image_size": 224, "cache": False}}
    short = {**repa, "type": "relation", "schedule": {"cutoff_step": 25}}
    for members in ((short, repa), (repa, short)):
        both, one = cost(regularized(*members, **{"train.steps": 100})), cost(regularized(repa, **{"train.steps": 100}))
        assert sum(part.encoder_flops for part in both.regularizers) == one.regularizers[0].encoder_flops > 0
        assert sum(part.active * part.encoder_flops for part in both.regularizers) == one.regularizers[0].encoder_flops
        assert both.memory.encoders == one.memory.encoders
