"""The papers' tables: specs by name, their arms at the nano scale, and what is said of them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from repa_lab.models.family import SIT_DOWN_SHAPES, SIT_SHAPES
from repa_lab.orchestration.checks import check
from repa_lab.orchestration.plan import identify_run
from repa_lab.orchestration.reproduce import ReproduceError, names, open_table, scaled_block
from repa_lab.runs import RunsRoot
from repa_lab.spec import SpecError
from repa_lab.training.resolve import Inventory, resolved_regularizers
from tests.test_cli import cli

ROOT = Path(__file__).parents[2]
TABLES = names()
AT_NANO = [name for name in TABLES if name != "repa/table2-encoders" and not name.startswith("haste/")]

# What the papers' commands, tables and appendices state, with blocks counted from 0: settings of the regularizer by arm.
METHODS = {
    "dispersive/b2": {
        "paper": {"weight": 0.5, "temperature": 0.5, "block_index": 12 // 4 - 1, "loss": "infonce_l2"},
        "released code": {"weight": 0.25, "temperature": 1.0, "block_index": 12 - 1, "loss": "infonce_l2"},
    },
    "dispersive/variants": {
        "InfoNCE of distances": {"loss": "infonce_l2", "weight": 0.5, "temperature": 0.5},
        "InfoNCE of cosines": {"loss": "infonce_cosine", "weight": 0.5, "temperature": 0.5},
        "hinge": {"loss": "hinge", "weight": 0.5},
    },
    "haste/table4-l": {"stop at 250K": {"weight": 0.5, "attention_weight": 1.0, "attention": range(4, 8)}},
    "haste/table5": {
        f"weight {weight}": {"weight": 0.5, "attention_weight": weight / 0.5} for weight in (0.5, 1.0, 1.5, 3.0)
    },
    "haste/table6": {
        "layers=2": {"attention": range(6, 8)},
        "layers=4": {"attention": range(4, 8)},
        "layers=6": {"attention": range(2, 8)},
    },
    "haste/xl2": {
        "haste, stop at 250K": {"weight": 0.5, "attention_weight": 1.0, "attention": range(4, 8), "block_index": 7},
        "repa": {"type": "repa", "weight": 0.5, "block_index": 7},
    },
    "irepa/table2": {
        "repa": {"weight": 0.5, "spatial_norm": None},
        "convolution": {"weight": 0.5, "spatial_norm": None},
        "normalisation": {"weight": 0.5, "spatial_norm": 0.6},
        "irepa": {"weight": 0.5, "spatial_norm": 0.6, "block_index": 7},
    },
    "irepa/table4": {
        "DINOv2-B, irepa": {"spatial_norm": 0.6, "block_index": 7},
        "DINOv3-B, repa": {"spatial_norm": None, "block_index": 7},
    },
    "layersync/l2": {"layersync": {"weight": 0.2, "block_index": 7, "teacher_block": 17}},
    "layersync/xl2": {"layersync": {"weight": 0.2, "block_index": 7, "teacher_block": 15}},
    "sra/table1": {"sra": {"weight": 0.2, "block_index": 2, "teacher_block": 7, "beta": 0.05, "less_noise": 0.2}},
    "sra2/table1": {
        f"block {block}": {"weight": 1.0, "block_index": block - 1, "beta": 0.05, "normalize": False}
        for block in (2, 6, 8)
    },
}


def test_the_papers_tables_are_there():
    assert {"repa/b2", "repa/l2", "repa/xl2", "repa/table2-encoders", "repa/table2-depth", "repa/table5"} <= set(TABLES)
    assert {f"urepa/table{table}" for table in ("3-b", "3-l", "3-xl", "4", "6", "7", "8")} <= set(TABLES)
    assert METHODS.keys() == {name for name in TABLES if not name.startswith(("repa/", "urepa/"))}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_sound_and_its_numbers_are_of_its_arms(name):
    experiment = open_table(name)
    check(experiment, None)
    said = experiment.published
    assert set(said.arms) <= {arm.label for arm in experiment.arms}
    assert len(said.arms) >= 2
    assert all((said.source, said.protocol, said.basis, said.deviations, said.tolerance["fid"]))
    header = (ROOT / f"experiments/paper/{name}.yaml").read_text()
    assert all(f"# {word}" in header for word in ("Question:", "Source:", "Cost:"))


@pytest.mark.parametrize("name", sorted(set(TABLES) - METHODS.keys()))
def test_the_papers_settings(name):
    """papers.md 1.5, 1.7 and 2.3."""
    for arm in open_table(name).arms:
        train, evaluate, regularizer = arm.config.train, arm.config.evaluate, arm.config.regularizer
        assert (train.batch_size, train.lr, train.weight_decay, train.grad_clip) == (256, 1e-4, 0.0, 1.0)
        assert (train.ema, train.label_dropout) == (0.9999, 0.1)
        if regularizer.type != "none":
            assert (regularizer.projector.type, regularizer.projector.width) == ("mlp", 2048)
        assert (evaluate.samples, evaluate.every, evaluate.labels) == (50_000, 50_000, "random")
        ablation = name.startswith("urepa") and "table3" not in name
        assert train.steps == (100_000 if ablation else 400_000)
        assert (evaluate.sampler.type, evaluate.guidance.scale) == (("ode", 1.8) if ablation else ("sde", 1.0))
    assert open_table(name).run.precision == "fp16"


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_further_methods(name):
    """Those of REPA's code, on which theirs is built, but for what each paper states."""
    experiment = open_table(name)
    steps = {"haste/xl2": 500_000, "irepa/table2": 100_000}.get(name, 400_000)
    sampler = ("ode", "heun", 125) if name.startswith(("dispersive", "layersync")) else ("sde", "euler", 250)
    for arm in experiment.arms:
        train, evaluate = arm.config.train, arm.config.evaluate
        assert (train.steps, train.batch_size, train.lr, train.weight_decay, train.ema) == (
            steps,
            256,
            1e-4,
            0.0,
            0.9999,
        )
        assert (evaluate.samples, evaluate.labels, evaluate.guidance.scale) == (50_000, "random", 1.0)
        assert (evaluate.sampler.type, evaluate.sampler.solver, evaluate.sampler.steps) == sampler
        regularizer = resolved_regularizers(arm.config)[0] if arm.config.regularizers else arm.config.regularizer
        expected = METHODS[name].get(arm.label, {})
        assert {field: getattr(regularizer, field) for field in expected} == expected
    assert experiment.run.precision == ("bf16" if name.startswith("irepa") else "fp16")


