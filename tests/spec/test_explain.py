"""Who set each resolved value, and what differs between two experiments or runs."""

from __future__ import annotations

import pytest

from repa_lab.align.settings import RegularizerSettings
from repa_lab.spec import SpecError, load_spec
from repa_lab.spec.explain import Difference, Setting, compare_specs, differences, dotted, explain, flatten
from repa_lab.spec.identity import Run
from repa_lab.spec.schema import SECTIONS, RunConfig, SpecFile
from tests.spec.examples import HEAD, mapping, write


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, HEAD + "regularizer: {type: repa, weight: 1}\nseeds: [4, 2]\n", "base.yaml")
    write(tmp_path, "evaluate:\n  every: 5\n", "with.yaml")
    return write(
        tmp_path.relative_to(tmp_path),
        "base: base.yaml\nname: mine\naxes:\n  train.lr: [1e-3, 1e-4]\n  t:\n    a: {regularizer.encoder: {name: x}}\n    b:\n"
        "search: {space: {train.ema: {uniform: [0.1, 0.5]}}}\nstop: {below: 3}\n",
    )


def sources(experiment, *given) -> dict[str, list[tuple]]:
    found: dict[str, list[tuple]] = {}
    for one in explain(experiment, *given):
        found.setdefault(one.path, []).append((one.value, one.source))
    return found


class TestExplain:
    def test_each_value_has_the_place_that_set_it(self, file):
        found = sources(load_spec(file, {"train.steps": 7, "run.workers": 2}, ["with.yaml"]))
        assert found["name"] == [("mine", "q.yaml:2:1")]
        assert found["seeds"] == [([4, 2], "base.yaml:6:1")]
        assert found["regularizer.weight"] == [(1.0, "base.yaml:5:27")]
        assert found["evaluate.every"] == [(5, "with.yaml:2:3")]
        assert found["train.steps"] == [(7, "--set")]
        assert found["run.workers"] == [(2, "--set")]
        assert found["train.ema"] == [(0.9999, "default")]
        assert found["budget.gpu_hours"] == [(None, "default")]
        assert found["stop.below"] == [(3.0, "q.yaml:9:8")]
        assert found["stop.metric"] == [("frechet", "default")]
        assert found["search.space.train.ema.uniform"] == [([0.1, 0.5], "q.yaml:8:30")]

    def test_what_varies_has_a_row_for_each_value_with_its_arms(self, file):
        rates = explain(load_spec(file), "train.lr")
        assert rates == [
            Setting("train.lr", 0.001, "q.yaml:4:14", ("lr=0.001, a", "lr=0.001, b")),
            Setting("train.lr", 0.0001, "q.yaml:4:20", ("lr=0.0001, a", "lr=0.0001, b")),
        ]
        names = explain(load_spec(file), "regularizer.encoder.name")
        assert [(one.value, one.source) for one in names] == [("x", "q.yaml:6:9"), ("dinov2_vitg14", "default")]

    def test_one_arm(self, file):
        (rate,) = explain(load_spec(file), "train.lr", "lr=0.0001, b")
        assert rate == Setting("train.lr", 0.0001, "q.yaml:4:20")
        with pytest.raises(
            SpecError, match=r"<given>: --arm: no arm 'lr=0.1, b'; there are: lr=0.001, a; .*; did you mean 'lr="
        ):
            explain(load_spec(file), None, "lr=0.1, b")

    def test_a_section(self, file):
        found = explain(load_spec(file), "evaluate.sampler")
        assert [one.path for one in found] == [f"evaluate.sampler.{name}" for name in ("type", "solver", "steps")]

    def test_a_field_inside_null_is_the_null(self, file):
        assert explain(load_spec(file), "evaluate.encoder.name") == [Setting("evaluate.encoder", None, "default")]

    def test_a_list_of_sections_is_gone_into(self, tmp_path):
        text = (
            "regularizer: {type: repa, encoder: [{name: x}, {name: y, cache: false}]}\nstop: [{below: 1}, {above: 9}]\n"
        )
        found = sources(load_spec(write(tmp_path, HEAD + text)))
        assert found["regularizer.encoder.1.cache"] == [(False, f"{tmp_path}/q.yaml:5:58")]
        assert found["regularizer.encoder.0.cache"] == [(True, "default")]
        assert found["stop.1.above"] == [(9.0, f"{tmp_path}/q.yaml:6:21")]

    @pytest.mark.parametrize(
        "path, message",
        [
            ("regularizer.wieght", "unknown field 'wieght'; allowed: .*; did you mean 'weight'?"),
            ("zzz", "unknown field 'zzz'; allowed: axes, "),
            ("train.lr.x", "'train.lr' is a value, so it has no field 'x'"),
            ("axes", "axes: 'axes' is resolved into the rest: ask for a field that it sets"),
            ("axes.train.lr", "axes.train.lr: 'axes' is resolved into the rest"),
            ("base", "'base' is resolved into the rest"),
            ("", "unknown field ''"),
        ],
    )
    def test_unknown_paths(self, file, path, message):
        with pytest.raises(SpecError, match=message):
            explain(load_spec(file), path)

    def test_what_a_program_gave(self):
        (one,) = explain(load_spec(mapping(), {"train.lr": 0.5}), "train.lr")
        assert (one.value, one.source) == (0.5, "<given>")

    def test_every_field_of_every_section_is_there(self, file):
        paths = {one.path for one in explain(load_spec(file))}
        for name in SECTIONS:
            annotation = RunConfig.model_fields[name].annotation
            section = RegularizerSettings if name == "regularizer" else annotation
            for field in section.model_fields.keys() - {"name"}:  # a list's regularizers alone have names
                assert any(path == f"{name}.{field}" or path.startswith(f"{name}.{field}.") for path in paths), field
        tops = {path.split(".")[0] for path in paths}
        assert tops == set(SpecFile.model_fields) - {"base", "use", "axes", "one_at_a_time", "exclude", "include"}


