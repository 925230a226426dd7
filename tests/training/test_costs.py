"""What projectors compute, held against torch's count of the regularizer that a run trains; the rest is in tests/orchestration."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repa_lab.align import Tokens
from repa_lab.spec import RunOptions
from repa_lab.spec.identity import Run
from repa_lab.training.costs import Cost, cost_of
from tests.align.references import align
from tests.training.conftest import OFF, make_regularizer, make_run

# The tap of SiT nano/2 has 4x4 tokens of digits, EfficientNet-Lite0 one of width 112 for every 16 pixels along a side.
TAPPED, WIDTH, DIM = 4, 64, 112
BEFORE = {"regularizer.resample": {"when": "before"}}


def encoders(*sizes: int) -> dict:
    return {"regularizer.encoder": [{"name": "efficientnet_lite0", "image_size": size} for size in sizes]}


def cost(run: Run) -> Cost:
    return cost_of(run.config, RunOptions())


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
    assert found.projector_flops == counted(run, grids)
    assert found.image_flops - cost(make_run(**OFF)).image_flops == pytest.approx(found.projector_flops)
    by_hand = sum((grid if takes_grid else TAPPED) ** 2 for grid in grids) * 6 * (WIDTH * 16 + 16 * 16 + 16 * DIM)
    assert found.projector_flops == by_hand


def test_an_encoder_of_unknown_stride_leaves_the_taps_tokens():
    unknown = {"regularizer.encoder": {"name": "vit_base_patch16_224.dino", "image_size": 224}}
    assert cost(make_run(**unknown, **BEFORE)).projector_flops == cost(make_run(**unknown)).projector_flops > 0


def test_a_projector_is_paid_for_in_the_steps_that_ask_an_encoder():
    without = cost(make_run(**OFF)).image_flops
    whole = cost(make_run(**{"train.steps": 100})).image_flops - without
    cut = cost(make_run(**{"train.steps": 100, "regularizer.schedule": {"cutoff_step": 25}}))
    assert cut.image_flops - without == whole / 4
    assert cost(make_run(**{"regularizer.weight": 0.0})).image_flops == without
