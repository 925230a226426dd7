from __future__ import annotations

import random

import pytest

from repa_lab.align import Schedule
from repa_lab.align.settings import agreement

# settings, then weights by step; the values of the papers' and the guide's fact lists
WORKED = [
    ({"weight": 0.5}, {0: 0.5, 500: 0.5, 1000: 0.5}),
    ({"weight": 1.0, "warmup_steps": 100}, {0: 0.0, 50: 0.5, 99: 0.99, 100: 1.0, 200: 1.0}),
    ({"type": "linear", "weight": 1.0, "decay_steps": 100}, {0: 1.0, 50: 0.5, 100: 0.0, 101: 0.0, 10**6: 0.0}),
    ({"type": "cosine", "weight": 1.0, "decay_steps": 100}, {0: 1.0, 25: 0.8535533906, 50: 0.5, 100: 0.0, 300: 0.0}),
    ({"type": "polynomial", "weight": 1.0, "decay_steps": 100, "power": 2.0}, {0: 1.0, 50: 0.25, 100: 0.0, 101: 0.0}),
    ({"type": "polynomial", "weight": 1.0, "decay_steps": 100}, {25: 0.75}),
    (
        {"type": "linear", "weight": 1.0, "warmup_steps": 100, "decay_steps": 200},
        {50: 0.5, 100: 1.0, 150: 0.5, 200: 0.0},
    ),
    ({"type": "linear", "weight": 1.0, "total_steps": 100}, {0: 1.0, 50: 0.5, 100: 0.0}),
    ({"type": "linear", "weight": 1.0, "decay_steps": 50, "total_steps": 100}, {25: 0.5, 50: 0.0}),
    (
        {"type": "cosine", "weight": 0.5, "warmup_steps": 100, "decay_steps": 5000},
        {0: 0.0, 50: 0.25, 100: 0.5, 2550: 0.25, 5000: 0.0, 5100: 0.0},
    ),
    ({"type": "linear", "weight": 0.2, "end": 1.0, "decay_steps": 10}, {0: 0.2, 5: 0.6, 10: 1.0, 11: 1.0}),
    ({"type": "cosine", "weight": 1.0, "end": 0.5, "decay_steps": 10}, {0: 1.0, 5: 0.75, 10: 0.5, 99: 0.5}),
    ({"type": "polynomial", "weight": 1.0, "end": 0.5, "decay_steps": 10, "power": 3.0}, {5: 0.5625}),
    ({"weight": 0.5, "cutoff_step": 50}, {49: 0.5, 50: 0.0, 51: 0.0}),
    ({"weight": 0.5, "cutoff_step": 250_000}, {249_999: 0.5, 250_000: 0.0}),
    ({"weight": 0.5, "warmup_steps": 100, "cutoff_step": 50}, {49: 0.245, 50: 0.0, 100: 0.0}),
    ({"weight": 0.0}, {0: 0.0, 7: 0.0}),
    ({"type": "cosine", "weight": 0.0, "warmup_steps": 10, "total_steps": 100}, {0: 0.0, 10: 0.0, 50: 0.0, 100: 0.0}),
]


@pytest.mark.parametrize("settings, weights", WORKED)
def test_worked_values(settings, weights):
    schedule = Schedule(**settings)
    assert {step: schedule(step) for step in weights} == pytest.approx(weights, abs=1e-9)


@pytest.mark.parametrize("type_", ["linear", "cosine", "polynomial"])
def test_a_schedule_without_warm_up_starts_at_its_weight_and_ends_at_its_end_exactly(type_):
    schedule = Schedule(type=type_, weight=0.7, end=0.3, decay_steps=1000)
    assert schedule(0) == 0.7
    assert schedule(1000) == pytest.approx(0.3, abs=1e-15)
    assert all(schedule(step) >= schedule(step + 1) for step in range(0, 1000))


