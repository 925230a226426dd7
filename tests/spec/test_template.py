"""A new spec from an example stands alone and asks the same question."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from repa_lab.spec import load_spec
from repa_lab.spec.documentation import template

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
EXAMPLES = [file for file in sorted(EXPERIMENTS.rglob("*.yaml")) if "presets" not in file.parts and file.stem != "nano"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: str(file.relative_to(EXPERIMENTS)))
def test_a_template_is_its_example_in_one_file(tmp_path, file):
    new = tmp_path / "mine.yaml"
    new.write_text(template(file, "mine"))
    example, written = load_spec(file), load_spec(new)
    assert replace(written, name=example.name) == example
    assert [arm.label for arm in written.arms] == [arm.label for arm in example.arms]
    assert not {"base", "use"} & written.draft.value.keys()
    own = [line for line in new.read_text().splitlines() if line not in file.read_text()]
    assert max(map(len, own)) <= 120 or "published:" in new.read_text()


def test_a_template_says_what_its_fields_mean():
    lines = template(EXPERIMENTS / "sdxl_manifold.yaml", "mine").splitlines()
    assert lines[0].startswith("# Hypothesis: ")
    assert "name: mine" in lines
    assert "  rank: 16  # Rank of the LoRA." in lines
    assert "  manifold_weight: 3.0  # The paper's w, the weight of the manifold loss within the regularizer." in lines
    assert '  split: "train[:5000]"  # The split, or a slice such as `train[:5000]`.' in lines


def test_text_that_reads_as_something_else_is_quoted(tmp_path):
    labels = ["off", "1e3", "null", "a: b", "a, b", "# no", "- x", "[1]", "ä", "'", "2026-11-30", "~", "true", "x #y"]
    arms = [{"label": label, "set": {"train.lr": rate}} for rate, label in enumerate(labels, start=1)]
    text = "name: x\nmodel: {family: sit, size: nano/2}\ndata: {source: digits}\ntrain: {steps: 1}\n"
    (tmp_path / "example.yaml").write_text(f"{text}include: {json.dumps(arms)}\n")
    (tmp_path / "new.yaml").write_text(template(tmp_path / "example.yaml", "new"))
    assert [arm.label for arm in load_spec(tmp_path / "new.yaml").arms[1:]] == labels
