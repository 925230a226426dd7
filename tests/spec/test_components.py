"""Sections whose fields are those of the component that they name: what belongs to whom, and what of them is a file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from repa_lab.align.settings import REGULARIZERS, REPASettings, UREPASettings
from repa_lab.settings import HubOrLocal, LocalFile, NamesFile, Settings, file_fields, marks_of, settings_in
from repa_lab.spec import RunConfig, SpecError, load_spec
from repa_lab.spec.document import COMPONENTS
from repa_lab.spec.explain import explain
from repa_lab.spec.identity import Run, identify, local_files
from tests.spec.examples import HEAD, mapping, write

# Fields of all types, of REPA and U-REPA, and of U-REPA alone.
SHARED = {"weight": 0.25, "loss": "nt_xent", "manifold_weight": 7.0, "manifold": {"reduction": "sum"}}
TYPES = ("none", "repa", "urepa")


def sections(**more: Any) -> dict[str, Any]:
    """The regularizer of every arm by its label."""
    return {arm.label: arm.config.regularizer for arm in load_spec(mapping(**more)).arms}


def ids(**more: Any) -> dict[str, str]:
    return {arm.label: identify(arm.config, 0, 1, "d", {}).run_id for arm in load_spec(mapping(**more)).arms}


def refusal(file: Path) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    return [line.removeprefix(f"{file}:") for line in str(caught.value).splitlines()]


def assert_each_has_its_own(none: Any, repa: Any, urepa: Any) -> None:
    assert none.model_dump(mode="json") == {"type": "none"}
    assert type(repa) is REPASettings and type(urepa) is UREPASettings
    assert (repa.weight, repa.loss, hasattr(repa, "manifold_weight")) == (0.25, "nt_xent", False)
    assert (urepa.weight, urepa.loss, urepa.manifold_weight, urepa.manifold.reduction) == (0.25, "nt_xent", 7.0, "sum")


class TestFieldsOfOtherTypes:
    """In a sweep over several types, a field that one of them knows is ignored by the others."""

    @pytest.mark.parametrize("base", TYPES)
    @pytest.mark.parametrize(
        "varied",
        [
            {"axes": {"regularizer.type": list(TYPES)}},
            {"axes": {"regularizer": [{"type": kind} for kind in TYPES]}},
            {"axes": {"method": {kind: {"regularizer.type": kind} for kind in TYPES}}},
            {"axes": {"method": {kind: {"regularizer": {"type": kind}} for kind in TYPES}}},
            {"include": [{"label": kind, "set": {"regularizer.type": kind}} for kind in TYPES]},
        ],
        ids=["axis", "axis of mappings", "levels", "levels of mappings", "include"],
    )
    def test_whatever_names_the_types_and_whichever_is_the_base(self, base, varied):
        found = sections(regularizer={"type": base, **SHARED}, **varied)
        assert_each_has_its_own(*list(found.values())[-3:])

    def test_a_star_around_a_base(self):
        found = sections(regularizer={"type": "urepa", **SHARED}, one_at_a_time={"regularizer.type": ["none", "repa"]})
        assert_each_has_its_own(found["type=none"], found["type=repa"], found["all"])

    def test_a_field_is_ignored_wherever_it_is_set(self):
        """An axis, an override, and a level over a level: the arms of REPA do not differ by U-REPA's weight."""
        axes = {"regularizer.type": ["repa", "urepa"], "regularizer.manifold_weight": [1.0, 2.0]}
        found = ids(regularizer={"type": "repa"}, axes=axes)
        assert found["type=repa, manifold_weight=1"] == found["type=repa, manifold_weight=2"]
        assert len(set(found.values())) == 3
        given = load_spec(
            mapping(axes={"regularizer.type": ["repa", "urepa"]}), {"regularizer.manifold": {"margin": 0.5}}
        )
        assert [type(arm.config.regularizer) for arm in given.arms] == [REPASettings, UREPASettings]
        assert given.arms[1].config.regularizer.manifold.margin == 0.5

    def test_the_ids_are_those_of_specs_with_one_type_each(self):
        swept = ids(regularizer={"type": "none", **SHARED}, axes={"regularizer.type": list(TYPES)})
        alone = {
            "none": {},
            "repa": {name: SHARED[name] for name in ("weight", "loss")},
            "urepa": SHARED,
        }
        for kind, fields in alone.items():
            assert ids(regularizer={"type": kind, **fields}) == {"all": swept[f"type={kind}"]}

    def test_any_arm_can_be_turned_off(self):
        """`none` ignores the fields of every type, also of those that no arm names."""
        found = sections(
            regularizer={"type": "none", **SHARED, "encoder": {"name": "x"}, "projector": {"type": "conv"}}
        )
        assert found["all"].model_dump(mode="json") == {"type": "none"}
        assert (
            ids(regularizer={"type": "none", **SHARED})
            == ids()
            == ids(regularizer={"type": "none"})
            == ids(regularizer={})
        )

    def test_a_condition_on_a_field_holds_only_of_the_types_that_have_it(self):
        axes = {"regularizer.type": list(TYPES)}
        for value, left in ((7.0, ["type=none", "type=repa"]), (3.0, ["type=none", "type=repa", "type=urepa"])):
            more = {
                "regularizer": {"type": "none", **SHARED},
                "axes": axes,
                "exclude": [{"regularizer.manifold_weight": value}],
            }
            assert list(sections(**more)) == left
        assert list(sections(regularizer={"type": "none"}, axes=axes, exclude=[{"regularizer.weight": 0.5}])) == [
            "type=none"
        ]

    def test_what_an_arm_has_not_is_not_explained(self):
        experiment = load_spec(mapping(regularizer={"type": "none", **SHARED}, axes={"regularizer.type": list(TYPES)}))
        assert [one.path for one in explain(experiment, "regularizer", "type=none")] == ["regularizer.type"]
        assert "regularizer.loss" in {one.path for one in explain(experiment, "regularizer", "type=repa")}
        (one,) = explain(experiment, "regularizer.manifold_weight")
        assert (one.value, one.arms) == (7.0, ("type=urepa",))

    def test_a_field_that_only_another_type_has_is_an_error_where_no_arm_is_of_that_type(self, tmp_path):
        more = "regularizer: {type: repa, manifold_weight: 3}\n"
        (line,) = refusal(write(tmp_path, HEAD + more))
        assert line.startswith("5:27: regularizer.manifold_weight: unknown field 'manifold_weight'; allowed: ")
        (line,) = refusal(write(tmp_path, HEAD + more + "include: [{label: off, set: {regularizer.type: none}}]\n"))
        assert line.startswith("5:27: regularizer.manifold_weight: unknown field")
        both = HEAD + more + "include: [{label: u, set: {regularizer.type: urepa}}]\n"
        assert len(load_spec(write(tmp_path, both)).arms) == 2

    @pytest.mark.parametrize("kind", TYPES)
    def test_a_field_that_none_has_is_an_error_with_its_place(self, tmp_path, kind):
        types = "axes: {regularizer.type: [none, repa, urepa]}\n"
        off = "include: [{label: off, set: {regularizer.type: none}}]\n"
        for arms in ("", types, off):
            (line,) = refusal(write(tmp_path, HEAD + f"regularizer: {{type: {kind}, wieght: 1}}\n" + arms))
            at = f"5:{15 + len(f'type: {kind}, ')}: regularizer.wieght: unknown field 'wieght'; allowed: "
            assert line.startswith(at)
            assert line.endswith("; did you mean 'weight'?") == (arms == types or kind != "none")

    def test_a_wrong_value_is_told_by_the_arm_that_has_the_field(self, tmp_path):
        text = (
            HEAD + "regularizer: {type: none, manifold_weight: heavy}\naxes: {regularizer.type: [none, repa, urepa]}\n"
        )
        assert refusal(write(tmp_path, text)) == ["5:27: regularizer.manifold_weight: expected a number, got 'heavy'"]

    def test_a_search_over_types_ignores_what_a_trials_type_has_not(self):
        space = {"regularizer.type": {"choice": list(TYPES)}, "regularizer.manifold_weight": {"uniform": [0, 5]}}
        (arm,) = load_spec(mapping(regularizer={"type": "repa"}, search={"space": space})).arms
        tried = [arm.with_settings({"regularizer.type": kind, **{f"regularizer.{name}": value for name, value in SHARED.items()}})
                 for kind in TYPES]  # fmt: skip
        assert_each_has_its_own(*(one.config.regularizer for one in tried))
        with pytest.raises(SpecError, match="unknown field 'wieght'"):
            arm.with_settings({"regularizer.type": "none", "regularizer.wieght": 1.0})

    def test_a_search_over_types_is_a_sweep_over_them(self):
        """What one of the types that it tries knows may stand in the sections."""
        space = {"regularizer.type": {"choice": ["repa", "urepa"]}}
        (arm,) = load_spec(mapping(regularizer={"type": "repa", **SHARED}, search={"space": space})).arms
        assert type(arm.config.regularizer) is REPASettings
        assert arm.with_settings({"regularizer.type": "urepa"}).config.regularizer.manifold_weight == 7.0


