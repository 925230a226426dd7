"""The command line as a user meets it: real processes, exit statuses, and no tracebacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def cli(*words, cwd=ROOT):
    command = [sys.executable, "-m", "repa_lab.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["plan", "sweep", "run"])
def test_a_bad_spec_is_one_line_a_problem_and_exit_status_2(tmp_path, command):
    (tmp_path / "bad.yaml").write_text("name: bad\nmodel: {family: sit, size: nano/2}\ntrain: {steps: 1e3, lr: off}\ndataa: {}\n")
    done = cli(command, "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "bad.yaml:1:1: data: this field is required",
        "bad.yaml:3:9: train.steps: expected an integer, got 1000.0",
        "bad.yaml:3:21: train.lr: expected a number, got 'off'",
        "bad.yaml:4:1: dataa: unknown field 'dataa'; allowed: axes, base, compare, data, evaluate, exclude, include, model, name, "
        "one_at_a_time, question, regularizer, run, search, seeds, train, use; did you mean 'data'?",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_plan_prints_json_that_names_every_run():
    done = cli("plan", "experiments/quickstart.yaml", "--json", "--root", "nowhere")
    planned = json.loads(done.stdout)
    assert (planned["name"], len(planned["runs"]), planned["runs"][0]["state"]) == ("quickstart", 12, "new")


def test_set_overrides_the_spec_and_is_checked_like_it():
    done = cli("plan", "experiments/quickstart.yaml", "--json", "--set", "seeds=1", "--set", "train.steps=5", "--root", "nowhere")
    assert [run["steps"] for run in json.loads(done.stdout)["runs"]] == [5, 5, 240, 240]
    wrong = cli("plan", "experiments/quickstart.yaml", "--set", "train.stepz=5")
    assert wrong.returncode == 2 and "<given>: train.stepz: unknown field 'stepz'" in wrong.stderr
    assert cli("plan", "experiments/quickstart.yaml", "--set", "steps").stderr == "<given>: --set steps: expected PATH=VALUE\n"


def test_sdxl_is_planned_and_refused_in_one_line(tmp_path):
    planned = cli("plan", "experiments/sdxl_manifold.yaml", "--json", "--root", tmp_path)
    assert planned.returncode == 0 and len(json.loads(planned.stdout)["runs"]) == 27
    swept = cli("sweep", "experiments/sdxl_manifold.yaml", "--root", tmp_path)
    assert swept.returncode == 2
    (line,) = swept.stderr.splitlines()
    assert line == (
        "experiments/presets/urepa_sdxl.yaml:3:9: model.family: family 'sdxl' can be planned but not yet trained by this version "
        "(trainable: sit, unet)"
    )
    assert not list(tmp_path.iterdir())


def test_unknown_sweeps_and_arms_name_what_there_is(tmp_path):
    assert cli("report", "nothing", "--root", tmp_path).stderr == f"no sweep 'nothing' in {tmp_path}; there are: none\n"
    done = cli("run", "experiments/quickstart.yaml", "--arm", "sit", "--root", tmp_path)
    assert done.returncode == 2 and "no arm 'sit'; there are: sit, baseline; sit, aligned" in done.stderr


def test_a_device_that_is_not_there_is_refused_at_its_place(tmp_path):
    text = (ROOT / "experiments/presets/quickstart.yaml").read_text().replace("run: {device: cpu}", "run: {device: cpu, precision: fp16}")
    (tmp_path / "half.yaml").write_text("name: half\n" + text)
    done = cli("run", "half.yaml", "--root", "runs", cwd=tmp_path)
    line = 1 + ("name: half\n" + text).splitlines().index("run: {device: cpu, precision: fp16}")
    assert done.stderr == f"half.yaml:{line}:20: run.precision: fp16 needs a GPU; use bf16 or fp32\n"
    assert done.returncode == 2 and [path.name for path in tmp_path.iterdir()] == ["half.yaml"]
