from __future__ import annotations

from typing import Any

import pytest

from repa_lab.spec import SpecError, load_spec
from repa_lab.spec.document import value_at
from tests.spec import examples
from tests.spec.examples import HEAD, REPA, write

TEACHERS = {
    "small": {"regularizer.encoder.name": "dinov2_vits14", "regularizer.encoder.image_size": 224},
    "giant": {"regularizer.encoder.name": "dinov2_vitg14", "regularizer.encoder.image_size": 518},
}


def mapping(**more) -> dict[str, Any]:
    """A minimal spec that aligns."""
    return examples.mapping(**{"regularizer": {"type": "repa"}, **more})


def labels(**more) -> list[str]:
    return [arm.label for arm in load_spec(mapping(**more)).arms]


def test_no_axes_are_one_arm():
    (arm,) = load_spec(mapping()).arms
    assert (arm.label, dict(arm.levels)) == ("all", {})


class TestAxes:
    def test_the_product_in_the_order_of_declaration_the_last_axis_fastest(self):
        arms = load_spec(mapping(axes={"regularizer.weight": [0.5, 0.25], "train.lr": [1e-3, 1e-4, 1e-5]})).arms
        settings = [(arm.config.regularizer.weight, arm.config.train.lr) for arm in arms]
        assert settings == [(w, lr) for w in (0.5, 0.25) for lr in (1e-3, 1e-4, 1e-5)]
        assert arms[0].label == "weight=0.5, lr=0.001"
        assert dict(arms[5].levels) == {"regularizer.weight": "weight=0.25", "train.lr": "lr=1e-05"}

    def test_the_order_is_that_of_the_file(self, tmp_path):
        text = HEAD + REPA + "axes:\n  train.lr: [1e-3, 1e-4]\n  regularizer.weight: [0.5, 0.25]\n"
        arms = load_spec(write(tmp_path, text)).arms
        assert [arm.label for arm in arms][:2] == ["lr=0.001, weight=0.5", "lr=0.001, weight=0.25"]

    def test_fields_of_one_name_are_told_apart_by_what_they_belong_to(self):
        axes = {"train.steps": [5, 6], "evaluate.sampler.steps": [5], "train.lr": [0.1]}
        assert labels(axes=axes) == ["train.steps=5, sampler.steps=5, lr=0.1", "train.steps=6, sampler.steps=5, lr=0.1"]
        names = {"regularizer.encoder.name": ["a"], "evaluate.encoder.name": ["a"]}
        assert labels(one_at_a_time=names) == ["all", "regularizer.encoder.name=a", "evaluate.encoder.name=a"]
        (arm,) = load_spec(mapping()).arms
        assert (
            arm.with_settings({"train.steps": 5, "evaluate.sampler.steps": 6}).label == "train.steps=5, sampler.steps=6"
        )

    def test_a_named_axis_bundles_settings(self):
        arms = load_spec(mapping(axes={"teacher": TEACHERS, "regularizer.weight": [1.0]})).arms
        assert [arm.label for arm in arms] == ["small, weight=1", "giant, weight=1"]
        encoders = [(arm.config.regularizer.encoder.name, arm.config.regularizer.encoder.image_size) for arm in arms]
        assert encoders == [("dinov2_vits14", 224), ("dinov2_vitg14", 518)]
        assert arms[0].levels["teacher"] == "small"

    def test_a_level_may_set_nothing(self):
        arms = load_spec(
            mapping(regularizer={"type": "repa", "weight": 0.1}, axes={"a": {"as_is": None, "too": {}}})
        ).arms
        assert [(arm.label, arm.config.regularizer.weight) for arm in arms] == [("as_is", 0.1), ("too", 0.1)]

    def test_a_mapping_as_a_value_merges_into_the_section(self):
        base = {"type": "repa", "encoder": {"name": "a", "image_size": 224}}
        arms = load_spec(
            mapping(regularizer=base, axes={"regularizer.encoder": [{"name": "b"}, {"image_size": 14}]})
        ).arms
        encoders = [arm.config.regularizer.encoder for arm in arms]
        assert [(e.name, e.image_size) for e in encoders] == [("b", 224), ("a", 14)]

    def test_null_is_a_value(self):
        arms = load_spec(mapping(axes={"train.grad_clip": [None, 0.5]})).arms
        assert [(arm.label, arm.config.train.grad_clip) for arm in arms] == [
            ("grad_clip=None", None),
            ("grad_clip=0.5", 0.5),
        ]

    def test_a_later_axis_lies_over_an_earlier_one(self):
        axes = {"x": {"on": {"regularizer.type": "repa"}}, "y": {"base": {"regularizer.type": "none"}, "as_is": None}}
        types = [arm.config.regularizer.type for arm in load_spec(mapping(axes=axes)).arms]
        assert types == ["none", "repa"]

    def test_arms_do_not_share_settings(self):
        encoder = {"name": "a"}
        spec = mapping(regularizer={"type": "repa", "encoder": encoder}, evaluate={"encoder": encoder})
        spec["axes"] = {"regularizer.encoder.name": ["b", "c"]}
        arms = load_spec(spec).arms
        assert [arm.config.regularizer.encoder.name for arm in arms] == ["b", "c"]
        assert [arm.config.evaluate.encoder.name for arm in arms] == ["a", "a"]

    def test_an_alias_in_a_file_is_not_shared_either(self, tmp_path):
        text = HEAD + "regularizer: {type: repa, encoder: &e {name: a}}\nevaluate: {encoder: *e}\n"
        arms = load_spec(write(tmp_path, text + "axes: {regularizer.encoder.name: [b]}\n")).arms
        assert arms[0].config.regularizer.encoder.name == "b"
        assert arms[0].config.evaluate.encoder.name == "a"

    def test_labels_tell_close_numbers_apart(self):
        assert labels(axes={"train.lr": [0.00012341, 0.00012342, 1e-4, 3.0]}) == [
            "lr=0.00012341",
            "lr=0.00012342",
            "lr=0.0001",
            "lr=3",
        ]

    def test_too_many_arms_are_refused_before_they_are_made(self):
        axes = {f"train.{name}": list(range(1, 1001)) for name in ("steps", "batch_size", "lr", "grad_clip")}
        with pytest.raises(SpecError) as caught:
            load_spec(mapping(axes=axes))
        assert str(caught.value) == "<given>: axes: 1,000,000,000,000 arms; at most 10,000"

    def test_problems_of_all_arms_are_told_once_each(self, tmp_path):
        text = HEAD + "axes:\n  train.lr: [1, -1, x]\n  regularizer.weight: [1, -1]\n" + REPA
        with pytest.raises(SpecError) as caught:
            load_spec(write(tmp_path, text))
        assert [(p.place.line, p.place.column, p.path) for p in caught.value.problems] == [
            (6, 17, "train.lr"),
            (6, 21, "train.lr"),
            (7, 27, "regularizer.weight"),
        ]