class TestConditions:
    def test_a_value_that_a_field_cannot_have_is_told_whatever_the_first_arm_is(self, tmp_path):
        text = HEAD + "axes: {regularizer.type: [none, repa, urepa]}\nexclude: [{regularizer.manifold_weight: heavy}]\n"
        assert refusal(write(tmp_path, text)) == [
            "6:12: exclude.0.regularizer.manifold_weight: expected a number, got 'heavy'"
        ]


class TestTheSection:
    def test_an_empty_one_is_the_default(self):
        assert load_spec(mapping(regularizer={})).arms[0].config.regularizer.type == "none"
        assert RunConfig.model_validate({**mapping_of_a_run()}).regularizer.type == "none"

    @pytest.mark.parametrize("kind", TYPES)
    def test_it_survives_its_file(self, kind):
        run = Run("x", load_spec(mapping(regularizer={"type": kind})).arms[0].config, 0)
        assert Run.from_json("x", run.to_json()) == run
        assert type(Run.from_json("x", run.to_json()).config.regularizer) is REGULARIZERS[kind].settings

    def test_it_is_a_key_of_mappings(self):
        configs = [load_spec(mapping(regularizer={"type": "urepa", "encoder": [{"name": "a"}, {"name": "b"}]})).arms[0].config
                   for _ in range(2)]  # fmt: skip
        assert len(set(configs)) == 1

    @pytest.mark.parametrize("kind", ["linear", "conv", "mlp"])
    def test_a_projector_may_be_called_by_its_type(self, kind):
        short, long = (
            ids(regularizer={"type": "repa", "projector": projector}) for projector in (kind, {"type": kind})
        )
        assert short == long


