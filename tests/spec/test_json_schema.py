"""The JSON schema holds of every shipped file and refuses what a spec refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from repa_lab.spec.document import parse_scalar, read_file
from repa_lab.spec.documentation import json_schema
from repa_lab.spec.schema import SpecFile
from tests.spec.examples import HEAD

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FILES = sorted([*ROOT.glob("experiments/**/*.yaml"), *ROOT.glob("sweeps/**/*.yaml")])


def test_it_is_a_schema_and_plain_json():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert set(SCHEMA["properties"]) == set(SpecFile.model_fields)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_file_fits(file):
    assert [error.message for error in VALIDATOR.iter_errors(read_file(file).value)] == []


SOUND = [
    "{}",
    "base: a.yaml\nuse: b.yaml\n",
    "x-common: {anything: [1]}\n",
    "use: [a.yaml, b.yaml]\n",
    "axes:\n  train.lr: [1e-3]\n  regularizer.weight: {logspace: [0.1, 1, 5]}\n  t: {a: {train.lr: 1}, b: }\n",
    "axes: {regularizer.encoder: [{name: x}, {image_size: 14}], regularizer.block_index: [3, mid]}\n",
    "one_at_a_time: {train.lr: {range: [1, 3, 1]}}\n",
    "stop: {metric: fid, below: 10}\n",
    "stop: [{below: 10}, {above: 200, after: 5}]\nbudget: {gpu_hours: null, disk_gib: 4}\n",
    "include: [{label: a, set: {regularizer.schedule.type: cosine}}]\nexclude: [{t: a, train.lr: [1, 2]}]\n",
    "search: {space: {train.lr: {log: [0.1, 1]}}, trials: 4}\nseeds: [3, 1]\n",
    "regularizer: {encoder: [{name: x}, {name: y}]}\n",
    "regularizer: {type: repa, projector: conv}\n",
]
WRONG = [
    "nmae: q\n",
    "name: ../q\n",
    "regularizer: {wieght: 1}\n",
    "regularizer: {type: ripa}\n",
    "train: {steps: ten}\n",
    "train: {lr: 0}\n",
    "evaluate: {sampler: {steps: 1}}\n",
    "axes: {train.lr: 3}\n",
    "axes: {train.lr: []}\n",
    "axes: {train.steps: [0]}\n",
    "axes: {train.lr: {range: [1, 2]}}\n",
    "axes: {train.lr: {range: [1, 2, 1], linspace: [1, 2, 3]}}\n",
    "axes: {teacher: {a: {trian.lr: 1}}}\n",
    "axes: {teacher: {a: {train.lr: fast}}}\n",
    "one_at_a_time: {train.rl: [1]}\n",
    "include: [{label: a}]\n",
    "include: [{label: a, set: {train.rl: 1}}]\n",
    "exclude: [{}]\n",
    "search: {space: {train.rl: {log: [1, 2]}}}\n",
    "search: {space: {train.lr: {log: [1]}}}\n",
    "search: {space: {train.lr: {}}}\n",
    "seeds: 0\n",
    "budget: {gpu_hours: -1}\n",
    "stop: {bellow: 3}\n",
    "run: {device: gpu}\n",
    "use: 3\n",
]


@pytest.mark.parametrize("text", SOUND)
def test_sound_documents_fit(text):
    document: Any = {**parse_scalar(HEAD), **parse_scalar(text)}
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []
    assert VALIDATOR.is_valid(parse_scalar(text))


@pytest.mark.parametrize("text", WRONG)
def test_wrong_documents_do_not(text):
    document = {**parse_scalar(HEAD), **parse_scalar(text)}
    assert VALIDATOR.is_valid(parse_scalar(HEAD))
    assert not VALIDATOR.is_valid(document)


def test_an_editor_can_complete_dotted_paths_wherever_they_are_keys():
    path = "regularizer.encoder.image_size"
    assert path in SCHEMA["properties"]["axes"]["properties"]
    assert path in SCHEMA["properties"]["one_at_a_time"]["properties"]
    assert path in SCHEMA["$defs"]["Settings"]["properties"]
    assert path in SCHEMA["$defs"]["SearchConfig"]["properties"]["space"]["properties"]
