"""Files over files: `base`, the fragments of `use`, and what is laid over them."""

from __future__ import annotations

import copy

import pytest

from repa_lab.spec import Place, SpecError, load_spec
from repa_lab.spec.document import Draft, load_draft, plain
from tests.spec.examples import HEAD, mapping, write

PARENT = """\
name: parent
model: {family: sit, size: B/2}
regularizer:
  type: repa
  weight: 0.5
  encoder: {name: dinov2_vitb14, image_size: 224}
data: {source: digits}
train: {steps: 10, lr: 1e-3}
axes:
  train.lr: [1e-3, 1e-4]
seeds: 3
compare: {baseline: {regularizer.type: none}}
"""


def config_of(file):
    return load_spec(file).arms[0].config


def refusal(file) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    return str(caught.value).splitlines()


class TestBase:
    def test_sections_merge_and_scalars_replace(self, tmp_path):
        write(tmp_path, PARENT, "presets/p.yaml")
        child = "base: presets/p.yaml\nname: child\nregularizer: {weight: 1.0, encoder: {image_size: 448}}\naxes: {}\n"
        experiment = load_spec(write(tmp_path, child))
        regularizer = experiment.arms[0].config.regularizer
        assert (experiment.name, experiment.seeds) == ("child", (0, 1, 2))
        assert (regularizer.type, regularizer.weight) == ("repa", 1.0)
        assert (regularizer.encoder.name, regularizer.encoder.image_size) == ("dinov2_vitb14", 448)
        assert experiment.arms[0].config.train.steps == 10

    def test_a_null_and_a_list_replace(self, tmp_path):
        write(tmp_path, HEAD + "regularizer: {type: repa, encoder: {image_size: 448}}\nseeds: [1, 2]\n", "p.yaml")
        experiment = load_spec(
            write(tmp_path, "base: p.yaml\nregularizer: {encoder: {image_size: null}}\nseeds: [7]\n")
        )
        assert experiment.arms[0].config.regularizer.encoder.image_size is None
        assert experiment.seeds == (7,)

    def test_an_axis_replaces_the_axis_of_its_name(self, tmp_path):
        write(tmp_path, PARENT, "p.yaml")
        more = load_spec(write(tmp_path, "base: p.yaml\naxes: {train.batch_size: [1, 2]}\n"))
        assert len(more.arms) == 4
        other = load_spec(write(tmp_path, "base: p.yaml\naxes: {train.lr: [0.5]}\n"))
        assert [arm.config.train.lr for arm in other.arms] == [0.5]

    def test_a_baseline_replaces_whole(self, tmp_path):
        write(tmp_path, PARENT, "p.yaml")
        experiment = load_spec(write(tmp_path, "base: p.yaml\ncompare: {baseline: {train.lr: 1e-3}}\n"))
        assert experiment.compare.baseline == {"train.lr": 0.001}

    def test_what_a_file_replaces_whole_an_override_does_too(self, tmp_path):
        space = "search: {space: {train.lr: {log: [1e-4, 1e-2]}}, objective: {goal: max}}\n"
        file = write(tmp_path, HEAD + space + "compare: {baseline: {regularizer.weight: 0.5}, metric: fid}\n")
        given = {"search.space": {"train.lr": {"choice": [0.1]}}, "compare.baseline": {"train.lr": 1e-3}}
        over, under = load_spec(file, given), load_spec(file)
        assert over.compare.baseline == {"train.lr": 0.001} and over.compare.metric == "fid"
        assert {path: one.choice for path, one in over.search.space.items()} == {"train.lr": [0.1]}
        assert over.search.objective == under.search.objective
        axes = {"teacher": {"small": {"train.lr": 0.1}}, "train.batch_size": [1, 2]}
        assert (
            len(load_spec(mapping(axes=axes), {"axes.teacher": {"large": {}, "larger": {"train.lr": 0.2}}}).arms) == 4
        )

    def test_a_base_is_relative_to_the_file_that_names_it(self, tmp_path):
        write(tmp_path, HEAD, "a/deep/root.yaml")
        write(tmp_path, "base: deep/root.yaml\ntrain: {lr: 0.5}\n", "a/middle.yaml")
        file = write(tmp_path, "base: ../a/middle.yaml\ntrain: {steps: 99}\n", "b/leaf.yaml")
        train = config_of(file).train
        assert (train.steps, train.lr) == (99, 0.5)

    def test_an_error_stands_in_the_file_that_made_it(self, tmp_path):
        write(tmp_path, HEAD + "regularizer:\n  weight: heavy\n  encoder: {name: x}\n  type: repa\n", "p.yaml")
        lines = refusal(write(tmp_path, "base: p.yaml\nregularizer: {encoder: {nam: y}}\ntrain: {lr: -1}\n"))
        places = [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in lines]
        assert places == ["p.yaml:6:3", "q.yaml:2:25", "q.yaml:3:9"]

    def test_a_child_that_mends_its_parent_is_sound(self, tmp_path):
        write(tmp_path, HEAD + "regularizer: {type: repa, weight: heavy}\n", "p.yaml")
        assert config_of(write(tmp_path, "base: p.yaml\nregularizer: {weight: 2}\n")).regularizer.weight == 2.0

    def test_what_a_child_replaced_leaves_no_places_behind(self, tmp_path):
        write(tmp_path, HEAD + "seeds:\n  - 1\n  - 2\n  - 3\n", "p.yaml")
        (line,) = refusal(write(tmp_path, "base: p.yaml\nname: q\nseeds: [1, x]\n"))
        assert line == f"{tmp_path}/q.yaml:3:12: seeds.1: expected an integer, got 'x'"

    def test_circles_are_refused_where_they_close(self, tmp_path):
        write(tmp_path, "base: b.yaml\n", "a.yaml")
        write(tmp_path, "name: b\nbase: sub/../c.yaml\n", "b.yaml")
        write(tmp_path, "base: a.yaml\n", "c.yaml")
        (tmp_path / "sub").mkdir()
        assert refusal(tmp_path / "a.yaml") == [
            f"{tmp_path}/sub/../c.yaml:1:1: base: '{tmp_path}/sub/../a.yaml' is already among the bases: base runs in a circle"
        ]

    def test_a_circle_through_a_link(self, tmp_path):
        file = write(tmp_path, "base: link.yaml\n")
        (tmp_path / "link.yaml").symlink_to(file)
        assert refusal(file) == [
            f"{file}:1:1: base: '{tmp_path}/link.yaml' is already among the bases: base runs in a circle"
        ]

    @pytest.mark.parametrize("name", ["none.yaml", "sub", "x" * 300, "loop.yaml"])
    def test_what_is_no_file(self, tmp_path, name):
        (tmp_path / "sub").mkdir()
        (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
        assert refusal(write(tmp_path, f"name: q\nbase: {name}\n")) == [
            f"{tmp_path}/q.yaml:2:1: base: no file '{tmp_path}/{name}'; base is relative to the file that names it"
        ]

    def test_a_base_that_is_not_yaml(self, tmp_path):
        write(tmp_path, "a: [\n", "p.yaml")
        (line,) = refusal(write(tmp_path, "base: p.yaml\n"))
        assert line.startswith(f"{tmp_path}/p.yaml:2:1: not valid YAML")

    def test_only_a_file_can_have_a_base(self):
        with pytest.raises(
            SpecError, match=r"<given>: base: only a spec file can name other files; give a mapping whole"
        ):
            load_spec(mapping(base="p.yaml"))


class TestFragments:
    def test_they_lie_between_the_base_and_the_file_in_order(self, tmp_path):
        write(tmp_path, HEAD + "run: {log_every: 1, workers: 1}\nseeds: 1\n", "p.yaml")
        write(tmp_path, "train: {steps: 20, lr: 0.1}\nseeds: 2\n", "f/one.yaml")
        write(tmp_path, "train: {steps: 30, ema: 0.5}\nseeds: 3\nrun: {workers: 2}\n", "f/two.yaml")
        experiment = load_spec(write(tmp_path, "base: p.yaml\nuse: [f/one.yaml, f/two.yaml]\ntrain: {ema: 0.25}\n"))
        train = experiment.arms[0].config.train
        assert (train.steps, train.lr, train.ema) == (30, 0.1, 0.25)
        assert (experiment.run.log_every, experiment.run.workers) == (1, 2)
        assert len(experiment.seeds) == 3

    def test_an_error_stands_in_the_fragment(self, tmp_path):
        write(tmp_path, "train: {lr: -1}\n", "f.yaml")
        (line,) = refusal(write(tmp_path, HEAD + "use: [f.yaml]\n"))
        assert line.startswith(f"{tmp_path}/f.yaml:1:9: train.lr: ")

    def test_they_name_no_further_files(self, tmp_path):
        write(tmp_path, "base: q.yaml\n", "f.yaml")
        assert refusal(write(tmp_path, HEAD + "use: [f.yaml]\n")) == [
            f"{tmp_path}/f.yaml:1:1: base: a fragment names no further files"
        ]

    @pytest.mark.parametrize("name", ["none.yaml", "5", '"a\\0b"'])
    def test_what_is_no_file_is_refused_where_it_is_named(self, tmp_path, name):
        write(tmp_path, "{}", "f.yaml")
        (line,) = refusal(write(tmp_path, HEAD + f"use:\n  - f.yaml\n  - {name}\n"))
        assert line.startswith(f"{tmp_path}/q.yaml:7:5: use: no file ")


class TestFragmentsGivenApart:
    """Those of ``--with``."""

    def test_they_lie_over_the_file_in_order_and_under_the_overrides(self, tmp_path):
        write(tmp_path, "train: {steps: 20, lr: 0.1, ema: 0.1}\nseeds: 2\n", "one.yaml")
        write(tmp_path, "train: {lr: 0.2, ema: 0.2}\nstop: {below: 3}\n", "two.yaml")
        write(tmp_path, "train: {batch_size: 9, steps: 1}\nstop: {above: 2, metric: fid}\n", "used.yaml")
        file = write(tmp_path, HEAD + "use: used.yaml\n")
        experiment = load_spec(file, {"train.ema": 0.3}, [tmp_path / "one.yaml", str(tmp_path / "two.yaml")])
        train = experiment.arms[0].config.train
        assert (train.batch_size, train.steps, train.lr, train.ema) == (9, 20, 0.2, 0.3)
        assert experiment.seeds == (0, 1)
        assert [(rule.metric, rule.below, rule.above) for rule in experiment.stop] == [("frechet", 3.0, None)]

    def test_an_axis_multiplies_or_takes_the_place_of_the_one_of_its_name(self, tmp_path):
        write(tmp_path, "axes: {train.lr: [1.0, 2.0, 3.0], train.ema: {linspace: [0.1, 0.5, 2]}}\n", "f.yaml")
        file = write(tmp_path, HEAD + "axes: {train.lr: [0.5], t: {x: {}, y: {}}}\n")
        labels = [arm.label for arm in load_spec(file, None, [tmp_path / "f.yaml"]).arms]
        assert len(labels) == 2 * 3 * 2
        assert labels[0] == "x, lr=1, ema=0.1"

    def test_what_is_wrong_stands_in_them(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        file = write(tmp_path, HEAD)
        write(tmp_path, "seeds: 2\ntrain:\n  lr: -1\n", "f.yaml")
        write(tmp_path, "use: f.yaml\nname: q\nbase: q.yaml\n", "g.yaml")
        for fragments, expected in (
            (["f.yaml"], ["f.yaml:3:3: train.lr: expected a number of more than 0.0, got -1"]),
            (["none.yaml"], ["none.yaml:1:1: cannot read the file: No such file or directory"]),
            (
                ["g.yaml"],
                [
                    "g.yaml:1:1: use: a fragment names no further files",
                    "g.yaml:3:1: base: a fragment names no further files",
                ],
            ),
        ):
            with pytest.raises(SpecError) as caught:
                load_spec(file, None, fragments)
            assert str(caught.value).splitlines() == expected

    def test_a_mapping_takes_them_as_well(self, tmp_path):
        write(tmp_path, "train: {lr: 0.5}\n", "f.yaml")
        assert load_spec(mapping(), {}, [tmp_path / "f.yaml"]).arms[0].config.train.lr == 0.5


class TestPlain:
    def test_it_copies_and_shares_nothing(self):
        encoder = {"name": "x", "sizes": (1, 2)}
        source = mapping(regularizer={"encoder": encoder}, evaluate={"encoder": encoder})
        before = copy.deepcopy(source)
        value = plain(source)
        value["regularizer"]["encoder"]["name"] = "y"
        value["train"]["steps"] = 99
        assert source == before
        assert value["evaluate"]["encoder"] == {"name": "x", "sizes": [1, 2]}

    @pytest.mark.parametrize(
        "value, message",
        [
            (object(), "expected text, a number, true, false, null, a list or a mapping, got object"),
            ({1, 2}, "expected text, a number, true, false, null, a list or a mapping, got set"),
            (b"x", "expected text, a number, true, false, null, a list or a mapping, got bytes"),
            (1j, "expected text, a number, true, false, null, a list or a mapping, got complex"),
            ({1: 2}, "a key must be text, got int"),
            ({None: 2}, "a key must be text, got NoneType"),
            ([10**5000], "a number of more than 100 digits"),
        ],
    )
    def test_it_refuses_what_a_file_could_not_say(self, value, message):
        with pytest.raises(SpecError) as caught:
            plain({"a": [0, {"b": value}]})
        where = "a.1.b.0" if isinstance(value, list) else "a.1.b"
        assert str(caught.value) == f"<given>: {where}: {message}"

    def test_it_refuses_what_has_no_end(self):
        loop: dict = {}
        loop["a"] = [loop, loop]
        wide: list = []
        for _ in range(30):
            wide = [wide, wide]
        for value in (loop, {"a": wide}):
            with pytest.raises(SpecError, match="more than 20,000 values or 40 levels"):
                plain(value)


class TestDraft:
    def test_a_mapping_merges_and_anything_else_replaces(self):
        draft = Draft({"a": {"b": 1, "c": {"d": 2}}})
        draft.set("a.c", {"e": 3}, Place(None, 7))
        draft.set("a.b", [1], Place(None, 8))
        draft.set("x.y.z", 5, Place(None, 9))
        assert draft.value == {"a": {"b": [1], "c": {"d": 2, "e": 3}}, "x": {"y": {"z": 5}}}
        assert [draft.place(tuple(p.split("."))).line for p in ("a.c.e", "a.b", "x.y.z")] == [7, 8, 9]

    def test_a_path_through_a_value_is_refused(self):
        with pytest.raises(SpecError) as caught:
            Draft({"a": {"b": 1}}).set("a.b.c", 2, Place(None))
        assert str(caught.value) == "<given>: a.b.c: 'a.b' is a value, so it has no field 'c'"

    def test_the_nearest_place_answers_for_what_has_none(self, tmp_path):
        draft = load_draft(write(tmp_path, HEAD))
        assert draft.place(("train", "steps")).line == 4
        assert draft.place(("train", "lr")).line == 4
        assert (draft.place(("evaluate", "every")).line, draft.place(()).line) == (1, 1)

    def test_copies_are_independent(self):
        draft = Draft({"a": {"b": 1}}, {("a",): Place(None, 3)})
        other = draft.copy()
        other.set("a.b", 2, Place(None, 4))
        assert draft.value == {"a": {"b": 1}}
        assert draft.place(("a", "b")).line == 3