def test_off_is_exactly_off():
    assert Schedule(weight=0.5, warmup_steps=10)(0) == 0.0
    assert Schedule(weight=0.5, cutoff_step=50)(50) == 0.0
    for type_ in ("linear", "cosine", "polynomial"):
        assert Schedule(type=type_, weight=0.5, decay_steps=37)(37) == 0.0
        assert Schedule(type=type_, weight=0.5, decay_steps=37)(38) == 0.0


@pytest.mark.parametrize("never", [None, 0])
def test_no_cutoff(never):
    assert Schedule(weight=0.5, cutoff_step=never)(10**9) == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"type": "exponential"},
            "type\n  Input should be 'constant', 'linear', 'cosine' or 'polynomial'.*'exponential'",
        ),
        ({"weight": -0.1}, "the weight must not be negative, got -0.1"),
        ({"weight": float("nan")}, "the weight must not be negative, got nan"),
        ({"end": -1.0}, "end\n  Input should be greater than or equal to 0.*=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps\n  Input should be greater than or equal to 0.*=-1"),
        ({"decay_steps": -1}, "decay_steps\n  Input should be greater than or equal to 0.*=-1"),
        ({"cutoff_step": -1}, "cutoff_step\n  Input should be greater than or equal to 0.*=-1"),
        (
            {"type": "polynomial", "power": -1.0, "decay_steps": 5},
            "power\n  Input should be greater than or equal to 0.*=-1.0",
        ),
        ({"type": "linear"}, "a linear schedule needs decay_steps, the step at which it ends"),
        ({"type": "cosine", "warmup_steps": 100, "decay_steps": 100}, "decay_steps is counted from step 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


class TestAgreement:
    """How long two schedules have the same weights, against asking both at every step."""

    @staticmethod
    def by_asking(one: Schedule, other: Schedule, steps: int) -> int:
        return next((step for step in range(steps) if one(step) != other(step)), steps)

    @pytest.mark.parametrize("seed", range(300))
    def test_of_any_two(self, seed):
        draw = random.Random(seed)

        def schedule() -> Schedule:
            warmup = draw.choice([0, 0, 3, 10])
            return Schedule(
                type=draw.choice(["constant", "linear", "cosine", "polynomial"]),
                weight=draw.choice([0.0, 0.5, 0.5, 1.0]),
                end=draw.choice([0.0, 0.0, 0.5]),
                warmup_steps=warmup,
                decay_steps=draw.choice([0, warmup + 1, 20, 40]),
                cutoff_step=draw.choice([None, None, 0, 5, 15, 25, 60]),
                power=draw.choice([1.0, 1.0, 2.0, 0.0]),
                total_steps=draw.choice([30, 50]),
            )

        one, other = schedule(), schedule()
        assert agreement(one, other, 30) == agreement(other, one, 30) == self.by_asking(one, other, 30)
        assert agreement(one, one, 30) == 30

    def test_a_cutoff_acts_from_its_step_on(self):
        assert agreement(Schedule(), Schedule(cutoff_step=400), 1000) == 400
        assert agreement(Schedule(cutoff_step=600), Schedule(cutoff_step=400), 1000) == 400

    def test_a_decay_to_another_end_acts_after_the_warmup(self):
        one, other = (Schedule(type="cosine", warmup_steps=100, decay_steps=900, end=end) for end in (0.0, 0.1))
        assert agreement(one, other, 1000) == 101  # at step 100 the weight is the start's in both

    def test_a_decay_over_all_of_training_depends_on_its_length_at_once(self):
        one, other = (Schedule(type="linear", total_steps=total) for total in (1000, 2000))
        assert agreement(one, other, 1000) == 1
        assert agreement(Schedule(total_steps=1000), Schedule(total_steps=2000), 1000) == 1000

    def test_long_ones_are_compared_at_once(self):
        asked = []

        class Counted(Schedule):
            def __call__(self, step: int) -> float:
                asked.append(step)
                return super().__call__(step)

        assert (
            agreement(Counted(warmup_steps=10), Counted(warmup_steps=10, cutoff_step=4_000_000), 10_000_000)
            == 4_000_000
        )
        assert len(asked) < 50
