"""Every message of a table of bad specs, word for word: `file:line:column: path: what is wrong, what is allowed`."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from repa_lab.align.settings import REGULARIZERS, EncoderSettings, REPASettings
from repa_lab.errors import InputError, StateError, UserError, hide_passwords, shortened
from repa_lab.registry import did_you_mean
from repa_lab.spec import CompareConfig, Place, Problem, SpecError, load_spec
from repa_lab.spec.options import WandbOptions
from repa_lab.spec.schema import RunConfig, SpecFile
from repa_lab.spec.train import TrainConfig
from tests.spec.examples import HEAD, TYPES, write


def allowed(*models: type[BaseModel]) -> str:
    return f"allowed: {', '.join(sorted({name for model in models for name in model.model_fields}))}"


ANY_TYPE = allowed(*(component.settings for component in REGULARIZERS.values()))
SECTIONS = "an arm varies fields of model, regularizer, data, train, evaluate"

# name: (what follows the first four lines, or the whole file where it begins with its own name; the lines expected)
BAD = {
    "unknown section": (
        HEAD + "regulariser: {type: repa}\n",
        [f"5:1: regulariser: unknown field 'regulariser'; {allowed(SpecFile)}; did you mean 'regularizer'?"],
    ),
    "unknown field, deep": (
        HEAD + "regularizer:\n  type: repa\n  encoder:\n    nam: dinov2_vits14\n",
        [f"8:5: regularizer.encoder.nam: unknown field 'nam'; {allowed(EncoderSettings)}; did you mean 'name'?"],
    ),
    "unknown field, nothing near": (
        HEAD + "regularizer: {type: repa, zzz: 1}\n",
        [f"5:27: regularizer.zzz: unknown field 'zzz'; {allowed(REPASettings)}"],
    ),
    "sections missing": (
        "name: q\n",
        [
            "1:1: data: this field is required",
            "1:1: model: this field is required",
            "1:1: train: this field is required",
        ],
    ),
    "fields missing": (
        "name: q\nmodel: {size: B/2}\ndata: {source: digits}\ntrain:\n  lr: 1e-4\n",
        ["2:1: model.family: this field is required", "4:1: train.steps: this field is required"],
    ),
    "an empty section": (HEAD.replace("{steps: 10}", ""), ["4:1: train: expected a mapping, got null"]),
    "types of the regularizer": (
        HEAD
        + "regularizer:\n  weight: high\n  block_index: middle\n  encoder: {name: 5, cache: 1}\n  schedule: cosine\n  type: repa\n",
        [
            "6:3: regularizer.weight: expected a number, got 'high'",
            "7:3: regularizer.block_index: expected an integer or mid, got 'middle'; did you mean 'mid'?",
            "8:13: regularizer.encoder.name: expected text, got 5",
            "8:22: regularizer.encoder.cache: expected true or false, got 1",
            "9:3: regularizer.schedule: expected a mapping, got 'cosine'",
        ],
    ),
    "types of the rest": (
        "name: q\nmodel: [sit]\ndata: {source: 8, holdout: 2.5}\ntrain: {steps: '10', batch_size: 1e2, lr: true}\n",
        [
            "2:1: model: expected a mapping, got ['sit']",
            "3:8: data.source: unknown source of images '8'; allowed: digits, imagefolder, clips, datasets, hub, repa",  # whose other fields cannot be judged
            "4:9: train.steps: expected an integer, got '10'",
            "4:22: train.batch_size: expected an integer, got 100.0",
            "4:39: train.lr: expected a number, got true",
        ],
    ),
    "a union": (
        HEAD + "regularizer: {block_index: {a: 1}, type: repa}\n",
        ["5:15: regularizer.block_index: expected an integer or mid, got {'a': 1}"],
    ),
    "several encoders": (
        HEAD + "regularizer: {type: repa, encoder: [{name: a, imagesize: 64}, 3]}\n",
        [
            f"5:47: regularizer.encoder.0.imagesize: unknown field 'imagesize'; {allowed(EncoderSettings)}; "
            "did you mean 'image_size'?",
            "5:63: regularizer.encoder.1: expected a mapping, got 3",
        ],
    ),
    "no encoder": (
        HEAD + "regularizer: {type: repa, encoder: []}\n",
        ["5:27: regularizer.encoder: expected a mapping or 1 or more values, got []"],
    ),
    "settings that do not go together": (
        HEAD
        + "regularizer:\n  type: urepa\n  spatial_align: false\n  projector: {kernel: 4}\n  encoder: {pixels: tae}\n",
        [
            "8:3: regularizer.projector: kernel must be odd, so that tokens keep their places; got 4",
            "9:3: regularizer.encoder: tae names the tiny autoencoder that pixels: tae decodes with; give both or neither",
        ],
    ),
    "choices": (
        "name: q\nmodel: {family: sit, train: lorra}\ndata: {source: digit}\ntrain: {steps: 1, time: logit}\n"
        "regularizer: {type: repa, projector: {type: mpl}, schedule: {type: cosin}}\n",
        [
            "2:22: model.train: expected one of full, lora, got 'lorra'; did you mean 'lora'?",
            "3:8: data.source: unknown source of images 'digit'; allowed: digits, imagefolder, clips, datasets, hub, repa; did you mean 'digits'?",
            "4:19: train.time: expected one of uniform, logit_normal or a mapping, got 'logit'",
            "5:39: regularizer.projector.type: expected one of mlp, linear, conv, got 'mpl'; did you mean 'mlp'?",
            "5:62: regularizer.schedule.type: expected one of constant, linear, cosine, polynomial, got 'cosin'; "
            "did you mean 'cosine'?",
        ],
    ),
    "a type that there is not": (
        HEAD + "regularizer: {type: urep, projector: {type: mpl}}\n",  # whose fields cannot be judged
        [f"5:15: regularizer.type: unknown regularizer 'urep'; allowed: {TYPES}; did you mean 'urepa'?"],
    ),
    "a type that is no text": (
        HEAD + "regularizer: {type: 3}\n",
        [f"5:15: regularizer.type: unknown regularizer '3'; allowed: {TYPES}"],
    ),
    "a list of types": (
        HEAD + "regularizer: {type: [repa, none]}\n",
        [f"5:15: regularizer.type: unknown regularizer '['repa', 'none']'; allowed: {TYPES}"],
    ),
    "a regularizer without a type": (
        HEAD + "regularizer: {weight: high, wieght: 1}\n",
        [f"5:1: regularizer: has settings and no type; allowed: {TYPES}"],
    ),
    "a field of another type": (
        HEAD + "regularizer: {type: repa, manifold_weight: 3}\n",
        [f"5:27: regularizer.manifold_weight: unknown field 'manifold_weight'; {allowed(REPASettings)}"],
    ),
    "bounds": (
        "name: q\nmodel: {family: sit}\ndata: {source: digits, holdout: 0}\n"
        "train: {steps: 0, lr: 0, ema: 1.0, label_dropout: 1.5, weight_decay: -1}\n"
        "evaluate: {samples: 8, timestep: 1, sampler: {steps: 1}, guidance: {scale: 0.5}}\n"
        "regularizer: {block_index: -1, type: repa}\n",
        [
            "3:24: data.holdout: expected a number of at least 1, got 0",
            "4:9: train.steps: expected a number of at least 1, got 0",
            "4:19: train.lr: expected a number of more than 0.0, got 0",
            "4:26: train.ema: expected a number of less than 1.0 or a mapping, got 1.0",
            "4:36: train.label_dropout: expected a number of at most 1.0, got 1.5",
            "4:56: train.weight_decay: expected a number of at least 0.0, got -1",
            "5:12: evaluate.samples: expected a number of at least 16, got 8",
            "5:24: evaluate.timestep: expected a number of less than 1.0, got 1",
            "5:47: evaluate.sampler.steps: expected a number of at least 2, got 1",
            "5:69: evaluate.guidance.scale: expected a number of at least 1.0, got 0.5",
            "6:15: regularizer.block_index: expected a number of at least 0 or mid, got -1",
        ],
    ),
    "not finite": (
        HEAD + "regularizer: {weight: .nan, manifold_weight: .inf, type: urepa}\n",
        [
            "5:15: regularizer.weight: expected a finite number, got nan",
            "5:29: regularizer.manifold_weight: expected a finite number, got inf",
        ],
    ),
    "fields that contradict one another": (
        "name: q\nmodel: {family: sit}\ndata: {source: digits, resolution: 16}\ntrain: {steps: 10}\nregularizer:\n"
        "  encoder: {standardize: true, cache: false}\n  schedule: {type: linear, warmup_steps: 10, decay_steps: 5}\n  type: repa\n"
        "evaluate: {guidance: {low: 0.7, high: 0.2}}\n",
        [
            "3:1: data: digits are 8 pixels wide and high: resolution must be 8 or left out",
            "6:3: regularizer.encoder: standardize needs the statistics of all features, so cache must be true",
            "7:3: regularizer.schedule: decay_steps is counted from step 0, so it must be more than warmup_steps",
            "9:12: evaluate.guidance: low must not be above high, got 0.7 and 0.2",
        ],
    ),
    "the name": (
        HEAD.replace("q", "My Question!"),
        ["1:1: name: expected text that matches ^[a-z0-9][a-z0-9_.-]{0,63}$, got 'My Question!'"],
    ),
    "a name that leads elsewhere": (
        HEAD.replace("q", "../q"),
        ["1:1: name: expected text that matches ^[a-z0-9][a-z0-9_.-]{0,63}$, got '../q'"],
    ),
    "a long value": (
        HEAD + f"regularizer: {{weight: {'x' * 300}, type: repa}}\n",
        [f"5:15: regularizer.weight: expected a number, got '{'x' * 99}..."],
    ),
    "everything at once": (
        "nam: q\nmodel: {family: sit}\ndata: {source: digits}\ntrain: {steps: ten}\nseeds: many\nrun: {device: gpu}\n"
        "axes: {regularizer.wieght: [0.5]}\nregularizer: {type: repa}\n",
        [
            f"1:1: nam: unknown field 'nam'; {allowed(SpecFile)}; did you mean 'name'?",
            "1:1: name: this field is required",
            "4:9: train.steps: expected an integer, got 'ten'",
            "5:1: seeds: expected an integer or a list, got 'many'",
            "6:7: run.device: expected one of auto, cpu, cuda, got 'gpu'; did you mean 'cpu'?",
            f"7:29: regularizer.wieght: unknown field 'wieght'; {allowed(REPASettings)}; did you mean 'weight'?",
        ],
    ),
    "a dotted path at the top": (
        HEAD + "train.lr: 1e-4\n",
        [f"5:1: train.lr: unknown field 'train.lr'; {allowed(SpecFile)}; did you mean 'train'?"],
    ),
    "values of an axis": (
        HEAD
        + "axes:\n  regularizer.weight: [0.5, high, -1]\n  train.lr:\n    - 1e-4\n    - 1e-3x\nregularizer: {type: repa}\n",
        [
            "6:29: regularizer.weight: expected a number, got 'high'",
            "6:35: regularizer.weight: expected a number of at least 0.0, got -1",
            "9:7: train.lr: expected a number, got '1e-3x'",
        ],
    ),
    "an axis of nothing": (
        HEAD + "axes: {regularizer.wieght: [0.5, 1.0]}\nregularizer: {type: repa}\n",
        [
            f"5:29: regularizer.wieght: unknown field 'wieght'; {allowed(REPASettings)}; did you mean 'weight'?",
            f"5:34: regularizer.wieght: unknown field 'wieght'; {allowed(REPASettings)}; did you mean 'weight'?",
        ],
    ),
    "an axis of what is no setting of an arm": (
        HEAD + "axes: {run.device: [cpu]}\none_at_a_time: {seeds: [1]}\n",
        [
            f"5:21: run.device: {SECTIONS}, got 'run.device'",
            f"6:25: seeds: {SECTIONS}, got 'seeds'",
        ],
    ),
    "an axis of a misspelt section": (
        HEAD + "axes: {regulariser.weight: [0.5]}\n",
        [f"5:29: regulariser.weight: {SECTIONS}, got 'regulariser.weight'; did you mean 'regularizer'?"],
    ),
    "an axis through a value": (
        HEAD + "axes: {train.steps.more: [1]}\n",
        ["5:27: train.steps.more: 'train.steps' is a value, so it has no field 'more'"],
    ),
    "an axis without a list": (
        HEAD + "axes: {regularizer.weight: 0.5}\n",
        ["5:8: axes.regularizer.weight: expected a list or a mapping, got 0.5"],
    ),
    "an axis without values": (
        HEAD + "axes: {regularizer.weight: [], teacher: {}}\none_at_a_time: {train.lr: []}\n",
        [
            "5:8: axes.regularizer.weight: expected 1 or more values or a mapping, got []",
            "5:32: axes.teacher: expected a list or 1 or more values, got {}",
            "6:17: one_at_a_time.train.lr: expected 1 or more values or a mapping, got []",
        ],
    ),
    "a named level": (
        HEAD
        + "axes:\n  teacher:\n    small: {regularizer.encoder.name: dinov2_vits14}\n"
        + "    giant: {regularizer.encoder.nam: dinov2_vitg14,\n            regularizer.encoder.image_size: big}\nregularizer: {type: repa}\n",
        [
            f"8:13: regularizer.encoder.nam: unknown field 'nam'; {allowed(EncoderSettings)}; did you mean 'name'?",
            "9:13: regularizer.encoder.image_size: expected an integer, got 'big'",
        ],
    ),
    "a named level without settings": (
        HEAD + "axes: {teacher: {small: dinov2_vits14}}\nexclude: [{teacher: small}]\n",
        ["5:18: axes.teacher.small: expected a mapping, got 'dinov2_vits14'"],
    ),
    "a value twice on an axis": (
        HEAD + "axes: {regularizer.weight: [0.5, 1.0, 0.5]}\nregularizer: {type: repa}\n",
        ["5:39: regularizer.weight: two arms are called 'weight=0.5'"],
    ),
    "a star that is on the axis": (
        HEAD
        + "axes: {regularizer.weight: [0.5]}\none_at_a_time: {regularizer.weight: [0.25, 0.5]}\nregularizer: {type: repa}\n",
        ["6:44: regularizer.weight: two arms are called 'weight=0.5'"],
    ),
    "included arms": (
        HEAD + "include:\n  - label: a\n    set: {regularizer.type: rep}\n",
        [f"7:11: regularizer.type: unknown regularizer 'rep'; allowed: {TYPES}; did you mean 'repa'?"],
    ),
    "included arms without shape": (
        HEAD + "include:\n  - {label: b}\n  - {lable: c, set: {}}\n",
        [
            "6:5: include.0.set: this field is required",
            "7:5: include.1.label: this field is required",
            "7:6: include.1.lable: unknown field 'lable'; allowed: label, set; did you mean 'label'?",
        ],
    ),
    "included arms of one name": (
        HEAD + "include:\n  - {label: a, set: {train.lr: 1e-3}}\n  - {label: a, set: {train.lr: 1e-2}}\n",
        ["7:16: include: two arms are called 'a'"],
    ),
    "nothing left": (
        HEAD + "axes: {train.lr: [1e-3, 1e-2]}\nexclude: [{model.family: sit}]\n",
        ["6:1: exclude: every arm is excluded"],
    ),
    "conditions on nothing": (
        HEAD
        + "axes: {teacher: {a: {train.lr: 1e-3}, b: {train.lr: 1e-2}}}\n"
        + "exclude: [{train.rl: 1e-3}, {teachr: a}]\ncompare: {baseline: {regularizer.tpye: none}}\n",
        [
            f"6:12: exclude.0.train.rl: unknown field 'rl'; {allowed(TrainConfig)}",
            f"6:30: exclude.1.teachr: unknown field 'teachr'; {allowed(RunConfig)}; did you mean 'teacher'?",
            f"7:22: compare.baseline.regularizer.tpye: unknown field 'tpye'; {ANY_TYPE}; did you mean 'type'?",
        ],
    ),
    "comparison": (
        HEAD + "compare: {metrics: fid, goal: low, targets: {fid: 30}}\n",
        [
            f"5:11: compare.metrics: unknown field 'metrics'; {allowed(CompareConfig)}; did you mean 'metric'?",
            "5:25: compare.goal: expected one of min, max, got 'low'",
            "5:46: compare.targets.fid: expected a list, got 30",
        ],
    ),
    "no seeds": (HEAD + "seeds: 0\n", ["5:1: seeds: expected a number of at least 1 or a list, got 0"]),
    "an empty list of seeds": (HEAD + "seeds: []\n", ["5:1: seeds: expected an integer or 1 or more values, got []"]),
    "too many seeds": (
        HEAD + "seeds: 100000\n",
        ["5:1: seeds: expected a number of at most 1000 or a list, got 100000"],
    ),
    "wrong seeds": (
        HEAD + "seeds: [0, -1, x, 1.5]\n",
        [
            "5:12: seeds.1: expected a number of at least 0, got -1",
            "5:16: seeds.2: expected an integer, got 'x'",
            "5:19: seeds.3: expected an integer, got 1.5",
        ],
    ),
    "a seed twice": (HEAD + "seeds: [3, 1, 3]\n", ["5:15: seeds.2: the seed 3 is given twice"]),
    "search": (
        HEAD
        + "search:\n  space:\n    regularizer.weight: {log: [0, 1]}\n    train.lr: {uniform: [2, 1]}\n"
        + "    regularizer.manifold_weight: {int: [1]}\n    train.ema: {range: [0, 1]}\n    train.steps: {}\n"
        + "  trials: 0\n  sampler: grid\n  objective: {goal: low}\n",
        [
            "7:5: search.space.regularizer.weight: a log range must start above 0, got [0.0, 1.0]",
            "8:5: search.space.train.lr: the bounds must ascend, got [2.0, 1.0]",
            "9:35: search.space.regularizer.manifold_weight.int: expected 2 or more values, got [1]",
            "10:17: search.space.train.ema.range: unknown field 'range'; allowed: choice, int, log, uniform, when",
            "11:5: search.space.train.steps: give exactly one of log, uniform, int, choice",
            "12:3: search.trials: expected a number of at least 1, got 0",
            "13:3: search.sampler: expected one of tpe, random, qmc, cmaes, got 'grid'",
            "14:15: search.objective.goal: expected one of min, max, got 'low'",
        ],
    ),
    "run": (
        HEAD + "run: {device: gpu, precision: bf61, workers: 0, wandb: {mode: on, key: secret}}\n",
        [
            "5:7: run.device: expected one of auto, cpu, cuda, got 'gpu'; did you mean 'cpu'?",
            "5:20: run.precision: expected one of auto, fp32, bf16, fp16, got 'bf61'; did you mean 'bf16'?",
            "5:37: run.workers: expected a number of at least 1, got 0",
            "5:57: run.wandb.mode: expected one of auto, online, offline, disabled, got 'on'",
            f"5:67: run.wandb.key: unknown field 'key'; {allowed(WandbOptions)}",
        ],
    ),
    "a base that is no path": (HEAD + "base: 3\n", ["5:1: base: expected the path of a spec file, got 3"]),
    "a base that is not there": (
        HEAD + "base: presets/none.yaml\n",
        ["5:1: base: no file 'presets/none.yaml'; base is relative to the file that names it"],
    ),
    "a base that no file can be": (
        HEAD + 'base: "a\\0b"\n',
        ["5:1: base: no file 'a b'; base is relative to the file that names it"],
    ),
    "itself as a base": (
        HEAD + "base: ./q.yaml\n",
        ["5:1: base: 'q.yaml' is already among the bases: base runs in a circle"],
    ),
    "duplicate keys before anything else": (
        HEAD + "train: {steps: x}\n",
        ["5:1: train: duplicate key 'train', first given on line 4"],
    ),
}


@pytest.mark.parametrize("text, expected", BAD.values(), ids=BAD.keys())
def test_messages(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        load_spec(write(Path(), text))
    assert str(caught.value).splitlines() == [f"q.yaml:{line}" for line in expected]
    assert [str(problem) for problem in caught.value.problems] == str(caught.value).splitlines()


def test_what_a_program_gave_has_no_place():
    with pytest.raises(SpecError) as caught:
        load_spec({"name": "q", "model": {"family": 3}, "data": {"source": "digits"}, "train": {"steps": 0}})
    assert str(caught.value).splitlines() == [
        "<given>: model.family: expected text, got 3",
        "<given>: train.steps: expected a number of at least 1, got 0",
    ]


def test_problems_are_sorted_by_place_and_told_once():
    first, second = Place(Path("a.yaml"), 9, 1), Place(Path("a.yaml"), 10, 1)
    problems = [Problem(second, "x", "late"), Problem(first, "", "early"), Problem(second, "x", "late")]
    error = SpecError(problems)
    assert str(error) == "a.yaml:9:1: early\na.yaml:10:1: x: late"
    assert len(error.problems) == 2
    assert isinstance(error, ValueError)


def test_did_you_mean():
    assert did_you_mean("wieght", ["weight", "width"]) == "; did you mean 'weight'?"
    assert did_you_mean("zzz", ["weight", "width"]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:geheim@host/db", "postgresql://me:***@host/db"),
        ("mysql+pymysql://me:ge:h/ei@m@host:3306/db?charset=utf8", "mysql+pymysql://me:***@host:3306/db?charset=utf8"),
        ("redis://:geheim@host", "redis://:***@host"),
        ("postgresql://host/db?user=me&password=geheim&port=5", "postgresql://host/db?user=me&password=***&port=5"),
        ("postgresql:///db?SSLPassword=geheim", "postgresql:///db?SSLPassword=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dgeheim%3BX%3D1", "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D***%3BX%3D1"),
        ("got ['a://me:geheim@b', 'c://you:geheim@d']", "got ['a://me:***@b', 'c://you:***@d']"),
        ("sqlite:///study.db, postgresql://me@host/db", "sqlite:///study.db, postgresql://me@host/db"),
        ("http://host:8080/x is down; fid:inception@50k/ode20", "http://host:8080/x is down; fid:inception@50k/ode20"),
    ],
)  # fmt: skip
def test_the_passwords_of_urls_are_shown_nowhere(text, shown):
    assert hide_passwords(text) == shown
    for error in (UserError, InputError, StateError):
        assert str(error(text)) == shown
    assert str(SpecError([Problem(Place(None), "search.storage", text)])) == f"<given>: search.storage: {shown}"


def test_a_password_is_hidden_before_a_value_is_cut():
    url = f"postgresql://me:{'geheim' * 30}@host/db"
    assert shortened(url) == "'postgresql://me:***@host/db'"
