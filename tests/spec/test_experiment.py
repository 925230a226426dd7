from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from repa_lab.spec import Experiment, SpecError, load_spec
from repa_lab.spec.options import RunOptions, SearchConfig
from repa_lab.spec.schema import RunConfig, SpecFile
from tests.spec.examples import HEAD, REPA, mapping, write


class TestLoading:
    def test_a_file_and_a_mapping_say_the_same(self, tmp_path):
        text = HEAD + REPA + "question: Does it?\naxes: {regularizer.weight: [0.5, 1]}\nseeds: 2\nrun: {workers: 3}\n"
        of_file = load_spec(write(tmp_path, text))
        more = {"question": "Does it?", "axes": {"regularizer.weight": [0.5, 1]}, "seeds": 2, "run": {"workers": 3}}
        of_mapping = load_spec(mapping(regularizer={"type": "repa"}, **more))
        assert of_file == of_mapping
        assert load_spec(str(tmp_path / "q.yaml")) == of_file
        assert (of_file.question, of_file.run.workers) == ("Does it?", 3)

    def test_arms_share_what_a_key_beginning_with_x_holds(self, tmp_path):
        text = "x-common: &common {train.lr: 1e-3, train.ema: 0.5}\n"
        text += "include:\n- {label: a, set: {<<: *common}}\n- {label: b, set: {<<: *common, train.ema: 0.9}}\n"
        experiment = load_spec(write(tmp_path, HEAD + text))
        assert experiment == load_spec(
            mapping(
                include=[
                    {"label": "a", "set": {"train.lr": 1e-3, "train.ema": 0.5}},
                    {"label": "b", "set": {"train.lr": 1e-3, "train.ema": 0.9}},
                ]
            )
        )
        with pytest.raises(SpecError) as caught:
            load_spec(write(tmp_path, HEAD + text.replace("1e-3", "fast")))
        assert str(caught.value) == f"{tmp_path}/q.yaml:5:20: train.lr: expected a number, got 'fast'"

    def test_other_mappings_will_do(self):
        assert load_spec(MappingProxyType(OrderedDict(mapping()))) == load_spec(mapping())

    def test_tuples_are_lists(self):
        given = mapping(seeds=(4, 2), axes={"train.lr": (1e-3, 1e-4)})
        assert load_spec(given) == load_spec(mapping(seeds=[4, 2], axes={"train.lr": [1e-3, 1e-4]}))

    def test_defaults_are_the_papers(self):
        config = load_spec(mapping()).arms[0].config
        train = config.train
        assert (train.batch_size, train.lr, train.ema, train.weight_decay, train.grad_clip) == (
            256,
            1e-4,
            0.9999,
            0.0,
            1.0,
        )
        assert (train.label_dropout, train.time) == (0.1, None)
        assert config.regularizer.type == "none"
        regularizer = load_spec(mapping(regularizer={"type": "urepa"})).arms[0].config.regularizer
        assert (regularizer.type, regularizer.weight, regularizer.manifold_weight) == ("urepa", 0.5, 3.0)
        assert (regularizer.projector.type, regularizer.projector.width, regularizer.block_index) == ("mlp", 2048, None)

    def test_zero_is_a_number(self, tmp_path):
        text = (
            HEAD
            + "regularizer: {type: urepa, weight: 0, manifold_weight: 0, schedule: {cutoff_step: 0}, block_index: 0}\n"
        )
        regularizer = load_spec(write(tmp_path, text)).arms[0].config.regularizer
        assert (regularizer.weight, regularizer.manifold_weight) == (0.0, 0.0)
        assert (regularizer.schedule.cutoff_step, regularizer.block_index) == (0, 0)

    def test_settings_cannot_be_changed_afterwards(self):
        config = load_spec(mapping()).arms[0].config
        with pytest.raises(ValueError, match="frozen"):
            config.train.steps = 5

    def test_a_later_problem_finds_its_place(self, tmp_path):
        experiment = load_spec(write(tmp_path, HEAD + "compare: {metric: fid}\n"))
        assert str(experiment.problem("compare.metric", "wrong")) == f"{tmp_path}/q.yaml:5:11: compare.metric: wrong"
        assert str(experiment.problem("search.trials", "wrong")) == f"{tmp_path}/q.yaml:1:1: search.trials: wrong"


