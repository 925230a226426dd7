"""A table of wrong specs and the whole text that a user reads for each; more stand in `test_errors.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from repa_lab.align.settings import REPASettings
from repa_lab.spec import CompareConfig, SpecError, load_spec
from repa_lab.spec.evaluate import EvaluateConfig
from repa_lab.spec.options import RunOptions
from repa_lab.spec.schema import RunConfig, SpecFile
from repa_lab.spec.train import TrainConfig
from tests.spec.examples import HEAD, TYPES, write


def allowed(model) -> str:
    return f"allowed: {', '.join(sorted(model.model_fields))}"


NAME = "expected text that matches ^[a-z0-9][a-z0-9_.-]{0,63}$"
ARMS = "an arm varies fields of model, regularizer, data, train, evaluate"
FORMS = "allowed: linspace, logspace, range"
TOO_MUCH = "more than 20,000 values or 40 levels"
BASE = "base is relative to the file that names it"

# what follows the four lines of HEAD -> the lines expected, of which the file's name is left out
ADDED = {
    # ranges
    "axes: {train.lr: {range: [0, 1]}}": [
        "5:19: axes.train.lr.range: expected three numbers, [start, stop, step], got [0, 1]"
    ],
    "axes: {train.lr: {linspace: 5}}": [
        "5:19: axes.train.lr.linspace: expected three numbers, [start, stop, count], got 5"
    ],
    "axes: {train.lr: {logspace: [1, 2, x]}}": [
        "5:19: axes.train.lr.logspace: expected three numbers, [start, stop, count], got [1, 2, 'x']"
    ],
    "axes: {train.lr: {range: [0, .inf, 1]}}": ["5:19: axes.train.lr.range: expected finite numbers, got [0, inf, 1]"],
    "axes: {train.lr: {linspace: [0, .nan, 3]}}": [
        "5:19: axes.train.lr.linspace: expected finite numbers, got [0, nan, 3]"
    ],
    "axes: {train.lr: {range: [1, 2, 0]}}": ["5:19: axes.train.lr.range: the step 0 does not lead from 1 to 2"],
    "axes: {train.lr: {range: [1, 2, -0.5]}}": ["5:19: axes.train.lr.range: the step -0.5 does not lead from 1 to 2"],
    "axes: {train.lr: {range: [0, 1, 1e-9]}}": ["5:19: axes.train.lr.range: 1,000,000,001 values; at most 10,000"],
    "axes: {train.lr: {linspace: [1, 2, 1]}}": [
        "5:19: axes.train.lr.linspace: the count is an integer from 2 to 10,000, got 1"
    ],
    "axes: {train.lr: {linspace: [1, 2, 4.0]}}": [
        "5:19: axes.train.lr.linspace: the count is an integer from 2 to 10,000, got 4.0"
    ],
    "axes: {train.lr: {linspace: [1, 2, 10001]}}": [
        "5:19: axes.train.lr.linspace: the count is an integer from 2 to 10,000, got 10001"
    ],
    "axes: {train.lr: {linspace: [2, 2, 3]}}": [
        "5:19: axes.train.lr.linspace: start and stop must differ, got [2, 2, 3]"
    ],
    "axes: {train.lr: {logspace: [0, 1, 3]}}": [
        "5:19: axes.train.lr.logspace: a logspace starts and stops above 0, got [0, 1, 3]"
    ],
    "axes: {train.lr: {linspace: [1.0, 1.0000000000000002, 3]}}": [
        "5:19: axes.train.lr.linspace: the values are too close to tell apart, got [1.0, 1.0000000000000002, 3]"
    ],
    "axes: {train.lr: {range: [1, 2, 1], linspace: [1, 2, 3]}}": [
        "5:8: axes.train.lr: give exactly one of range, linspace, logspace"
    ],
    "axes: {train.lr: {rnage: [1, 2, 1]}}": [
        f"5:19: axes.train.lr.rnage: unknown field 'rnage'; {FORMS}; did you mean 'range'?"
    ],
    "axes: {train.lr: {log: [1e-4, 1e-2]}}": [f"5:19: axes.train.lr.log: unknown field 'log'; {FORMS}"],
    "axes: {train.lr: {range: [1, 3, 1], step: 2}}": [f"5:37: axes.train.lr.step: unknown field 'step'; {FORMS}"],
    "axes: {regularizer.block_index: {linspace: [1, 2, 3]}}\nregularizer: {type: repa}": [
        "5:34: regularizer.block_index: expected an integer or mid, got 1.5"
    ],
    "axes: {regularizer.wieght: {range: [1, 3, 2]}}\nregularizer: {type: repa}": [
        f"5:29: regularizer.wieght: unknown field 'wieght'; {allowed(REPASettings)}; did you mean 'weight'?"
    ],
    "one_at_a_time: {train.lr: {logspace: [-1, 1, 3]}}": [
        "5:28: one_at_a_time.train.lr.logspace: a logspace starts and stops above 0, got [-1, 1, 3]"
    ],
    "one_at_a_time: {teacher: {small: {train.lr: 1}}}": [
        f"5:27: one_at_a_time.teacher.small: unknown field 'small'; {FORMS}"
    ],
    "axes: {train.lr: {linspace: [0.1, 1, 101]}, train.steps: {range: [1, 100, 1]}}": [
        "5:1: axes: 10,100 arms; at most 10,000"
    ],
    "axes: {train.lr: {range: [1, 5, 1]}}\none_at_a_time: {train.lr: {range: [5, 6, 1]}}": [
        "6:28: train.lr: two arms are called 'lr=5'"
    ],
    # axes and arms
    "axes: [train.lr]": ["5:1: axes: expected a mapping, got ['train.lr']"],
    "axes: {train.lr: }": ["5:8: axes.train.lr: expected a list or a mapping, got null"],
    "axes: {train.lr: [1, 1.0]}": ["5:22: train.lr: two arms are called 'lr=1'"],
    "axes: {train.lr: [[1e-3]]}": ["5:19: train.lr: expected a number, got [0.001]"],
    "axes: {train: [1e-3]}": ["5:16: train: expected a mapping, got 0.001"],
    "axes: {name: [a, b]}": [f"5:15: name: {ARMS}, got 'name'", f"5:18: name: {ARMS}, got 'name'"],
    "axes: {teacher: {'': {train.lr: 1e-3}}}": ["5:18: axes.teacher.: expected text of 1 or more characters, got ''"],
    "axes: {a: {x: {train.lr: 1}, 'x, y': {}}, b: {'y, z': {}, z: {}}}": ["5:59: b: two arms are called 'x, y, z'"],
    "exclude: {train.lr: 1e-3}": ["5:1: exclude: expected a list, got {'train.lr': 0.001}"],
    "exclude: [train.lr]": ["5:11: exclude.0: expected a mapping, got 'train.lr'"],
    "exclude: [{}]": ["5:11: exclude.0: expected 1 or more values, got {}"],
    "exclude: [{train.lr: 1e-4}]": ["5:1: exclude: every arm is excluded"],
    "exclude: [{regularizer.type: ripa}]": [
        f"5:12: exclude.0.regularizer.type: unknown regularizer 'ripa'; allowed: {TYPES}; did you mean 'repa'?"
    ],
    "axes: {teacher: {small: {}, giant: {train.lr: 1}}}\nexclude: [{teacher: {train.lr: 1}}]": [
        "6:12: exclude.0.teacher: no level {'train.lr': 1}; there are: small, giant"
    ],
    "axes: {teacher: {small: {}, giant: {train.lr: 1}}}\nexclude: [{teacher: [small, gaint]}]": [
        "6:12: exclude.0.teacher: no level 'gaint'; there are: small, giant; did you mean 'giant'?"
    ],
    "compare: {baseline: {regularizer.type: nnone}}": [
        f"5:22: compare.baseline.regularizer.type: unknown regularizer 'nnone'; allowed: {TYPES}; did you mean 'none'?"
    ],
    "include: {label: a, set: {}}": ["5:1: include: expected a list, got {'label': 'a', 'set': {}}"],
    "include: [{label: '', set: {}}]": ["5:12: include.0.label: expected text of 1 or more characters, got ''"],
    "include: [{label: all, set: {}}]": ["5:24: include: two arms are called 'all'"],
    "seeds: {count: 3}": ["5:1: seeds: expected an integer or a list, got {'count': 3}"],
    "seeds: [2, 0, 2, 0]": ["5:15: seeds.2: the seed 2 is given twice", "5:18: seeds.3: the seed 0 is given twice"],
    # search
    "search: {}": ["5:1: search.space: this field is required"],
    "search: {space: {}}": ["5:10: search.space: expected 1 or more values, got {}"],
    "search: {space: {train.rl: {log: [1e-4, 1e-2]}}}": [
        f"5:18: search.space.train.rl: unknown field 'rl'; {allowed(TrainConfig)}"
    ],
    "search: {space: {run.device: {choice: [cpu]}}}": [
        f"5:18: search.space.run.device: unknown field 'run'; {allowed(RunConfig)}"
    ],
    "search: {space: {train.lr: [1e-4, 1e-2]}}": [
        "5:18: search.space.train.lr: expected a mapping, got [0.0001, 0.01]"
    ],
    "search: {space: {train.lr: {lgo: [1e-4, 1e-2]}}}": [
        "5:29: search.space.train.lr.lgo: unknown field 'lgo'; allowed: choice, int, log, uniform, when; did you mean 'log'?"
    ],
    "search: {space: {train.lr: {log: [1e-4, 1e-2], uniform: [0, 1]}}}": [
        "5:18: search.space.train.lr: give exactly one of log, uniform, int, choice"
    ],
    "search: {space: {train.steps: {int: [1.5, 3]}}}": [
        "5:38: search.space.train.steps.int.0: expected an integer, got 1.5"
    ],
    "search: {space: {train.lr: {log: [0.1, .inf]}}, prune: some}": [
        "5:40: search.space.train.lr.log.1: expected a finite number, got inf",
        "5:49: search.prune: expected one of none, median, asha, hyperband, got 'some'",
    ],
    # budget and stop
    "budget: {gpu_hours: -1, disk_gb: 3}": [
        "5:10: budget.gpu_hours: expected a number of at least 0.0, got -1",
        "5:25: budget.disk_gb: unknown field 'disk_gb'; allowed: disk_gib, gpu_hours; did you mean 'disk_gib'?",
    ],
    "budget: 120": ["5:1: budget: expected a mapping, got 120"],
    "stop: fid": ["5:1: stop: expected a mapping or a list, got 'fid'"],
    "stop: []": ["5:1: stop: expected a mapping or 1 or more values, got []"],
    "stop: {metric: fid}": ["5:1: stop: give exactly one of below, above"],
    "stop: [{below: 1}, {below: 1, above: 2}]": ["5:20: stop.1: give exactly one of below, above"],
    "stop: {metric: 3, bellow: 10, after: -1}": [
        "5:8: stop.metric: expected text, got 3",
        "5:19: stop.bellow: unknown field 'bellow'; allowed: above, after, below, metric; did you mean 'below'?",
        "5:31: stop.after: expected a number of at least 0, got -1",
    ],
    # types and fields
    "question: [why]": ["5:1: question: expected text, got ['why']"],
    "run: {devices: 2}": [f"5:7: run.devices: unknown field 'devices'; {allowed(RunOptions)}; did you mean 'device'?"],
    "regularizer: {weight: 0.5}": [f"5:1: regularizer: has settings and no type; allowed: {TYPES}"],
    "regularizer: {type: repa, weight: yes}": ["5:27: regularizer.weight: expected a number, got 'yes'"],
    "regularizer: {type: repa, weight: '0.5'}": ["5:27: regularizer.weight: expected a number, got '0.5'"],
    "regularizer: {type: repa, weight: 1_000}": ["5:27: regularizer.weight: expected a number, got '1_000'"],
    "regularizer: {type: repa, encoder: dinov2_vits14}": [
        "5:27: regularizer.encoder: expected a mapping or a list, got 'dinov2_vits14'"
    ],
    "evaluate: {prompts: red, smaples: 50}": [
        "5:12: evaluate.prompts: expected a list, got 'red'",
        f"5:26: evaluate.smaples: unknown field 'smaples'; {allowed(EvaluateConfig)}; did you mean 'samples'?",
    ],
    # files
    "base: ''": [f"5:1: base: no file '.'; {BASE}"],
    "base: [a.yaml]": ["5:1: base: expected the path of a spec file, got ['a.yaml']"],
    "base: q.yaml": ["5:1: base: 'q.yaml' is already among the bases: base runs in a circle"],
    "base: ../none.yaml": [f"5:1: base: no file '../none.yaml'; {BASE}"],
    "use: ''": ["5:1: use: no file ''; use lists files relative to the file that names them"],
    "use: [none.yaml]": ["5:7: use: no file 'none.yaml'; use lists files relative to the file that names them"],
    "use: {a: b}": ["5:1: use: no file {'a': 'b'}; use lists files relative to the file that names them"],
    # YAML
    "name: r": ["5:1: name: duplicate key 'name', first given on line 1"],
    "axes:\n  train.lr: [1]\n  train.lr: [2]": ["7:3: axes.train.lr: duplicate key 'train.lr', first given on line 6"],
    "regularizer:\n\tweight: 1": ["6:1: not valid YAML: found character '\\t' that cannot start any token"],
    "regularizer: {weight: 1": ["6:1: not valid YAML: expected ',' or '}', but got '<stream end>'"],
    "regularizer: *nope": ["5:14: not valid YAML: found undefined alias 'nope'"],
    "regularizer: &a {encoder: *a}": [f"5:14: {TOO_MUCH}"],
    "1: x": ["5:1: a key must be text, got '1'; quote it"],
}
# the whole file
WHOLE = {
    "": ["1:1: a spec must be a mapping of fields, such as 'name: my_question'"],
    "name: ../q\n": [f"1:1: name: {NAME}, got '../q'", *(f"1:1: {key}: this field is required" for key in ("data", "model", "train"))],
    HEAD.replace("q", "/etc/q", 1): [f"1:1: name: {NAME}, got '/etc/q'"],
    HEAD.replace("q", ".q", 1): [f"1:1: name: {NAME}, got '.q'"],
    HEAD.replace("q", "a" * 65, 1): [f"1:1: name: {NAME}, got '{'a' * 65}'"],
    "nmae: q\nmodel: {family: sit}\ndata: {source: digit}\ntrain: {steps: 10, stepz: 3, lr: 0}\n"
    "regularizer: {type: rep, encoder: {name: 3}}\naxes: {train.ema: {range: [0, 1]}}\nseeds: 0\ncompare: {goal: mean, base: {}}\n": [
        f"1:1: nmae: unknown field 'nmae'; {allowed(SpecFile)}; did you mean 'name'?",
        "1:1: name: this field is required",
        "3:8: data.source: unknown source of images 'digit'; allowed: digits, imagefolder, clips, datasets, hub, repa; did you mean 'digits'?",
        f"4:20: train.stepz: unknown field 'stepz'; {allowed(TrainConfig)}; did you mean 'steps'?",
        "4:30: train.lr: expected a number of more than 0.0, got 0",
        f"5:15: regularizer.type: unknown regularizer 'rep'; allowed: {TYPES}; did you mean 'repa'?",
        "6:20: axes.train.ema.range: expected three numbers, [start, stop, step], got [0, 1]",
        "7:1: seeds: expected a number of at least 1 or a list, got 0",
        "8:11: compare.goal: expected one of min, max, got 'mean'",
        f"8:23: compare.base: unknown field 'base'; {allowed(CompareConfig)}; did you mean 'baseline'?",
    ],
}  # fmt: skip


def told(file: Path, *given) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(file, *given)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("text, expected", [*((HEAD + text + "\n", e) for text, e in ADDED.items()), *WHOLE.items()])
def test_the_whole_text(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    assert sorted(told(write(Path(), text))) == sorted(f"q.yaml:{line}" for line in expected)


def test_the_table_is_a_table():
    assert len(ADDED) + len(WHOLE) >= 80


def test_a_bomb_of_aliases_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["regularizer: &a0 {x: 1}"] + [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]" for i in range(1, 30)]
    (line,) = told(write(Path(), HEAD + "\n".join(lines)))
    assert line.endswith(f": {TOO_MUCH}")


def test_ten_megabytes_and_what_is_not_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told(write(Path(), HEAD + "# pad\n" * 1_800_000)) == [
        "q.yaml:1:1: a spec may have at most 1,048,576 bytes; this file has 10,800,082"
    ]
    Path("q.yaml").write_bytes(b"\xff\xfe" + HEAD.encode("utf-16-le"))
    assert told(Path("q.yaml")) == ["q.yaml:1:1: not UTF-8 text: invalid start byte at byte 0"]
    Path("q.yaml").write_bytes(bytes(100))
    assert told(Path("q.yaml")) == ["q.yaml:1:1: not valid YAML: the character '\\x00' is not allowed"]


def test_circles_and_what_is_missing_over_several_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(), "base: q.yaml\n", "p.yaml")
    assert told(write(Path(), HEAD + "base: p.yaml\n")) == [
        "p.yaml:1:1: base: 'q.yaml' is already among the bases: base runs in a circle"
    ]
    write(Path(), "train: {steps: 5}\nuse: [gone.yaml]\n", "p.yaml")
    assert told(Path("q.yaml")) == [
        "p.yaml:2:7: use: no file 'gone.yaml'; use lists files relative to the file that names them"
    ]


def test_a_mistake_in_each_of_several_files_is_told_in_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(), "train: {lr: -1}\nseeds: 0\n", "base.yaml")
    write(Path(), "# a fragment\nregularizer: {wieght: 1, type: repa}\n", "used.yaml")
    write(Path(), "evaluate:\n  every: 0\n", "with.yaml")
    spec = write(Path(), HEAD + "base: base.yaml\nuse: used.yaml\naxes: {train.ema: [2]}\nrun: {holdout: 0}\n")
    assert told(spec, {"train.time": "night"}, ["with.yaml"]) == [
        "<given>: train.time: expected one of uniform, logit_normal or a mapping, got 'night'",
        "base.yaml:1:9: train.lr: expected a number of more than 0.0, got -1",
        "base.yaml:2:1: seeds: expected a number of at least 1 or a list, got 0",
        "q.yaml:7:20: train.ema: expected a number of less than 1.0 or a mapping, got 2",
        f"q.yaml:8:7: run.holdout: unknown field 'holdout'; {allowed(RunOptions)}",
        f"used.yaml:2:15: regularizer.wieght: unknown field 'wieght'; {allowed(REPASettings)}; did you mean 'weight'?",
        "with.yaml:2:3: evaluate.every: expected a number of at least 1, got 0",
    ]