def mapping_of_a_run() -> dict[str, Any]:
    return {name: value for name, value in mapping().items() if name in RunConfig.model_fields}


class Inner(Settings):
    weights: LocalFile | None = None
    size: int = 3


class Outer(Settings):
    one: Inner = Inner()
    many: tuple[Inner, ...] = ()
    either: Inner | tuple[Inner, ...] = Inner()
    source: HubOrLocal | None = None
    plain: str = "not a file"
    marked: Annotated[str, NamesFile(required=True)] = "x.bin"


class TestFiles:
    """Every field that names a file is found, wherever it stands: what is in it counts for a run's identity."""

    def test_settings_are_found_with_their_paths(self):
        outer = Outer(many=(Inner(size=1), Inner(size=2)), either=(Inner(size=4),))
        assert [(path, type(found)) for path, found in settings_in(outer)] == [
            ((), Outer),
            (("one",), Inner),
            (("many", 0), Inner),
            (("many", 1), Inner),
            (("either", 0), Inner),
        ]

    def test_fields_are_known_by_their_marks_and_only_where_they_are_set(self):
        outer = Outer(one=Inner(weights="a"), source="hub/name")
        assert list(file_fields(outer)) == [
            ("source", "hub/name", NamesFile()),
            ("marked", "x.bin", NamesFile(required=True)),
        ]
        assert list(file_fields(outer.one)) == [("weights", "a", NamesFile(required=True))]
        assert list(file_fields(Inner())) == []

    # Dotted paths of a run's settings that name a file, what they need beside them, and whether it must be a local file.
    FILES = {  # noqa: RUF012
        "model.pretrained": ({"model": {"family": "sdxl"}}, False),
        "data.vae": ({}, False),
        "regularizer.encoder.weights": ({"regularizer": {"type": "repa"}}, True),
        "regularizer.encoder.tae": ({"regularizer": {"type": "repa", "encoder": {"pixels": "tae"}}}, False),
        "regularizer.weights": ({"regularizer": {"type": "self_transcendence"}}, True),
        "evaluate.encoder.weights": ({"evaluate": {"encoder": {"name": "e"}}}, True),
        "evaluate.encoder.tae": ({"evaluate": {"encoder": {"name": "e", "pixels": "tae"}}}, False),
        "evaluate.extractor.weights": ({}, True),
        "evaluate.extractor.reference": ({}, True),
        "evaluate.full.extractor.weights": ({"evaluate": {"full": {"extractor": {}}}}, True),
        "evaluate.full.extractor.reference": ({"evaluate": {"full": {"extractor": {}}}}, True),
    }

    @pytest.mark.parametrize("path", FILES)
    def test_every_field_of_a_run_that_names_a_file_is_found(self, path):
        sections, required = self.FILES[path]
        config = load_spec(mapping(**sections), {path: "the/file"}).arms[0].config
        found = [(".".join(map(str, (*where, name))), value, mark.required)
                 for where, section in settings_in(config) for name, value, mark in file_fields(section)]  # fmt: skip
        assert found == [(path, "the/file", required)]
        assert local_files(config) == ("the/file",)
        before, same, other = (identify(config, 0, 1, "d", {"the/file": digest}).run_id for digest in ("1", "1", "2"))
        moved = load_spec(mapping(**sections), {path: "moved"}).arms[0].config
        assert before == same == identify(moved, 0, 1, "d", {"moved": "1"}).run_id != other

    def test_several_encoders_and_extractors_are_all_found(self):
        encoders = [{"name": name, "weights": f"{name}.bin"} for name in "ab"]
        extractors = [{"name": "efficientnet_lite0", "weights": "c.bin"}, {"name": "inception", "reference": "d.npz"}]
        source = mapping(regularizer={"type": "urepa", "encoder": encoders}, evaluate={"extractor": extractors})
        assert set(local_files(load_spec(source).arms[0].config)) == {"a.bin", "b.bin", "c.bin", "d.npz"}

    def test_no_marked_field_is_forgotten_here(self):
        """Whatever settings class a run's config may hold."""
        seen: set[type[BaseModel]] = set()

        def below(model: type[BaseModel]) -> None:
            if model in seen:
                return
            seen.add(model)
            for field in model.model_fields.values():
                for inner in types_in(field.annotation):
                    below(inner)

        below(RunConfig)
        for mark in COMPONENTS.values():
            for settings in mark.choices:
                below(settings)
        marked = {(owner(model, name), name) for model in seen for name, _ in marks_of(model, NamesFile)}
        tried = set()
        for path, (sections, _) in self.FILES.items():
            config: Any = load_spec(mapping(**sections), {path: "x"}).arms[0].config
            *above, name = path.split(".")
            for step in above:
                config = getattr(config, step)
            tried.add((owner(type(config), name), name))
        assert marked == tried


def owner(model: type[BaseModel], name: str) -> type:
    """The class that declares a field."""
    return next(base for base in model.__mro__ if name in vars(base).get("__annotations__", {}))


def types_in(annotation: Any) -> list[type[BaseModel]]:
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return own + list(itertools.chain.from_iterable(types_in(inner) for inner in getattr(annotation, "__args__", ())))