def test_flatten():
    value = {"a": {"b": [1, {"x": 2}], "c": {}}, "d": [{"e": 1}, {"e": 2}], "f": []}
    leaves = {dotted(path): leaf for path, leaf in flatten(value)}
    assert leaves == {"a.b": [1, {"x": 2}], "a.c": {}, "d.0.e": 1, "d.1.e": 2, "f": []}


class TestSpecs:
    def test_a_spec_differs_not_from_itself(self, file):
        assert compare_specs(load_spec(file), load_spec(file)).is_empty

    def test_arms_and_fields(self):
        axes = {"train.lr": [1e-3, 1e-4]}
        one = load_spec(mapping(axes=axes, seeds=2, compare={"targets": {"fid": [30]}}))
        other = load_spec(
            mapping(axes={"train.lr": [1e-4, 1e-5]}, seeds=3, train={"steps": 20}, budget={"gpu_hours": 1})
        )
        found = compare_specs(one, other)
        assert (found.removed, found.added) == (("lr=0.001",), ("lr=1e-05",))
        assert found.fields == (
            Difference("seeds", (2,), (3,)),
            Difference("compare.targets.fid", ((30.0,),), None),
            Difference("budget.gpu_hours", (None,), (1.0,)),
            Difference("train.steps", (10,), (20,)),
        )

    def test_what_differs_in_some_arms_names_them(self):
        levels = [{"a": {"train.lr": 1e-3}, "b": {"train.lr": rate}} for rate in (1e-4, 1e-5)]
        one, other = (load_spec(mapping(axes={"t": level})) for level in levels)
        assert compare_specs(one, other).fields == (Difference("train.lr", (1e-4,), (1e-5,), ("b",)),)

    def test_without_a_common_arm_the_sections_are_compared(self):
        one = load_spec(mapping(axes={"train.lr": [1e-3]}, train={"steps": 5}))
        other = load_spec(mapping(axes={"train.lr": [1e-4]}, train={"steps": 6}))
        assert compare_specs(one, other).fields == (Difference("train.steps", (5,), (6,)),)

    def test_a_default_written_out_is_no_difference(self):
        settings = {"type": "repa"}
        one = load_spec(mapping(regularizer=settings))
        other = load_spec(mapping(regularizer={**settings, "weight": 0.5}, run={"workers": None}, seeds=1))
        assert compare_specs(one, other).is_empty


def test_runs():
    one, other = (
        Run("x", load_spec(mapping(), {"train.lr": lr}).arms[0].config, seed) for lr, seed in ((1e-3, 0), (1e-4, 1))
    )
    assert differences(one.to_json(), one.to_json()) == []
    assert differences(one.to_json(), other.to_json()) == [
        Difference("train.lr", (1e-3,), (1e-4,)),
        Difference("seed", (0,), (1,)),
    ]