class TestSeeds:
    @pytest.mark.parametrize("given, seeds", [(1, (0,)), (3, (0, 1, 2)), ([7], (7,)), ([5, 0, 3], (5, 0, 3))])
    def test_a_number_counts_and_a_list_names(self, given, seeds):
        assert load_spec(mapping(seeds=given)).seeds == seeds

    def test_one_by_default(self):
        assert load_spec(mapping()).seeds == (0,)


class TestOverrides:
    def test_they_lie_over_the_file(self, tmp_path):
        file = write(tmp_path, HEAD + "regularizer: {type: repa, weight: 0.5, encoder: {name: a}}\nseeds: 3\n")
        experiment = load_spec(file, {"train.steps": 5, "regularizer.encoder": {"image_size": 14}, "seeds": [9]})
        config = experiment.arms[0].config
        assert (config.train.steps, experiment.seeds) == (5, (9,))
        assert (config.regularizer.encoder.name, config.regularizer.encoder.image_size) == ("a", 14)
        assert load_spec(file).arms[0].config.train.steps == 10

    def test_an_axis_lies_over_them(self, tmp_path):
        experiment = load_spec(write(tmp_path, HEAD + "axes: {train.steps: [1, 2]}\n"), {"train.steps": 5})
        assert [arm.config.train.steps for arm in experiment.arms] == [1, 2]

    def test_a_program_keeps_its_mapping(self):
        source = mapping(regularizer={"type": "repa", "encoder": {"name": "a"}})
        before = copy.deepcopy(source)
        load_spec(source, {"train.steps": 5, "regularizer.encoder.name": "b", "evaluate.every": 3})
        assert source == before

    @pytest.mark.parametrize(
        "path, value, line",
        [
            ("train.steps", "x", "<given>: train.steps: expected an integer, got 'x'"),
            ("train.steps.x", 1, "<given>: train.steps.x: 'train.steps' is a value, so it has no field 'x'"),
            ("name.x", 1, "<given>: name.x: 'name' is a value, so it has no field 'x'"),
            ("train.stepz", 1, "<given>: train.stepz: unknown field 'stepz'; "),
            ("trian.steps", 1, "<given>: trian: unknown field 'trian'; "),
            ("", 1, "<given>: unknown field ''; "),
            ("train.", 1, "<given>: train.: unknown field ''; "),
            ("train", None, "<given>: train: expected a mapping, got null"),
            ("axes.train.lr", [1], "<given>: axes.train.lr: expected a mapping, got [1]"),
            (
                "train.lr",
                object(),
                "<given>: train.lr: expected text, a number, true, false, null, a list or a mapping, ",
            ),
        ],
    )
    def test_what_is_wrong_with_them_has_no_place(self, tmp_path, path, value, line):
        with pytest.raises(SpecError) as caught:
            load_spec(write(tmp_path, HEAD), {path: value})
        assert [found for found in str(caught.value).splitlines() if found.startswith(line)]
        assert str(caught.value).startswith("<given>")


