"""What settings classes promise, and what a run makes of a regularizer's."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from repa_lab.align import Needs, Regularizer, Schedule
from repa_lab.align.regularizer import REPA, UREPA
from repa_lab.align.settings import (
    REGULARIZERS,
    EncoderSettings,
    NoSettings,
    RegularizerSettings,
    REPASettings,
    ScheduleSettings,
    UREPASettings,
)
from repa_lab.registry import UnknownComponentError

DECAYS = ["linear", "cosine", "polynomial"]


class TestResolved:
    """Null and 0, which stand for what the run decides, become numbers."""

    @pytest.mark.parametrize("suggested", [0, 7, "mid"])
    def test_a_block_that_is_not_given_is_the_familys(self, suggested):
        assert UREPASettings().resolved(suggested, 10, 12).block_index == suggested

    @pytest.mark.parametrize("given", [0, 3, "mid"])
    def test_a_block_that_is_given_stays(self, given):
        assert UREPASettings(block_index=given).resolved(7, 10, 12).block_index == given

    @pytest.mark.parametrize("kind", DECAYS)
    def test_a_decay_without_an_end_ends_with_the_training(self, kind):
        found = REPASettings(schedule=ScheduleSettings(type=kind, warmup_steps=3)).resolved(7, 1000, 12)
        assert (found.schedule.decay_steps, found.schedule.warmup_steps, found.schedule.type) == (1000, 3, kind)

    @pytest.mark.parametrize("kind", DECAYS)
    def test_an_end_that_is_given_stays(self, kind):
        assert (
            REPASettings(schedule=ScheduleSettings(type=kind, decay_steps=40))
            .resolved(7, 1000, 12)
            .schedule.decay_steps
            == 40
        )

    def test_what_does_not_decay_has_no_end(self):
        assert REPASettings().resolved(7, 1000, 12).schedule == ScheduleSettings()

    def test_all_else_is_as_it_was(self):
        before = UREPASettings(
            weight=0.1, manifold_weight=2.0, encoder=(EncoderSettings(name="a"), EncoderSettings(name="b"))
        )
        after = before.resolved("mid", 9, 12)
        assert before.block_index is None
        assert type(after) is UREPASettings
        assert after.model_copy(update={"block_index": None}) == before

    @pytest.mark.parametrize("kind", ["constant", *DECAYS])
    def test_the_schedule_is_the_one_that_the_length_of_the_training_gives(self, kind):
        settings = REPASettings(weight=0.7, schedule=ScheduleSettings(type=kind, warmup_steps=5, end=0.2, power=2.0))
        one, other = Schedule.of(settings, 50), Schedule.of(settings.resolved(7, 50, 12))
        assert [one(step) for step in range(60)] == [other(step) for step in range(60)]

    def test_a_weight_that_ends_before_a_decays_start_is_resolved_all_the_same(self):
        """A training of fewer steps than the warm-up: the weight rises, and falls to its end at once."""
        found = REPASettings(weight=1.0, schedule=ScheduleSettings(type="linear", warmup_steps=10)).resolved(7, 4, 12)
        schedule = Schedule.of(found)
        assert [schedule(step) for step in (0, 3, 5, 10, 11)] == [0.0, 0.3, 0.5, 1.0, 0.0]


class TestNeeds:
    ONE, OTHER = EncoderSettings(name="a"), EncoderSettings(name="b")

    @pytest.mark.parametrize("kind", [REPASettings, UREPASettings])
    @pytest.mark.parametrize(
        "encoder, encoders", [(ONE, (ONE,)), ((ONE, OTHER), (ONE, OTHER)), ((ONE, ONE), (ONE, ONE))]
    )
    def test_the_block_and_the_encoders(self, kind, encoder, encoders):
        assert kind(encoder=encoder, block_index=3).needs() == Needs(taps=(3,), encoders=encoders)

    def test_encoders_wherever_they_stand_in_the_settings(self):
        class Pair(RegularizerSettings):
            first: EncoderSettings = EncoderSettings(name="a")
            others: tuple[EncoderSettings, ...] = (EncoderSettings(name="b"), EncoderSettings(name="c"))

        assert [one.name for one in Pair().needs().encoders] == ["a", "b", "c"]
        assert Pair(block_index=1).needs().taps == (1,)

    def test_the_baseline_needs_nothing(self):
        assert NoSettings().needs() == NoSettings().resolved(7, 10, 12).needs() == Needs()
        assert NoSettings().encoders == ()


class TestRegistry:
    def test_the_built_in_ones(self):
        assert REGULARIZERS.names[:3] == ("none", "repa", "urepa")
        assert [REGULARIZERS[name].settings for name in ("none", "repa", "urepa")] == [
            NoSettings,
            REPASettings,
            UREPASettings,
        ]
        assert [REGULARIZERS[name].load() for name in ("repa", "urepa")] == [REPA, UREPA]
        assert all(issubclass(REGULARIZERS[name].load(), Regularizer) for name in ("repa", "urepa"))
        assert not any(REGULARIZERS.origin(name) for name in ("none", "repa", "urepa"))

    def test_a_class_has_the_settings_by_which_it_is_registered(self):
        for name in ("repa", "urepa"):
            assert REGULARIZERS[name].load().Settings is REGULARIZERS[name].settings
            assert REGULARIZERS[name].settings().type == name

    @pytest.mark.parametrize("name, hint", [("repo", "; did you mean 'repa'?"), ("xyz", "")])
    def test_a_name_that_nothing_has(self, name, hint):
        with pytest.raises(UnknownComponentError) as caught:
            REGULARIZERS[name]
        assert str(caught.value) == f"unknown regularizer '{name}'; allowed: {', '.join(REGULARIZERS.names)}{hint}"
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", [NoSettings, REPASettings, UREPASettings, ScheduleSettings, EncoderSettings])
class TestSettings:
    def test_they_are_frozen_and_can_be_keys(self, kind):
        settings = kind()
        with pytest.raises(ValidationError, match="frozen"):
            setattr(settings, next(iter(kind.model_fields)), "x")
        assert {settings: 1}[kind()] == 1

    def test_a_field_that_there_is_not_is_refused(self, kind):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            kind(nonsense=1)

    def test_every_field_says_what_it_is(self, kind):
        assert [
            name
            for name, field in kind.model_fields.items()
            if not (field.description or field.exclude or name == "type")
        ] == []


@pytest.mark.parametrize("value", [True, "0.5", float("nan"), float("inf"), -0.1])
def test_a_weight_is_a_number_of_0_or_more(value):
    with pytest.raises(ValidationError, match="weight"):
        REPASettings(weight=value)