def test_blocks_are_the_papers_depths_less_one():
    depths = {
        name: [arm.config.regularizer.block_index for arm in open_table(name).arms]
        for name in ("repa/b2", "repa/xl2", "repa/table2-depth")
    }
    assert (depths["repa/b2"][1], depths["repa/xl2"][1]) == (3, 7)
    assert depths["repa/table2-depth"] == [5, 7, 9, 11, 13, 15]
    labels = {arm.label: arm.config.regularizer.block_index for arm in open_table("urepa/table4").arms}
    assert labels == {f"L{depth}": depth - 1 for depth in (4, 8, 12, 16, 18, 20, 24, 28, 32)}


def test_published_numbers_are_no_part_of_a_runs_identity():
    with_numbers = open_table("urepa/table8")
    without = open_table("urepa/table8", overrides={"published": None})
    assert without.published is None
    ids = [[identify_run(arm.config, 0).run_id for arm in experiment.arms] for experiment in (with_numbers, without)]
    assert ids[0] == ids[1]


class TestNano:
    @pytest.mark.parametrize("name", AT_NANO)
    def test_it_can_be_carried_out_without_a_gpu_or_a_hub(self, name):
        experiment = open_table(name, "nano")
        check(experiment, Inventory())
        assert experiment.name == f"{open_table(name).name}-nano"
        assert "the shape of the effect, not the number" in experiment.question
        assert experiment.seeds == (0, 1, 2)
        assert (experiment.run.device, experiment.run.precision) == ("cpu", "fp32")
        for arm in experiment.arms:
            config = arm.config
            assert (config.model.size, config.data.source, config.data.vae) == ("nano/2", "digits", None)
            assert {encoder.name for _, encoder in config.encoder_paths} == {"efficientnet_lite0"}
            assert (config.train.steps, config.evaluate.guidance.scale) == (600, 1.0)

    @pytest.mark.parametrize("name", AT_NANO)
    def test_the_arms_are_the_papers(self, name):
        full, nano = open_table(name), open_table(name, "nano")
        assert [arm.label for arm in nano.arms] == [arm.label for arm in full.arms]
        for big, small in zip(full.arms, nano.arms, strict=True):
            ours, theirs = small.config.regularizer, big.config.regularizer
            assert small.config.model.family == big.config.model.family
            assert type(ours) is type(theirs)
            at_nano = {"encoder", "projector", "block_index", "teacher_block"}
            assert ours.model_dump(exclude=at_nano) == theirs.model_dump(exclude=at_nano)
            if hasattr(ours, "projector"):
                assert ours.projector.type == theirs.projector.type

    def test_what_it_has_only_one_of_is_refused(self):
        with pytest.raises(ReproduceError, match=r"repa/table2-encoders differ in what the nano scale has only one of"):
            open_table("repa/table2-encoders", "nano")
        for name in set(TABLES) - set(AT_NANO) - {"repa/table2-encoders"}:
            with pytest.raises(
                ReproduceError, match=f"{name} aligns attention, and the encoder of the nano scale has none"
            ):
                open_table(name, "nano")

    def test_values_lie_over_it(self):
        experiment = open_table("urepa/table8", "nano", {"train.steps": 7, "seeds": 1, "evaluate.every": 7})
        assert {arm.config.train.steps for arm in experiment.arms} == {7}
        assert experiment.seeds == (0,)
        assert [arm.config.regularizer.manifold_weight for arm in experiment.arms] == [0, 2, 3, 4]
        with pytest.raises(SpecError, match="stepz"):
            open_table("urepa/table8", "nano", {"train.stepz": 7})

    def test_a_block_keeps_its_place_in_its_stage(self):
        big, small = SIT_DOWN_SHAPES["XL/2"], SIT_DOWN_SHAPES["nano/2"]
        places = {block: scaled_block(block, big, small) for block in (0, 9, 10, 17, 18, 25, 26, 35)}
        assert places == {0: 0, 9: 1, 10: 2, 17: 2, 18: 3, 25: 3, 26: 4, 35: 5}
        assert [scaled_block(block, small, small) for block in range(6)] == list(range(6))
        layers = {arm.label: arm.config.regularizer.block_index for arm in open_table("urepa/table4", "nano").arms}
        assert layers == {"L4": 0, "L8": 1, "L12": 2, "L16": 2, "L18": 2, "L20": 3, "L24": 3, "L28": 4, "L32": 5}
        depths = [arm.config.regularizer.block_index for arm in open_table("repa/table2-depth", "nano").arms]
        assert depths == [0, 1, 1, 1, 2, 2]
        pairs = {
            name: [
                (arm.config.regularizer.block_index, arm.config.regularizer.teacher_block)
                for arm in open_table(name, "nano").arms[1:]
            ]
            for name in ("layersync/xl2", "layersync/l2", "sra/table1")
        }  # blocks 7 and 15 of 28, 7 and 17 of 24, 2 and 7 of 12, each at the same place of 4
        assert pairs == {"layersync/xl2": [(1, 2)], "layersync/l2": [(1, 2)], "sra/table1": [(0, 2)]}
        large, little = SIT_SHAPES["L/2"], SIT_SHAPES["nano/2"]
        assert [scaled_block(block, large, little) for block in (0, 5, 6, 11, 12, 17, 18, 23)] == [
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
        ]