class TestStarsAndExtras:
    def test_a_star_changes_one_field_at_a_time(self):
        spec = mapping(one_at_a_time={"regularizer.weight": [0.25, 1.0], "train.lr": [1e-3]})
        arms = load_spec(spec).arms
        assert [arm.label for arm in arms] == ["all", "weight=0.25", "weight=1", "lr=0.001"]
        assert [(arm.config.regularizer.weight, arm.config.train.lr) for arm in arms] == [
            (0.5, 1e-4),
            (0.25, 1e-4),
            (1.0, 1e-4),
            (0.5, 1e-3),
        ]

    def test_products_then_stars_then_extras(self):
        include = [{"label": "baseline", "set": {"regularizer.type": "none", "train.lr": 0.5}}]
        spec = mapping(regularizer={"type": "repa"}, include=include)
        spec |= {"axes": {"train.lr": [1e-3, 1e-4]}, "one_at_a_time": {"train.steps": [20]}}
        arms = load_spec(spec).arms
        assert [arm.label for arm in arms] == ["lr=0.001", "lr=0.0001", "steps=20", "baseline"]
        assert dict(arms[3].levels) == {"include": "baseline"}
        assert (arms[3].config.regularizer.type, arms[3].config.train.lr) == ("none", 0.5)


@pytest.mark.parametrize("name", ["two\nlines", "block\n", "bell\a", "esc\x1b[2J", "separator\u2028"])
def test_an_arm_is_called_by_one_line(name):
    for more in (
        {"include": [{"label": name, "set": {}}]},
        {"axes": {"kind": {name: {}, "other": {"train.lr": 1e-3}}}},
    ):
        with pytest.raises(SpecError) as caught:
            labels(**more)
        (problem,) = caught.value.problems
        assert problem.message == f"an arm is called by one line of text, got {name!r}"
    assert labels(include=[{"label": "é½ [x] / `y`|z", "set": {}}])[-1] == "é½ [x] / `y`|z"


