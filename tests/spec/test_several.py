"""Several regularizers in a spec: paths into the list, `none` among them, identity, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import jsonschema
import pytest

from repa_lab.spec import Arm, SpecError, load_spec
from repa_lab.spec.document import names_in, paths_in, value_at
from repa_lab.spec.documentation import json_schema
from repa_lab.spec.explain import compare_specs, explain
from repa_lab.spec.identity import Run, identify
from tests.spec.examples import HEAD, mapping, write

TWO = [{"type": "repa", "weight": 0.5}, {"type": "dispersive", "name": "apart", "weight": 0.25}]


def arms(*regularizer: dict[str, Any], overrides: dict[str, Any] | None = None, **more: Any) -> dict[str, Arm]:
    given = {"regularizer": [*regularizer]} if regularizer else {}
    return {arm.label: arm for arm in load_spec(mapping(**given, **more), overrides).arms}


def ids(*regularizer: dict[str, Any], **more: Any) -> dict[str, str]:
    return {label: identify(arm.config, 0, 1, "d", {}).run_id for label, arm in arms(*regularizer, **more).items()}


def weights(arm: Arm) -> dict[str, float]:
    return {path: settings.weight for path, settings in arm.config.regularizer_paths}


def refusals(*regularizer: Any, **more: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        arms(*regularizer, **more)
    return [line.removeprefix("<given>: ") for line in str(caught.value).splitlines()]


class TestPaths:
    VALUE: ClassVar[dict[str, Any]] = {"a": [{"name": "x", "w": 1}, {"w": 2, "b": [{"w": 3}]}], "c": {"d": 4}}

    @pytest.mark.parametrize(
        ("path", "keys", "value"),
        [
            ("a.0.w", [("a", 0, "w")], 1),
            ("a.x.w", [("a", 0, "w")], 1),
            ("a.1.b.0.w", [("a", 1, "b", 0, "w")], 3),
            ("a.w", [("a", 0, "w"), ("a", 1, "w")], None),  # they differ
            ("a.v", [("a", 0, "v"), ("a", 1, "v")], None),
            ("a.2.w", [], None),
            ("c.d", [("c", "d")], 4),
            ("c.e.f", [("c", "e", "f")], None),
        ],
    )
    def test_a_step_is_a_position_a_name_or_a_field_of_every_member(self, path, keys, value):
        assert paths_in(self.VALUE, path.split(".")) == keys
        assert value_at(self.VALUE, path) == value

    def test_members_that_agree_have_one_value(self):
        assert value_at({"a": [{"t": "n"}, {"t": "n"}]}, "a.t") == "n"
        assert names_in(self.VALUE) == {"x"}


class TestSetting:
    def test_by_position_by_name_and_for_all(self):
        for overrides, expected in (
            ({"regularizer.0.weight": 0.1}, (0.1, 0.25)),
            ({"regularizer.apart.weight": 0.1}, (0.5, 0.1)),
            ({"regularizer.weight": 0.1}, (0.1, 0.1)),
            ({"regularizer.1": {"weight": 0.1}}, (0.5, 0.1)),  # merged into the member
            ({"regularizer.1.schedule.cutoff_step": 3}, (0.5, 0.25)),
        ):
            (arm,) = arms(*TWO, overrides=overrides).values()
            assert tuple(weights(arm).values()) == expected
        assert [one.schedule.cutoff_step for one in arm.config.regularizers] == [None, 3]

    def test_axes_and_included_arms(self):
        found = arms(
            *TWO,
            axes={"regularizer.0.weight": [0.1, 0.2], "regularizer.apart.type": ["none", "dispersive"]},
            include=[{"label": "baseline", "set": {"regularizer.type": "none"}}],
        )
        assert {label: weights(arm) for label, arm in found.items()} == {
            "weight=0.1, type=none": {"regularizer.0": 0.1},
            "weight=0.1, type=dispersive": {"regularizer.0": 0.1, "regularizer.1": 0.25},
            "weight=0.2, type=none": {"regularizer.0": 0.2},
            "weight=0.2, type=dispersive": {"regularizer.0": 0.2, "regularizer.1": 0.25},
            "baseline": {},
        }

    def test_a_section_replaces_a_list_and_a_list_a_section(self):
        found = arms(
            *TWO,
            include=[
                {"label": "one", "set": {"regularizer": {"type": "layersync"}}},
                {"label": "three", "set": {"regularizer": [*TWO, {"type": "layersync"}]}},
            ],
        )
        assert [len(arm.config.regularizers) for arm in found.values()] == [2, 1, 3]
        (single,) = found["one"].config.regularizer_paths
        assert single[0] == "regularizer"

    def test_a_member_that_changes_its_type_drops_the_former_types_fields(self):
        (arm,) = arms({"type": "repa", "temperature": 0.3}, TWO[1], overrides={"regularizer.0.type": "sra2"}).values()
        assert arm.config.regularizers[0].type == "sra2"

    def test_a_field_of_another_type_is_ignored_in_a_sweep_over_the_members_type_alone(self):
        first = {"type": "repa", "temperature": 0.3}
        found = ids(first, TWO[1], axes={"regularizer.0.type": ["repa", "sra2"]})
        assert len(set(found.values())) == 2
        (message,) = refusals({"type": "repa"}, {**TWO[1], "temperature": 0.3, "spatial_align": False})
        assert message.startswith("regularizer.1.spatial_align: unknown field 'spatial_align'; allowed: ")

    def test_a_search_varies_a_member(self):
        (arm,) = arms(*TWO).values()
        assert weights(arm.with_settings({"regularizer.apart.weight": 2.0})) == {
            "regularizer.0": 0.5,
            "regularizer.1": 2.0,
        }


class TestConditions:
    FACTORIAL: ClassVar[dict[str, Any]] = {
        "axes": {"regularizer.0.type": ["none", "repa"], "regularizer.apart.type": ["none", "dispersive"]},
    }

    @pytest.mark.parametrize(
        "rule", [{"regularizer.type": "none"}, {"regularizer.0.type": "none", "regularizer.apart.type": "none"}]
    )
    def test_a_field_of_all_members_holds_if_it_holds_of_each(self, rule):
        found = arms(*TWO, **self.FACTORIAL, exclude=[rule])
        assert list(found) == ["0.type=none, apart.type=dispersive", "0.type=repa, apart.type=none",
                               "0.type=repa, apart.type=dispersive"]  # fmt: skip

    def test_by_name(self):
        found = arms(*TWO, **self.FACTORIAL, exclude=[{"regularizer.apart.type": "dispersive"}])
        assert list(found) == ["0.type=none, apart.type=none", "0.type=repa, apart.type=none"]

    def test_a_name_that_no_list_has_is_refused(self):
        (message,) = refusals(*TWO, compare={"baseline": {"regularizer.aprat.type": "none"}})
        assert message.startswith("compare.baseline.regularizer.aprat.type: unknown field 'aprat'; allowed: ")


class TestIdentity:
    def test_none_adds_nothing_to_a_list(self):
        none = {"type": "none"}
        single = ids(regularizer=TWO[0])["all"]
        assert ids(TWO[0])["all"] == ids(TWO[0], none)["all"] == ids(none, TWO[0])["all"] == single
        assert ids({**TWO[0], "name": "main"}, none)["all"] == single
        assert ids(none)["all"] == ids(none, none)["all"] == ids()["all"]

    def test_several_are_told_apart(self):
        found = [
            ids(*TWO),
            ids(*reversed(TWO)),
            ids(TWO[0], {**TWO[1], "weight": 0.2}),
            ids(TWO[0], {"type": "dispersive", "weight": 0.25}),  # its values have other names in the log
            ids(*TWO, {"type": "layersync"}),
            ids(regularizer=TWO[0]),
        ]
        assert len({one["all"] for one in found}) == len(found)

    def test_a_list_of_one_encoder_is_that_encoder_here_too(self):
        encoder = {"name": "efficientnet_lite0"}
        assert ids({**TWO[0], "encoder": [encoder]}, TWO[1]) == ids({**TWO[0], "encoder": encoder}, TWO[1])

    def test_a_recorded_run_is_read_again(self):
        (arm,) = arms(*TWO).values()
        run = Run("r", arm.config, 3)
        assert Run.from_json("r", run.to_json()).config == arm.config


class TestRefusals:
    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ([{"type": "repa", "weight": "a"}], "regularizer.0.weight: expected a number, got 'a'"),
            ([TWO[0], {"type": "dispersiv"}], "regularizer.1.type: unknown regularizer 'dispersiv'; allowed: none, repa, urepa, "),
            ([TWO[0], 3], "regularizer.1: expected a mapping, got 3"),
            ([TWO[0], TWO[0]], "regularizer: two regularizers of the list are called 'repa': give each a name of its own"),
            ([TWO[0], {**TWO[0], "name": "weight"}], "regularizer.1: name 'weight' is a field, so a dotted path could mean either: "
             "take another name"),
            ([TWO[0], {**TWO[0], "name": "1"}], "regularizer.1.name: expected text that matches "),
        ],
    )  # fmt: skip
    def test_each_has_its_place(self, members, message):
        (line,) = refusals(*members)
        assert line.startswith(message)

    def test_neither_a_section_nor_a_list(self):
        assert refusals(regularizer=3) == ["regularizer: expected a mapping or a list, got 3"]
        assert refusals(regularizer=[]) == ["regularizer: expected 1 or more values, got []"]
        assert refusals(regularizer={"type": "repa", "name": "main"}) == [
            "regularizer: name 'main' tells a list's regularizers apart: leave it out, or make a list"
        ]

    def test_a_position_that_is_not_there(self):
        (line,) = refusals(*TWO, axes={"regularizer.2.weight": [0.1, 0.2]})
        assert line == "regularizer.2.weight: the list has no such position; positions begin with 0"

    def test_the_line_and_the_column_of_a_member(self, tmp_path):
        file = write(tmp_path, HEAD + "regularizer:\n  - {type: repa}\n  - {type: sra2, beta: 0}\n")
        with pytest.raises(SpecError) as caught:
            load_spec(file)
        assert str(caught.value) == f"{file}:7:18: regularizer.1.beta: expected a number of more than 0.0, got 0"


class TestExplain:
    def test_every_value_has_its_path_by_position(self):
        experiment = load_spec(mapping(regularizer=TWO))
        for asked in ("regularizer.apart.weight", "regularizer.1.weight"):
            (found,) = explain(experiment, asked)
            assert (found.path, found.value) == ("regularizer.1.weight", 0.25)
        assert [(one.path, one.value) for one in explain(experiment, "regularizer.weight")] == [
            ("regularizer.0.weight", 0.5),
            ("regularizer.1.weight", 0.25),
        ]
        assert "regularizer.1.name" in {one.path for one in explain(experiment)}

    def test_a_difference_of_a_member(self):
        left, right = (load_spec(mapping(regularizer=[TWO[0], {**TWO[1], "weight": w}])) for w in (0.25, 1.0))
        (found,) = compare_specs(left, right).fields
        assert (found.path, found.left, found.right) == ("regularizer.1.weight", (0.25,), (1.0,))


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ({"regularizer": TWO}, True),
        ({"regularizer": [{"type": "repa", "wieght": 1}]}, False),
        ({"regularizer": []}, False),
        ({"axes": {"regularizer.0.weight": [0.1], "regularizer.apart.type": ["none"]}}, True),
        ({"one_at_a_time": {"regularizer.apart.weight": [0.1]}}, True),
        ({"one_at_a_time": {"regularizer.apart.weight": ["heavy"]}}, False),
        ({"one_at_a_time": {"regularizer.apart.wieght": [0.1]}}, False),
        ({"search": {"space": {"regularizer.0.schedule.end": {"log": [0.1, 1]}}}}, True),
        ({"include": [{"label": "a", "set": {"regularizer.1.encoder.name": "x"}}]}, True),
        ({"include": [{"label": "a", "set": {"regularizer.1.encodr.name": "x"}}]}, False),
    ],
)
def test_the_json_schema(text, fits):
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(text) == fits
