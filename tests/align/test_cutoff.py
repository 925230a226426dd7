"""The cutoff by similarity: facts 18 and 19 of the guide's trainer, the second deliberately unlike it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repa_lab.align import REPA, Schedule, SimilarityCutoff, Tokens


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
    assert feed(SimilarityCutoff(0.9, mode="permanent", **at_once), values) == [False, False, True, True, True]
    assert feed(SimilarityCutoff(0.9, mode="recoverable", **at_once), values) == [False, False, True, False, True]


def test_the_threshold_itself_cuts():
    assert feed(SimilarityCutoff(0.5, ema_decay=0.0, min_count=1), [0.5]) == [True]


def test_the_average_is_corrected_for_its_start():
    cutoff = SimilarityCutoff(0.99, ema_decay=0.9)
    assert cutoff.similarity is None
    values = [0.1, 0.7, 0.3, 0.4]
    for n in range(1, 5):
        feed(cutoff, values[n - 1 : n], start=n)
        weights = 0.9 ** np.arange(n)[::-1]
        assert cutoff.similarity == pytest.approx(np.average(values[:n], weights=weights), abs=1e-7)


def test_a_settled_average_moves_by_its_decay():
    cutoff = SimilarityCutoff(0.99, ema_decay=0.5)
    feed(cutoff, [0.5] * 60)
    feed(cutoff, [0.9], start=60)
    assert cutoff.similarity == pytest.approx(0.7, abs=1e-7)


def test_an_early_spike_switches_nothing_off():
    values = [1.0, 1.0, *[0.3] * 200]
    assert not any(feed(SimilarityCutoff(0.9), values))
    hasty = feed(SimilarityCutoff(0.9, min_count=1), values)
    assert all(hasty)  # what a first sample taken for the average does


def test_nothing_is_decided_before_the_minimum_count():
    cut = feed(SimilarityCutoff(0.5, min_count=10), [0.9] * 12)
    assert cut == [False] * 9 + [True] * 3


def test_a_step_counts_once_whatever_its_micro_batches():
    whole, parts = SimilarityCutoff(0.9, ema_decay=0.8), SimilarityCutoff(0.9, ema_decay=0.8)
    for step, value in enumerate([0.2, 0.6, 0.4]):
        whole.observe(step, torch.tensor(value))
        for shift in (-0.1, 0.3, -0.2):
            parts.observe(step, torch.tensor(value + shift))
            assert not parts.is_cut(step)
    assert not whole.is_cut(3)
    assert not parts.is_cut(3)
    assert parts.similarity == pytest.approx(whole.similarity, abs=1e-7)


def test_a_step_is_judged_by_those_before_it():
    cutoff = SimilarityCutoff(0.5, ema_decay=0.0, min_count=1)
    cutoff.observe(3, torch.tensor(0.9))
    assert not cutoff.is_cut(3)
    assert cutoff.is_cut(4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_seen(value):
    cutoff = SimilarityCutoff(0.9, ema_decay=0.0, min_count=1)
    assert feed(cutoff, [0.4, value, 0.95]) == [False, False, True]


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_the_state_survives_bit_for_bit(mode):
    values = torch.rand(40).tolist()
    settings = {"threshold": 0.55, "ema_decay": 0.7, "min_count": 3, "mode": mode}
    uninterrupted = SimilarityCutoff(**settings)
    expected = feed(uninterrupted, values)
    assert True in expected
    assert False in expected
    for stop in range(1, 40):
        first, second = SimilarityCutoff(**settings), SimilarityCutoff(**settings)
        before = feed(first, values[:stop])
        second.load_state_dict(first.state_dict())
        assert before + feed(second, values[stop:], start=stop) == expected
        assert second.similarity == uninterrupted.similarity


def aligned(cutoff: SimilarityCutoff, weight: Schedule | float = 0.5) -> tuple[REPA, Tokens, Tokens]:
    """A regularizer whose student already is its teacher: cosine 1."""
    regularizer, student = REPA(6, 6, weight, width=8, cutoff=cutoff), Tokens(torch.randn(2, 4, 6), (2, 2))
    return regularizer, student, regularizer.projectors[0].project(student)


def test_a_regularizer_observes_what_it_aligns_and_then_stops():
    regularizer, student, teacher = aligned(SimilarityCutoff(0.9, min_count=3))
    weights = []
    for step in range(5):
        weights.append(regularizer.weight_at(step))
        assert regularizer.needs_target(step) == (step < 3)
        if regularizer.needs_target(step):
            regularizer(student, teacher, step)
    assert weights == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert regularizer.cutoff.similarity == pytest.approx(1.0, abs=1e-6)


# By hand, for a threshold of 0.85 and a decay of 1/2: the averages after these steps are .5, .767, .889, .692, .820 and .911.
# Judged within the step, as SimpleTuner does, the weights would be 2 2 0 0 0 0, or 2 2 0 2 2 0 where the cutoff is recoverable.
@pytest.mark.parametrize("mode, weights", [("permanent", [2, 2, 2, 0, 0, 0, 0]), ("recoverable", [2, 2, 2, 0, 2, 2, 0])])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_weight_is_0_from_the_step_after_the_one_that_reaches_the_threshold(mode, weights, micro_batches):
    cutoff = SimilarityCutoff(0.85, 0.5, mode, min_count=1, probe_every=1)
    regularizer, student, projected = aligned(cutoff, 2.0)
    along = torch.nn.functional.normalize(projected.values.detach(), dim=-1)
    across = torch.randn_like(along)
    across = torch.nn.functional.normalize(across - (across * along).sum(-1, keepdim=True) * along, dim=-1)
    seen = []
    for step, cosine in enumerate([0.5, 0.9, 0.98, 0.52, 0.94, 1.0, 0.5]):
        teacher = Tokens(cosine * along + (1 - cosine**2) ** 0.5 * across, (2, 2))
        for _ in range(micro_batches):
            found = regularizer(student, teacher, step)
            seen.append(found.weight)
            assert found.loss.item() == pytest.approx(-found.weight * cosine, abs=1e-5)
    assert seen == [weight for weight in weights for _ in range(micro_batches)]


def test_measuring_observes_nothing():
    regularizer, student, teacher = aligned(SimilarityCutoff(0.9, min_count=1))
    regularizer.eval()
    for step in range(3):
        regularizer(student, teacher, step)
    assert regularizer.weight_at(3) == 0.5


def test_a_recoverable_cutoff_looks_at_times_and_comes_back():
    regularizer, student, teacher = aligned(SimilarityCutoff(0.9, 0.0, "recoverable", min_count=1, probe_every=4))
    apart = Tokens(-teacher.values, teacher.grid)
    looked = []
    for step in range(14):
        if regularizer.needs_target(step):
            looked.append(step)
            regularizer(student, teacher if step < 8 else apart, step)
    # On at 0; cut from 1 on, looking at 4; at 8 it sees the tokens apart, so it is on again from 9.
    assert looked == [0, 4, 8, 9, 10, 11, 12, 13]
    assert regularizer.weight_at(14) == 0.5


def test_where_the_schedule_is_0_nothing_looks():
    schedule = Schedule(weight=0.5, warmup_steps=2, cutoff_step=8)
    regularizer, student, teacher = aligned(SimilarityCutoff(0.9, 0.0, "recoverable", min_count=1, probe_every=2), schedule)
    looked = []
    for step in range(20):
        if regularizer.needs_target(step):
            looked.append(step)
            regularizer(student, teacher, step)
    assert looked == [1, 2, 4, 6]


def test_it_is_part_of_the_regularizers_state():
    regularizer, student, teacher = aligned(SimilarityCutoff(0.9, min_count=1))
    regularizer(student, teacher, 0)
    other, *_ = aligned(SimilarityCutoff(0.9, min_count=1))
    other.load_state_dict(regularizer.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in regularizer.state_dict().values())
    assert other.weight_at(1) == 0.0


ABSURD = [{"mode": "forever"}, {"threshold": 1.5}, {"ema_decay": 1.0}, {"min_count": 0}, {"probe_every": 0}]


@pytest.mark.parametrize("settings", ABSURD)
def test_what_cannot_be_meant_is_refused(settings):
    with pytest.raises(ValueError, match=r"unknown threshold mode 'forever'; allowed|a cutoff needs threshold"):
        SimilarityCutoff(**{"threshold": 0.9, **settings})


def test_a_step_that_is_taken_again_counts_once():
    plain, retried = (SimilarityCutoff(0.9, ema_decay=0.5, min_count=1) for _ in range(2))
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
    cutoff = SimilarityCutoff(0.9, ema_decay=0.0, min_count=1)
    cutoff.observe(0, torch.tensor(0.7))
    assert not cutoff.is_cut(1)
    cutoff.retract(0)
    assert cutoff.similarity == pytest.approx(0.7)


def test_retracting_a_step_at_which_nothing_was_noted_leaves_the_one_before():
    cutoff = SimilarityCutoff(0.9, ema_decay=0.0, min_count=1)
    cutoff.observe(0, torch.tensor(0.7))
    cutoff.retract(1)
    assert not cutoff.is_cut(2)
    assert cutoff.similarity == pytest.approx(0.7)
