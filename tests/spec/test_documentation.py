"""`docs/spec.md` says what the settings classes say: every field of every section with its default, and examples that hold."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from repa_lab.align.settings import REGULARIZERS
from repa_lab.data.settings import SOURCES
from repa_lab.settings import Settings
from repa_lab.spec import load_spec
from repa_lab.spec.document import parse_scalar
from repa_lab.spec.documentation import write_tables
from repa_lab.spec.options import FORMS, RangeConfig
from repa_lab.spec.schema import SECTIONS, RunConfig, SpecFile
from tests.spec.examples import HEAD, REPA, write

FILE = Path(__file__).parents[2] / "docs/spec.md"
PAGE = FILE.read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([a-z_.]+)` \| (.*?) \| (.*?) \| (.*) \|$", flags=re.MULTILINE)
ROWS = {path: default for path, default, _, _ in ROW.findall(PAGE[PAGE.index("## Fields") :])}
# Shown in the text: what keys of a mapping hold, and what is said of another section already.
ELSEWHERE = ("search.space.", "include.", "axes.", "one_at_a_time.", "evaluate.encoder.")
_NONE = object()


def models(annotation: object) -> Iterator[type[BaseModel]]:
    """The models that a type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models(inner)


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every dotted path and its default, or _NONE for what is a section or has no default."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        source = RunConfig.model_fields[name] if path in SECTIONS else field
        default = source.get_default(call_default_factory=True)
        yield (
            path,
            _NONE if default is PydanticUndefined or path in SECTIONS or isinstance(default, Settings) else default,
        )
        several = {
            "regularizer": [REGULARIZERS[kind].settings for kind in ("repa", "urepa")],
            "data": [one.settings for one in SOURCES.values()],
        }
        kinds = several.get(path) or [*models(source.annotation)][:1]
        for kind in kinds:
            yield from fields(kind, f"{path}.")


EXPECTED = {path: default for path, default in fields(SpecFile) if not path.startswith(ELSEWHERE)} | {
    "regularizer.type": "none",
    "data.source": _NONE,
}


def test_every_field_is_explained():
    assert [path for path, _, _, about in ROW.findall(PAGE) if not about.strip()] == []


@pytest.mark.parametrize("name", ["spec.md", "methods.md"])
def test_the_tables_are_what_the_settings_classes_say(tmp_path, name):
    """If this fails: repa-lab schema --tables docs/spec.md, or docs/methods.md."""
    text = FILE.with_name(name).read_text(encoding="utf-8")
    page = write(tmp_path, text, name)
    write_tables(page)
    assert page.read_text(encoding="utf-8") == text


def test_every_method_has_a_section_and_a_preset():
    methods = [*REGULARIZERS.names[3:], "irepa"]  # after none, repa and urepa
    sections = re.findall(r"^## (.*)$", FILE.with_name("methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    presets = FILE.parents[1] / "sweeps" / "methods"
    assert sorted(sections) == sorted(methods) == sorted(file.stem for file in presets.glob("*.yaml"))
    for method in methods:
        (arm,) = load_spec({**parse_scalar(HEAD), "name": "q"}, None, [presets / f"{method}.yaml"]).arms
        assert arm.config.regularizers[0].type == {"irepa": "repa"}.get(method, method)


def test_every_field_has_its_row_and_every_row_its_field():
    assert len(EXPECTED) > 120
    assert set(ROWS) == set(EXPECTED)


@pytest.mark.parametrize("path", [path for path in EXPECTED if EXPECTED[path] is not _NONE])
def test_its_default_is_the_models(path):
    default = EXPECTED[path]
    said = parse_scalar(ROWS[path].strip("`"))
    assert said == (list(default) if isinstance(default, tuple) else default)


def test_what_must_be_given_is_marked():
    required = {path for path, said in ROWS.items() if said == "required"}
    assert required == {"name", "model.family", "data.source", "data.name", "train.steps", "search.space"}


def test_the_forms_of_ranges():
    assert re.findall(r"^\| `(\w+): \[", PAGE, flags=re.MULTILINE) == list(FORMS)
    for form, numbers in re.findall(r"`(\w+): \[(-?[\d.]+, -?[\d.]+, [\d.]+)\]`", PAGE):
        assert RangeConfig.model_validate({form: parse_scalar(f"[{numbers}]")}).values
    listed = parse_scalar(re.findall(r"5\]` is `(\[.*?\])`", PAGE)[0])
    assert RangeConfig(logspace=[0.1, 1.0, 5]).values == listed


EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL) if not text.startswith("#")]


@pytest.mark.parametrize("text", EXAMPLES, ids=[text.split(":")[0] for text in EXAMPLES])
def test_its_examples_are_sound(tmp_path, text):
    experiment = load_spec(write(tmp_path, text if text.startswith("name:") else HEAD + REPA + text))
    assert experiment.arms


def test_there_are_examples_of_every_kind():
    assert {text.split(":")[0] for text in EXAMPLES} == {"name", "axes", "search", "budget", "stop"}
    labels = [arm.label for arm in load_spec({**parse_scalar(HEAD + REPA), **parse_scalar(EXAMPLES[2])}).arms]
    assert len(labels) == 4 + 2 + 1
    assert "lr=0.0003, weight=0.5" not in labels
