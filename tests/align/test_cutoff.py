"""The cutoff by similarity: facts 18 and 19 of SimpleTuner, the second deliberately unlike it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from repa_lab.align import REPA, Loss, ScheduleSettings, Signals, SimilarityCutoff, Tokens
from tests.rounding import COSINE, REGULARIZER, UNIT

FIELDS = {"ema_decay": "similarity_ema_decay", "min_count": "similarity_min_count", "mode": "threshold_mode"}


def watching(threshold: float = 0.9, **settings: Any) -> dict[str, Any]:
    """A schedule with a similarity threshold, by its fields' short names."""
    return {"similarity_threshold": threshold, **{FIELDS.get(name, name): value for name, value in settings.items()}}


def cutoff_of(threshold: float = 0.9, **settings: Any) -> SimilarityCutoff:
    return SimilarityCutoff(ScheduleSettings(**watching(threshold, **settings)))


def feed(cutoff: SimilarityCutoff, values: list[float], start: int = 0) -> list[bool]:
    """Observe one value a step; whether the weight is 0 at each following step."""
    cut = []
    for step, value in enumerate(values, start):
        cutoff.observe(step, torch.tensor(value))
        cut.append(cutoff.is_cut(step + 1))
    return cut


def test_each_step_alone():
    at_once = {"ema_decay": 0.0, "min_count": 1}
    values = [0.5, 0.8, 0.95, 0.5, 0.95]
    assert feed(cutoff_of(0.9, mode="permanent", **at_once), values) == [False, False, True, True, True]
    assert feed(cutoff_of(0.9, mode="recoverable", **at_once), values) == [False, False, True, False, True]


def test_the_threshold_itself_cuts():
    assert feed(cutoff_of(0.5, ema_decay=0.0, min_count=1), [0.5]) == [True]


def test_the_average_is_corrected_for_its_start():
    cutoff = cutoff_of(0.99, ema_decay=0.9)
    assert cutoff.similarity is None
    values = [0.1, 0.7, 0.3, 0.4]
    for n in range(1, 5):
        feed(cutoff, values[n - 1 : n], start=n)
        weights = 0.9 ** np.arange(n)[::-1]
        assert cutoff.similarity == pytest.approx(np.average(values[:n], weights=weights), abs=UNIT)


def test_a_settled_average_moves_by_its_decay():
    cutoff = cutoff_of(0.99, ema_decay=0.5)
    feed(cutoff, [0.5] * 60)
    feed(cutoff, [0.9], start=60)
    assert cutoff.similarity == pytest.approx(0.7, abs=UNIT)


def test_an_early_spike_switches_nothing_off():
    values = [1.0, 1.0, *[0.3] * 200]
    assert not any(feed(cutoff_of(0.9), values))
    hasty = feed(cutoff_of(0.9, min_count=1), values)
    assert all(hasty)  # what a first sample taken for the average does


def test_nothing_is_decided_before_the_minimum_count():
    cut = feed(cutoff_of(0.5, min_count=10), [0.9] * 12)
    assert cut == [False] * 9 + [True] * 3


def test_a_step_counts_once_whatever_its_micro_batches():
    whole, parts = cutoff_of(0.9, ema_decay=0.8), cutoff_of(0.9, ema_decay=0.8)
    for step, value in enumerate([0.2, 0.6, 0.4]):
        whole.observe(step, torch.tensor(value))
        for shift in (-0.1, 0.3, -0.2):
            parts.observe(step, torch.tensor(value + shift))
            assert not parts.is_cut(step)
    assert not whole.is_cut(3)
    assert not parts.is_cut(3)
    assert parts.similarity == pytest.approx(whole.similarity, abs=UNIT)