class TestLimits:
    def test_budget_and_stop_are_carried_and_none_by_default(self):
        plain = load_spec(mapping())
        assert (plain.budget.gpu_hours, plain.budget.disk_gib, plain.stop) == (None, None, ())
        given = load_spec(mapping(budget={"gpu_hours": 12, "disk_gib": 0}, stop={"metric": "fid", "below": 10}))
        assert (given.budget.gpu_hours, given.budget.disk_gib) == (12.0, 0.0)
        assert [(rule.metric, rule.below, rule.above, rule.after) for rule in given.stop] == [("fid", 10.0, None, 0)]
        assert given.arms == plain.arms

    @pytest.mark.parametrize(
        "rule, row, holds",
        [
            ({"below": 10}, {"step": 5, "fid:x": 9.9}, True),
            ({"below": 10}, {"step": 5, "fid:x": 10.0}, False),
            ({"below": 10}, {"step": 5, "fid:y": 9.0}, False),
            ({"below": 10}, {"step": 5, "fid:x": None}, False),
            ({"below": 10}, {"step": 5, "fid:x": math.nan}, False),
            ({"above": 10}, {"step": 5, "fid:x": 10.1}, True),
            ({"above": 10}, {"step": 5, "fid:x": 10.0}, False),
            ({"above": 0}, {"step": 5, "fid:x": 0.5}, True),
            ({"below": 10, "after": 6}, {"step": 5, "fid:x": 1.0}, False),
            ({"below": 10, "after": 5}, {"step": 5, "fid:x": 1.0}, True),
        ],
    )
    def test_a_rule_holds_of_a_row(self, rule, row, holds):
        assert load_spec(mapping(stop={"metric": "fid:x", **rule})).stop[0].holds(row) is holds


class TestSearch:
    def test_the_four_kinds_of_ranges(self, tmp_path):
        text = HEAD + (
            "search:\n  space:\n    regularizer.weight: {log: [0.05, 2]}\n    train.lr: {uniform: [0, 1]}\n"
            "    regularizer.block_index: {int: [1, 7]}\n    regularizer.type: {choice: [repa, none]}\n"
        )
        search = load_spec(write(tmp_path, text)).search
        assert isinstance(search, SearchConfig)
        assert search.space["regularizer.weight"].log == [0.05, 2.0]
        assert search.space["train.lr"].uniform == [0.0, 1.0]
        assert search.space["regularizer.block_index"].int_ == [1, 7]
        assert search.space["regularizer.type"].choice == ["repa", "none"]
        assert (search.objective.metric, search.objective.goal, search.trials) == ("frechet", "min", 20)

    def test_none_is_none(self):
        assert load_spec(mapping()).search is None