class TestExclude:
    AXES = {"teacher": TEACHERS, "regularizer.weight": [0.5, 1.0, 2.0]}  # noqa: RUF012

    def left(self, *rules, **more) -> list[str]:
        return labels(axes=self.AXES, exclude=list(rules), **more)

    def test_by_level_and_by_value(self):
        assert self.left({"teacher": "giant", "regularizer.weight": 0.5}) == [
            "small, weight=0.5",
            "small, weight=1",
            "small, weight=2",
            "giant, weight=1",
            "giant, weight=2",
        ]

    def test_a_list_means_any_of_its_values(self):
        assert self.left({"regularizer.weight": [0.5, 2]}) == ["small, weight=1", "giant, weight=1"]

    def test_every_entry_of_a_rule_must_hold_and_any_rule_suffices(self):
        rules = [{"teacher": "small", "regularizer.weight": 1.0}, {"teacher": "giant"}]
        assert self.left(*rules) == ["small, weight=0.5", "small, weight=2"]

    def test_by_what_a_level_sets(self):
        assert self.left({"regularizer.encoder.image_size": 224, "regularizer.weight": [1, 2]}) == [
            "small, weight=0.5",
            "giant, weight=0.5",
            "giant, weight=1",
            "giant, weight=2",
        ]

    def test_by_a_default_that_nothing_sets(self):
        axes = {"train.lr": [1e-3, 1e-2], "regularizer.type": ["repa", "none"]}
        rule = {"regularizer.loss": "cosine", "train.time": None, "train.lr": 1e-2}
        # The baseline has no loss of that kind, so the rule says nothing of it.
        assert labels(axes=axes, exclude=[rule]) == ["lr=0.001, type=repa", "lr=0.001, type=none", "lr=0.01, type=none"]

    def test_an_arm_that_could_not_be_is_excluded_unjudged(self):
        axes = {"regularizer.encoder.standardize": [True, False], "regularizer.encoder.cache": [True, False]}
        rule = {"regularizer.encoder.standardize": True, "regularizer.encoder.cache": False}
        assert len(labels(axes=axes, exclude=[rule])) == 3
        with pytest.raises(SpecError, match="standardize needs"):
            labels(axes=axes)

    def test_a_null_excludes_null_alone(self):
        axes = {"train.grad_clip": [None, 0.5], "train.lr": [1e-3]}
        assert labels(axes=axes, exclude=[{"train.grad_clip": None}]) == ["grad_clip=0.5, lr=0.001"]
        assert labels(exclude=[{"train.grad_clip": None}]) == ["all"]

    @pytest.mark.parametrize("rule", [{"cutoff_step": 2}, [{"cutoff_step": 2, "type": "constant"}, {"cutoff_step": 4}]])
    def test_a_mapping_speaks_of_the_fields_that_it_names(self, rule):
        axes = {"regularizer.schedule": [{"cutoff_step": 2}, {"cutoff_step": 3}]}
        assert labels(axes=axes, exclude=[{"regularizer.schedule": rule}]) == ["schedule={'cutoff_step': 3}"]
        unknown = {"regularizer.schedule": {"cutoff_step": 2, "type": "linear"}}
        assert len(labels(axes=axes, exclude=[unknown])) == 2

    def test_stars_and_extras_stay(self):
        include = [{"label": "extra", "set": {"regularizer.weight": 0.5}}]
        assert self.left({"teacher": ["small", "giant"]}, include=include) == ["extra"]

    def test_an_axis_that_cannot_be_applied_is_told_all_the_same(self):
        with pytest.raises(SpecError) as caught:
            labels(axes={"trian.lr": [1, 2], "train.lr": [-1]}, exclude=[{"train.lr": 5}])
        assert "an arm varies fields of model" in str(caught.value)