def test_a_step_is_judged_by_those_before_it():
    cutoff = cutoff_of(0.5, ema_decay=0.0, min_count=1)
    cutoff.observe(3, torch.tensor(0.9))
    assert not cutoff.is_cut(3)
    assert cutoff.is_cut(4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_seen(value):
    cutoff = cutoff_of(0.9, ema_decay=0.0, min_count=1)
    assert feed(cutoff, [0.4, value, 0.95]) == [False, False, True]


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_the_state_survives_bit_for_bit(mode):
    values = torch.rand(40).tolist()
    settings = {"threshold": 0.55, "ema_decay": 0.7, "min_count": 3, "mode": mode}
    uninterrupted = cutoff_of(**settings)
    expected = feed(uninterrupted, values)
    assert True in expected
    assert False in expected
    for stop in range(1, 40):
        first, second = cutoff_of(**settings), cutoff_of(**settings)
        before = feed(first, values[:stop])
        second.load_state_dict(first.state_dict())
        assert before + feed(second, values[stop:], start=stop) == expected
        assert second.similarity == uninterrupted.similarity


def aligned(weight: float = 0.5, **schedule: Any) -> tuple[REPA, Tokens, Tokens]:
    """A regularizer with a similarity cutoff whose student already is its teacher: cosine 1."""
    regularizer = REPA(6, 6, weight=weight, projector={"width": 8}, schedule=watching(**schedule))
    student = Tokens(torch.randn(2, 4, 6), (2, 2))
    return regularizer, student, regularizer.projectors[0](student)


def look(regularizer: REPA, student: Tokens, teacher: Tokens, step: int) -> None:
    """What a training step does: ask for the loss, and tell the cutoff."""
    regularizer.observe(step, regularizer(Signals(taps=(student,), encoders=(teacher,)), step))


def test_a_regularizer_observes_what_it_aligns_and_then_stops():
    regularizer, student, teacher = aligned(min_count=3)
    weights = []
    for step in range(5):
        weights.append(regularizer.weight_at(step))
        assert regularizer.is_active(step) == (step < 3)
        if regularizer.is_active(step):
            look(regularizer, student, teacher, step)
    assert weights == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert regularizer.cutoff.similarity == pytest.approx(1.0, abs=COSINE)


# By hand, for a threshold of 0.85 and a decay of 1/2: the averages after these steps are .5, .767, .889, .692, .820 and .911.
# Judged within the step, as SimpleTuner does, the weights would be 2 2 0 0 0 0, or 2 2 0 2 2 0 where the cutoff is recoverable.
@pytest.mark.parametrize(
    "mode, weights", [("permanent", [2, 2, 2, 0, 0, 0, 0]), ("recoverable", [2, 2, 2, 0, 2, 2, 0])]
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_weight_is_0_from_the_step_after_the_one_that_reaches_the_threshold(mode, weights, micro_batches):
    settings = {"threshold": 0.85, "ema_decay": 0.5, "mode": mode, "min_count": 1, "probe_every": 1}
    regularizer, student, projected = aligned(2.0, **settings)
    along = torch.nn.functional.normalize(projected.values.detach(), dim=-1)
    across = torch.randn_like(along)
    across = torch.nn.functional.normalize(across - (across * along).sum(-1, keepdim=True) * along, dim=-1)
    seen = []
    for step, cosine in enumerate([0.5, 0.9, 0.98, 0.52, 0.94, 1.0, 0.5]):
        teacher = Tokens(cosine * along + (1 - cosine**2) ** 0.5 * across, (2, 2))
        for _ in range(micro_batches):
            loss = regularizer(Signals(taps=(student,), encoders=(teacher,)), step)
            seen.append(regularizer.weight_at(step))
            regularizer.observe(step, loss)
            assert loss.value.item() == pytest.approx(-cosine, abs=REGULARIZER)
    assert seen == [weight for weight in weights for _ in range(micro_batches)]


def test_asking_for_the_loss_observes_nothing():
    regularizer, student, teacher = aligned(min_count=1)
    for step in range(3):
        regularizer(Signals(taps=(student,), encoders=(teacher,)), step)
    assert regularizer.weight_at(3) == 0.5
    assert regularizer.cutoff.similarity is None


def test_a_loss_without_a_cosine_cannot_be_watched():
    watched, *_ = aligned(min_count=1)
    with pytest.raises(ValueError, match="similarity_threshold watches the part 'cosine' of the loss"):
        watched.observe(0, Loss(torch.zeros(()), {"closeness": torch.zeros(())}))
    REPA(6, 6).observe(0, Loss(torch.zeros(())))  # without a threshold nothing is asked of the parts


def test_a_recoverable_cutoff_looks_at_times_and_comes_back():
    regularizer, student, teacher = aligned(ema_decay=0.0, mode="recoverable", min_count=1, probe_every=4)
    apart = Tokens(-teacher.values, teacher.grid)
    looked = []
    for step in range(14):
        if regularizer.is_active(step):
            looked.append(step)
            look(regularizer, student, teacher if step < 8 else apart, step)
    # On at 0; cut from 1 on, looking at 4; at 8 it sees the tokens apart, so it is on again from 9.
    assert looked == [0, 4, 8, 9, 10, 11, 12, 13]
    assert regularizer.weight_at(14) == 0.5


def test_where_the_schedule_is_0_nothing_looks():
    regularizer, student, teacher = aligned(
        ema_decay=0.0, mode="recoverable", min_count=1, probe_every=2, warmup_steps=2, cutoff_step=8
    )
    looked = []
    for step in range(20):
        if regularizer.is_active(step):
            looked.append(step)
            look(regularizer, student, teacher, step)
    assert looked == [1, 2, 4, 6]


def test_it_is_part_of_the_regularizers_state():
    regularizer, student, teacher = aligned(min_count=1)
    look(regularizer, student, teacher, 0)
    other, *_ = aligned(min_count=1)
    other.load_state_dict(regularizer.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in regularizer.state_dict().values())
    assert other.weight_at(1) == 0.0


ABSURD = {
    "mode": ("forever", "threshold_mode\n  Input should be 'permanent' or 'recoverable'"),
    "threshold": (1.5, "similarity_threshold\n  Input should be less than or equal to 1"),
    "ema_decay": (1.0, "similarity_ema_decay\n  Input should be less than 1"),
    "min_count": (0, "similarity_min_count\n  Input should be greater than or equal to 1"),
    "probe_every": (0, "probe_every\n  Input should be greater than or equal to 1"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_what_cannot_be_meant_is_refused(name):
    value, message = ABSURD[name]
    with pytest.raises(ValidationError, match=message):
        cutoff_of(**{name: value})
    with pytest.raises(ValidationError, match=message):
        REPA(6, 6, schedule=watching(**{name: value}))


def test_without_a_threshold_there_is_no_cutoff():
    with pytest.raises(ValueError, match="a similarity cutoff needs a similarity_threshold"):
        SimilarityCutoff(ScheduleSettings())
    assert REPA(6, 6).cutoff is None


def test_a_step_that_is_taken_again_counts_once():
    plain, retried = (cutoff_of(0.9, ema_decay=0.5, min_count=1) for _ in range(2))
    for step, value in enumerate([0.2, 0.6, 0.4]):
        assert plain.is_cut(step) == retried.is_cut(step)
        plain.observe(step, torch.tensor(value))
        for wrong in (0.99, -0.5):  # noted before memory ran out
            retried.observe(step, torch.tensor(wrong))
        retried.retract(step)
        retried.retract(step)
        assert not retried.is_cut(step)
        retried.observe(step, torch.tensor(value))
    assert torch.equal(retried.get_extra_state(), plain.get_extra_state())
    assert plain.similarity == pytest.approx((0.2 + 2 * 0.6 + 4 * 0.4) / 7)


def test_what_was_taken_in_is_not_retracted():
    cutoff = cutoff_of(0.9, ema_decay=0.0, min_count=1)
    cutoff.observe(0, torch.tensor(0.7))
    assert not cutoff.is_cut(1)
    cutoff.retract(0)
    assert cutoff.similarity == pytest.approx(0.7)


def test_retracting_a_step_at_which_nothing_was_noted_leaves_the_one_before():
    cutoff = cutoff_of(0.9, ema_decay=0.0, min_count=1)
    cutoff.observe(0, torch.tensor(0.7))
    cutoff.retract(1)
    assert not cutoff.is_cut(2)
    assert cutoff.similarity == pytest.approx(0.7)


def test_the_lines_for_ones_own_loop_let_the_threshold_act():
    page = (Path(__file__).parents[2] / "docs/regularizer.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(loss = .*?)```", page, flags=re.DOTALL)
    for code, expected in ((lines, 0.0), (lines.splitlines()[0], 0.5)):
        regularizer, student, teacher = aligned(min_count=1)
        signals = Signals(taps=(student,), encoders=(teacher,))
        exec(code, {"regularizer": regularizer, "signals": signals, "step": 0})
        assert regularizer.weight_at(1) == expected