def test_a_spec_file_has_the_sections_of_a_run():
    assert set(RunConfig.model_fields) < set(SpecFile.model_fields)
    assert not set(RunConfig.model_fields) & set(RunOptions.model_fields)


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parents[2].glob("experiments/*.yaml")), ids=lambda file: file.stem
)
def test_every_shipped_experiment_can_be_read(file):
    experiment = load_spec(file)
    assert experiment.arms
    assert experiment.question


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("sweeps/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_fragment_can_be_laid_over_an_experiment(file):
    spec = Path(__file__).parents[2] / "experiments/quickstart.yaml"
    assert load_spec(spec, None, [file]) != load_spec(spec)


def test_problems_come_in_one_order_whatever_the_hash_seed(tmp_path):
    file = write(tmp_path, "nam: q\nmodel: {}\n")
    code = f"from repa_lab.spec import load_spec, SpecError\ntry:\n  load_spec({str(file)!r})\nexcept SpecError as e: print(e)"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert len(told.pop().splitlines()) == 5


WORDS = [
    *SpecFile.model_fields, *RunConfig.model_fields, "family", "size", "source", "type", "weight", "encoder", "schedule",
    "block_index", "steps", "lr", "every", "sampler", "guidance", "label", "set", "space", "log", "int", "choice", "baseline",
    "targets", "train.steps", "regularizer.weight", "regularizer.encoder", "a.b.c", "", ".", "..", "x" * 500, "\ud800", "a\0b",
]  # fmt: skip
LEAVES: list[Any] = [
    None, True, False, 0, 1, -1, 5, 10**30, 10**5000, 0.0, -0.0, 1e-4, math.nan, math.inf, -math.inf, "", "sit", "none", "repa",
    "mid", "digits", "x" * 500, "\ud800", "a\0b", "../..", b"x", object(), {1, 2}, (1,), range(3), Path("x"), 1j, len, int, ...,
]  # fmt: skip


def junk(draw: random.Random, depth: int) -> Any:
    kind = draw.random()
    if depth == 0 or kind < 0.4:
        return draw.choice(LEAVES)
    if kind < 0.6:
        return [junk(draw, depth - 1) for _ in range(draw.randrange(4))]
    keys = [draw.choice(WORDS) if draw.random() < 0.97 else draw.choice(LEAVES[:20]) for _ in range(draw.randrange(5))]
    return {key: junk(draw, depth - 1) for key in keys}


def outcome(*given: Any) -> Experiment | SpecError:
    try:
        return load_spec(*given)
    except SpecError as error:
        assert error.problems
        assert str(error)
        return error


def test_junk_from_a_program_is_refused_and_nothing_else():
    draw = random.Random(0)
    outcomes = []
    for _ in range(700):
        source = mapping() if draw.random() < 0.8 else {}
        for _ in range(draw.randrange(1, 4)):
            source[draw.choice(WORDS)] = junk(draw, 4)
        outcomes.append(outcome(source))
        outcomes.append(outcome(mapping(), {draw.choice(WORDS): junk(draw, 3)}))
    kinds = [type(found) for found in outcomes]
    assert kinds.count(SpecError) > 350
    assert kinds.count(Experiment) > 18


def test_sound_leaves_in_wrong_places_are_refused_and_nothing_else():
    """Junk that a file could say gets further than what it could not."""
    draw = random.Random(1)
    plain = [leaf for leaf in LEAVES if isinstance(leaf, (str, int, float, type(None))) and leaf != 10**5000]

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) if draw.random() < 0.98 else draw.choice(plain) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        return draw.choice(plain) if draw.random() < 0.02 else value

    whole = mapping(
        regularizer={
            "type": "repa",
            "weight": 0.5,
            "encoder": {"name": "x", "image_size": 14},
            "schedule": {"end": 0.0},
        },
        evaluate={"every": 5, "sampler": {"steps": 9}, "guidance": {"low": 0.1, "high": 0.5}, "encoder": {"name": "y"}},
        axes={"train.lr": [1e-3, 1e-4], "named": {"a": {"train.ema": 0.5}, "b": None}},
        one_at_a_time={"train.steps": [1, 2]},
        include=[{"label": "one", "set": {"train.steps": 3}}],
        exclude=[{"named": "a", "train.lr": [1e-3]}],
        search={"space": {"regularizer.weight": {"log": [0.1, 1.0]}}, "objective": {"goal": "min"}},
        compare={"baseline": {"regularizer.type": "none"}, "targets": {"fid": [30.0]}},
        seeds=[1, 2],
        run={"wandb": {"mode": "disabled"}, "workers": 1},
    )
    kinds = [type(outcome(fill(whole))) for _ in range(300)]
    assert kinds.count(SpecError) > 200
    assert kinds.count(Experiment) > 2


def test_damaged_files_are_refused_and_nothing_else(tmp_path):
    draw = random.Random(2)
    sound = (
        HEAD
        + "regularizer: {type: repa, encoder: &e {name: a, image_size: 14}}\nevaluate:\n  encoder: *e\n  every: 1e3\n"
        "axes:\n  train.lr: [1e-3, 1e-4]\n  named: {a: {train.ema: 0.5}, b: }\nexclude:\n- {named: a}\nseeds: 0x2\n"
    ).replace("1e3", "100")
    assert isinstance(outcome(write(tmp_path, sound)), Experiment)
    damage = [
        *"{}[]:,-&*!|>'\"%@`#?~ \n\t0x.eé\x00\x85\u2028",
        "<<",
        "!!int ",
        "!!set ",
        "---\n",
        "...\n",
        "? ",
        "\ud7ff",
    ]
    kinds = []
    for _ in range(300):
        text = list(sound)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text))
            text[at : at + draw.randrange(3)] = draw.choice(damage)
        kinds.append(type(outcome(write(tmp_path, "".join(text)))))
    assert kinds.count(SpecError) > 150
    assert kinds.count(Experiment) > 10