class TestArms:
    def test_with_settings(self, tmp_path):
        text = HEAD + "regularizer: {type: repa, weight: 0.5}\naxes: {train.lr: [1e-3]}\n"
        (arm,) = load_spec(write(tmp_path, text)).arms
        tried = arm.with_settings({"regularizer.weight": 0.1 + 0.2, "regularizer.encoder": {"image_size": 14}})
        assert tried.label == "lr=0.001, weight=0.3, encoder={'image_size': 14}"
        assert (tried.config.regularizer.weight, tried.config.train.lr) == (0.1 + 0.2, 1e-3)
        assert tried.config.regularizer.encoder.image_size == 14
        assert dict(tried.levels) == dict(arm.levels)
        assert arm.config.regularizer.weight == 0.5

    def test_with_settings_that_are_wrong(self):
        (arm,) = load_spec(mapping()).arms
        for path, value, message in [
            ("regularizer.weight", -1.0, "<given>: regularizer.weight: expected a number of at least 0.0, got -1.0"),
            ("train.steps.x", 1, "<given>: train.steps.x: 'train.steps' is a value, so it has no field 'x'"),
        ]:
            with pytest.raises(SpecError) as caught:
                arm.with_settings({path: value})
            assert str(caught.value) == message
        with pytest.raises(SpecError, match="unknown field 'wieght'"):
            arm.with_settings({"regularizer.wieght": 1.0})

    def test_later_problems_find_the_place_that_set_the_value(self, tmp_path):
        text = (
            HEAD + "regularizer: {block_index: 3, type: repa}\naxes:\n  regularizer.encoder.name:\n    - a\n    - b\n"
        )
        text += "  size: {large: {model.size: L/2}}\n"
        arms = load_spec(write(tmp_path, text)).arms
        found = {
            path: arms[1].problem(path, "wrong").place
            for path in ("regularizer.block_index", "regularizer.encoder.name", "model.size", "evaluate.every", "model")
        }
        places = {path: (place.line, place.column) for path, place in found.items()}
        assert places == {
            "regularizer.block_index": (5, 15),
            "regularizer.encoder.name": (9, 7),
            "model.size": (10, 18),
            "evaluate.every": (1, 1),
            "model": (2, 1),
        }
        assert str(arms[1].problem("model.size", "wrong")) == f"{tmp_path}/q.yaml:10:18: model.size: wrong"


def test_value_at():
    value = {"a": {"b": 0, "c": None}}
    paths = ["a.b", "a.c", "a.x", "a.b.x", "a"]
    assert [value_at(value, path) for path in paths] == [0, None, None, None, value["a"]]


@pytest.mark.parametrize("wanted", [[["frechet", "kid"]], ["frechet", "kid"]])
def test_a_rule_knows_a_field_whose_value_is_a_list(wanted):
    axes = {"evaluate.metrics": [["frechet"], ["frechet", "kid"]]}
    kept = load_spec(mapping(axes=axes, exclude=[{"evaluate.metrics": wanted}])).arms
    assert [arm.config.evaluate.metrics for arm in kept] == [("frechet",)]