def test_an_unknown_table_is_one_line_that_lists_those_there_are(tmp_path):
    done = cli("reproduce", "urepa/tabel8", "--root", tmp_path / "runs", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"no table 'urepa/tabel8'; there are: {', '.join(TABLES)}; did you mean 'urepa/table8'?\n"
    wrong = cli("reproduce", "urepa/table8", "--scale", "tiny")
    assert (wrong.returncode, wrong.stderr) == (2, "--scale: unknown scale 'tiny'; allowed: full, nano\n")
    assert not list(tmp_path.iterdir())


def test_tables_are_listed_without_torch_and_full_scale_asks_for_images(tmp_path):
    assert tuple(cli("reproduce").stdout.split()) == TABLES
    done = cli("reproduce", "urepa/table8", "--root", tmp_path / "runs")
    assert done.returncode == 2
    assert "data.path: not set; give a folder of images with --set data.path=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())
    code = "import sys; from repa_lab.orchestration.reproduce import open_table; open_table('urepa/table8', 'nano'); print('torch' in sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert asked.stdout.strip() == "False"


def test_a_table_is_carried_out_and_written(tmp_path):
    short = ["train.steps=2", "evaluate.every=2", "evaluate.samples=16", "evaluate.sampler.steps=2", "seeds=1"]
    words = [
        "reproduce",
        "urepa/table6",
        "--scale",
        "nano",
        "--root",
        tmp_path,
        *(word for value in short for word in ("--set", value)),
    ]
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert "nano scale, on digits: the shape of the effect, not the number" in done.stdout
    assert "tolerance" not in done.stdout and "deviation" not in done.stdout
    folder = tmp_path / "urepa-table6-nano"
    rows = list(csv.DictReader((folder / "reproduce.csv").open()))
    assert [(row["arm"], row["published"]) for row in rows] == [("side=student", "5.72"), ("side=teacher", "5.99")]
    manifest = json.loads((folder / "sweep.json").read_text())
    for row, arm in zip(rows, manifest["arms"], strict=True):
        found = RunsRoot(tmp_path).run(arm["runs"][0]["run_id"]).rows()
        assert float(row["measured"]) == next(one[row["metric"]] for one in reversed(found) if row["metric"] in one)
    page = (folder / "reproduce.md").read_text()
    assert "| side=teacher | 5.99 |" in page
    assert "open (fewer than 3 seeds)" in page
