"""Ranges of axes: the values that a person would have listed, and so the arms and runs of the list."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from repa_lab.spec import Arm, SpecError, load_spec
from repa_lab.spec.identity import identify
from repa_lab.spec.options import RangeConfig
from tests.spec.examples import HEAD, REPA, mapping, write


def values(**form) -> list:
    return RangeConfig.model_validate(form).values


def ids(arms: tuple[Arm, ...]) -> list[str]:
    return [identify(arm.config, 0, 1, "d", {}).run_id for arm in arms]


class TestValues:
    @pytest.mark.parametrize(
        "numbers, expected",
        [
            ([4, 12, 4], [4, 8, 12]),
            ([4, 11, 4], [4, 8]),
            ([0, 1, 0.1], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
            ([-0.3, 0.3, 0.1], [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]),
            ([3, 1, -1], [3, 2, 1]),
            ([1e-5, 4e-5, 1e-5], [1e-5, 2e-5, 3e-5, 4e-5]),
            ([7, 7, 1], [7]),
        ],
    )
    def test_a_range_includes_its_stop_where_it_falls_on_a_step(self, numbers, expected):
        assert values(range=numbers) == expected

    def test_a_linspace_is_what_decimals_say(self):
        assert values(linspace=[0, 1, 11]) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
        assert values(linspace=[1.0, 0.0, 3]) == [1.0, 0.5, 0.0]
        assert values(linspace=[1, 9, 5]) == [1, 3, 5, 7, 9]
        assert values(linspace=[0, 1, 9]) == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
        noisy = np.linspace(0, 1, 11).tolist()
        assert noisy[3] == 0.30000000000000004
        np.testing.assert_allclose(values(linspace=[0, 1, 11]), noisy, rtol=1e-15)

    def test_a_logspace_keeps_what_is_exact(self):
        assert values(logspace=[1e-4, 1e-1, 4]) == [1e-4, 1e-3, 1e-2, 1e-1]
        assert values(logspace=[1, 16, 5]) == [1, 2, 4, 8, 16]
        assert values(logspace=[0.1, 10, 3]) == [0.1, 1.0, 10.0]
        assert values(logspace=[16, 1, 3]) == [16, 4, 1]

    def test_what_no_short_decimal_is_has_six_digits(self):
        assert values(linspace=[0, 1, 4]) == [0, 0.333333, 0.666667, 1]
        assert values(logspace=[0.1, 1.0, 5]) == [0.1, 0.177828, 0.316228, 0.562341, 1.0]
        np.testing.assert_allclose(values(logspace=[0.07, 3.1, 23]), np.geomspace(0.07, 3.1, 23), rtol=5e-6)

    def test_or_as_many_as_tell_them_apart(self):
        close = values(linspace=[1, 1.00001, 8])
        assert len(set(close)) == 8
        assert close[1] == 1.000001
        assert close == sorted(close)

    @pytest.mark.parametrize("ends", [(0.1, 0.7), (1, 7), (3.0, 1000.5), (1e-8, 2e-3)])
    @pytest.mark.parametrize("form", ["linspace", "logspace"])
    def test_both_ends_are_themselves_and_the_count_is_met(self, form, ends):
        for count in (2, 3, 7, 100):
            found = values(**{form: [*ends, count]})
            assert (found[0], found[-1], len(found)) == (*ends, count)
            assert all(one < other for one, other in itertools.pairwise(found))

    def test_integers_stay_integers_and_floats_floats(self):
        assert [type(v) for v in values(range=[1, 3, 1])] == [int] * 3
        assert [type(v) for v in values(linspace=[1, 9, 5])] == [int] * 5
        assert [type(v) for v in values(logspace=[1, 16, 5])] == [int] * 5
        assert [type(v) for v in values(range=[1.0, 3, 1])] == [float] * 3
        assert [type(v) for v in values(linspace=[1, 2, 3])] == [int, float, int]


class TestArms:
    @pytest.mark.parametrize(
        "span, listed",
        [
            ({"logspace": [0.1, 1.0, 5]}, [0.1, 0.177828, 0.316228, 0.562341, 1.0]),
            ({"linspace": [0, 1, 11]}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
            ({"range": [0, 3, 1]}, [0, 1, 2, 3]),
        ],
    )
    @pytest.mark.parametrize("key", ["axes", "one_at_a_time"])
    def test_they_are_those_of_the_list(self, key, span, listed):
        base = {"type": "repa", "encoder": {"name": "dinov2_vits14"}}
        given, by_hand = (
            load_spec(mapping(regularizer=base, **{key: {"regularizer.weight": v}})) for v in (span, listed)
        )
        assert given.arms == by_hand.arms
        assert ids(given.arms) == ids(by_hand.arms)
        assert len(set(ids(given.arms))) >= len(listed)

    def test_labels_are_what_can_be_typed(self):
        axes = {"regularizer.weight": {"logspace": [0.1, 1.0, 3]}, "train.steps": {"range": [1, 3, 2]}}
        assert [arm.label for arm in load_spec(mapping(regularizer={"type": "repa"}, axes=axes)).arms] == [
            "weight=0.1, steps=1",
            "weight=0.1, steps=3",
            "weight=0.316228, steps=1",
            "weight=0.316228, steps=3",
            "weight=1, steps=1",
            "weight=1, steps=3",
        ]

    def test_a_value_can_be_excluded(self):
        more = {
            "axes": {"regularizer.weight": {"linspace": [0, 1, 11]}},
            "exclude": [{"regularizer.weight": [0.3, 0.7]}],
        }
        assert len(load_spec(mapping(regularizer={"type": "repa"}, **more)).arms) == 9

    def test_a_named_axis_may_have_a_level_of_the_name(self):
        axes = {"size": {"range": {"model.size": "S/2"}, "linspace": {"model.size": "B/2"}, "logspace": None}}
        assert [arm.label for arm in load_spec(mapping(axes=axes)).arms] == ["range", "linspace", "logspace"]

    def test_a_range_replaces_whatever_the_axis_was(self, tmp_path):
        write(tmp_path, HEAD + "axes: {train.lr: {linspace: [0.1, 0.2, 2]}, a: {x: {}}}\n", "p.yaml")
        file = write(tmp_path, "base: p.yaml\naxes: {train.lr: {range: [1, 3, 1]}}\n")
        assert [arm.label for arm in load_spec(file).arms] == ["x, lr=1", "x, lr=2", "x, lr=3"]
        over = load_spec(file, {"axes": {"train.lr": {"logspace": [1, 10, 2]}}})
        assert [arm.label for arm in over.arms] == ["x, lr=1", "x, lr=10"]

    def test_problems_stand_at_the_range(self, tmp_path):
        file = write(tmp_path, HEAD + "axes: {regularizer.block_index: {linspace: [1, 2, 3]}}\n" + REPA)
        with pytest.raises(SpecError) as caught:
            load_spec(file)
        assert str(caught.value) == f"{file}:5:34: regularizer.block_index: expected an integer or mid, got 1.5"

    def test_a_thousand_wrong_values_are_one_line(self, tmp_path):
        file = write(tmp_path, HEAD + "axes: {regularizer.weight: {range: [-1, -1000, -1]}}\n" + REPA)
        with pytest.raises(SpecError) as caught:
            load_spec(file)
        assert str(caught.value) == (
            f"{file}:5:29: regularizer.weight: expected a number of at least 0.0, got -1; and 999 more of the kind here"
        )

    def test_ten_thousand_arms_are_the_most(self):
        full = {"axes": {"train.lr": {"linspace": [0.1, 1, 100]}, "train.steps": {"range": [1, 100, 1]}}}
        for more in ({"one_at_a_time": {"train.ema": [0.5]}}, {"include": [{"label": "a", "set": {}}]}):
            with pytest.raises(SpecError) as caught:
                load_spec(mapping(**full, **more))
            assert str(caught.value) == "<given>: axes: 10,001 arms; at most 10,000"
        stars = {"train.lr": {"linspace": [0.1, 1, 6000]}, "train.ema": {"linspace": [0.1, 0.9, 6000]}}
        with pytest.raises(SpecError) as caught:
            load_spec(mapping(one_at_a_time=stars))
        assert str(caught.value) == "<given>: one_at_a_time: 12,001 arms; at most 10,000"
