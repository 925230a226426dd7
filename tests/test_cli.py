"""The command line as a user meets it: exit statuses, lines, and no tracebacks."""

import json
import subprocess
import sys
import textwrap
from contextlib import chdir
from pathlib import Path

import pytest
from typer.testing import CliRunner

from repa_lab.cli import app
from tests.training.pretrained import write_images

ROOT = Path(__file__).parents[1]


def process(*words, cwd=ROOT):
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "repa_lab", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def cli(*words, cwd=ROOT):
    """Run a command in this process, for another one would import torch first; an error that is no line is raised."""
    with chdir(cwd):
        done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def test_a_process_prints_what_the_command_does_and_ends_with_its_status(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    refused, listed = (process(*words, cwd=tmp_path) for words in (("plan", "bad.yaml"), ("status",)))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == cli("plan", "bad.yaml", cwd=tmp_path).stderr
    assert (listed.returncode, listed.stderr, listed.stdout) == (0, "", cli("status", cwd=tmp_path).stdout)


class TestClosedStreams:
    """Commands of a daemon, or of a shell that closes the standard streams."""

    def closed(self, streams, *words, cwd):
        """Run a command with some of its standard streams closed."""
        shell = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable]
        return subprocess.run([*shell, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)

    def test_what_is_printed_to_the_others_is_the_same(self, tmp_path):
        (tmp_path / "bad.yaml").write_text("name: bad\n")
        refused = self.closed(">&-", "-m", "repa_lab", "plan", "bad.yaml", cwd=tmp_path)
        assert (refused.returncode, refused.stderr) == (2, cli("plan", "bad.yaml", cwd=tmp_path).stderr)
        listed = self.closed("2>&-", "-m", "repa_lab", "status", cwd=tmp_path)
        assert (listed.returncode, listed.stdout) == (0, cli("status", cwd=tmp_path).stdout)

    def test_no_file_takes_the_place_of_a_stream(self, tmp_path):
        code = """
            import os, subprocess, sys
            import repa_lab
            out = open("out", "w")
            print("lost")
            print("lost", file=sys.stderr)
            subprocess.run(["sh", "-c", "echo lost; echo lost >&2; cat"])
            out.write(" ".join(os.readlink(f"/proc/self/fd/{number}") for number in range(3)))
        """
        done = self.closed("<&- >&- 2>&-", "-c", textwrap.dedent(code), cwd=tmp_path)
        assert done.returncode == 0
        assert (tmp_path / "out").read_text() == "/dev/null /dev/null /dev/null"

    def test_a_sweep_without_any_trains_measures_and_reports(self, tmp_path):
        (tmp_path / "spec.yaml").write_text(
            "name: tiny\nmodel: {family: sit, size: nano/4}\ndata: {source: digits}\n"
            "train: {steps: 2, batch_size: 8}\nregularizer: {type: none}\n"
            "evaluate: {every: 2, samples: 16, sampler: {steps: 2}, extractor: {name: efficientnet_lite0}}\n"
            "run: {device: cpu, wandb: {mode: disabled}}\n"
        )
        done = self.closed("<&- >&- 2>&-", "-m", "repa_lab", "sweep", "spec.yaml", cwd=tmp_path)
        assert done.returncode == 0
        (run,) = json.loads(cli("status", "--json", cwd=tmp_path).stdout)
        assert (run["state"], run["step"]) == ("done", 2)
        assert (tmp_path / "runs" / "tiny" / "report.html").is_file()


@pytest.mark.parametrize("command", ["plan", "sweep", "run"])
def test_a_bad_spec_is_one_line_a_problem_and_exit_status_2(tmp_path, command):
    (tmp_path / "bad.yaml").write_text(
        "name: bad\nmodel: {family: sit, size: nano/2}\ntrain: {steps: 1e3, lr: off}\ndataa: {}\n"
    )
    done = cli(command, "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "bad.yaml:1:1: data: this field is required",
        "bad.yaml:3:9: train.steps: expected an integer, got 1000.0",
        "bad.yaml:3:21: train.lr: expected a number, got 'off'",
        "bad.yaml:4:1: dataa: unknown field 'dataa'; allowed: axes, base, budget, compare, data, evaluate, exclude, include, model, "
        "name, one_at_a_time, plugins, published, question, regularizer, run, search, seeds, stop, train, use; did you mean 'data'?",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_plan_prints_json_that_names_every_run():
    done = cli("plan", "experiments/quickstart.yaml", "--json", "--root", "nowhere")
    planned = json.loads(done.stdout)
    assert (planned["name"], len(planned["runs"]), planned["runs"][0]["state"]) == ("quickstart", 12, "new")


def test_set_overrides_the_spec_and_is_checked_like_it():
    done = cli(
        "plan",
        "experiments/quickstart.yaml",
        "--json",
        "--set",
        "seeds=1",
        "--set",
        "train.steps=5",
        "--root",
        "nowhere",
    )
    assert [run["steps"] for run in json.loads(done.stdout)["runs"]] == [5, 5, 240, 240]
    wrong = cli("plan", "experiments/quickstart.yaml", "--set", "train.stepz=5")
    assert wrong.returncode == 2 and "<given>: train.stepz: unknown field 'stepz'" in wrong.stderr
    assert cli("plan", "experiments/quickstart.yaml", "--set", "steps").stderr == "--set steps: expected PATH=VALUE\n"


def test_sdxl_is_planned_and_refused_in_one_line(tmp_path):
    planned = cli("plan", "experiments/sdxl_manifold.yaml", "--json", "--root", tmp_path)
    assert planned.returncode == 0 and len(json.loads(planned.stdout)["runs"]) == 27
    swept = cli("sweep", "experiments/sdxl_manifold.yaml", "--root", tmp_path, "--set", "data.source=imagefolder")
    assert swept.returncode == 2
    (line,) = swept.stderr.splitlines()
    assert (
        line
        == "experiments/sdxl_manifold.yaml:11:1: data.path: not set; give a folder of images with --set data.path=FOLDER"
    )
    assert not list(tmp_path.iterdir())


def test_sdxl_without_its_weights_or_captions_is_refused_in_one_line_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
    folder, root = write_images(tmp_path / "images"), tmp_path / "runs"
    data = [f"data={{source: imagefolder, path: {folder}, holdout: 6}}"]
    words = ("sweep", "experiments/sdxl_manifold.yaml", "--root", root, "--set", *data)
    swept = process(*words)
    assert swept.returncode == 2
    (line,) = swept.stderr.splitlines()
    assert line.startswith(
        "experiments/presets/urepa_sdxl.yaml:3:23: model.pretrained: 'stabilityai/stable-diffusion-xl-base-1.0' is no folder and not "
        "in the local cache; pass a folder or go online ("
    )
    (folder / "metadata.jsonl").unlink()
    swept = process(*words)
    assert swept.returncode == 2
    assert set(swept.stderr.splitlines()) == {
        f"<given>: data.path: sdxl is trained with captions, and '{folder}' has none: give metadata.jsonl (file_name, text), or a "
        ".txt beside each image"
    }
    assert not root.exists()


def test_a_rehearsal_says_what_it_is(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "name: one\nmodel: {family: sd15, pretrained: somewhere/else}\nregularizer: {type: urepa}\n"
        "data: {source: imagefolder, path: null, resolution: 512}\ntrain: {steps: 100}\n"
    )
    done = cli("sweep", "one.yaml", "--rehearse", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 runs trained now, 0 failed\na rehearsal: tiny random models, whose numbers say nothing\n" in done.stdout
    assert done.stdout.endswith("report: runs-rehearsal/one-rehearsal/report.html\n")
    assert "seed has no interval" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_unknown_sweeps_and_arms_name_what_there_is(tmp_path):
    assert cli("report", "nothing", "--root", tmp_path).stderr == f"no sweep 'nothing' in {tmp_path}; there are: none\n"
    done = cli("run", "experiments/quickstart.yaml", "--arm", "sit", "--root", tmp_path)
    assert done.returncode == 2 and "no arm 'sit'; there are: sit, baseline; sit, aligned" in done.stderr


def test_a_device_that_is_not_there_is_refused_at_its_place(tmp_path):
    text = (
        (ROOT / "experiments/presets/quickstart.yaml")
        .read_text()
        .replace("run: {device: cpu}", "run: {device: cpu, precision: fp16}")
    )
    (tmp_path / "half.yaml").write_text("name: half\n" + text)
    done = cli("run", "half.yaml", "--root", "runs", cwd=tmp_path)
    line = 1 + ("name: half\n" + text).splitlines().index("run: {device: cpu, precision: fp16}")
    assert done.stderr == f"half.yaml:{line}:20: run.precision: fp16 needs a GPU; use bf16 or fp32\n"
    assert done.returncode == 2 and [path.name for path in tmp_path.iterdir()] == ["half.yaml"]


class TestSimpleTuner:
    CONFIG = '{"model_family": "sdxl", "urepa_enabled": true, "urepa_manifold_weight": 1.0, "crepa_adjacent_tau": 2}'

    def test_an_imported_config_is_a_spec_that_plan_accepts(self, tmp_path):
        (tmp_path / "config.json").write_text(self.CONFIG)
        done = cli("import", "config.json", "--output", "question.yaml", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "")
        line = "config.json:1:1: not carried, because a spec has no field for them: crepa_adjacent_tau"
        assert line in done.stderr.splitlines()
        planned = cli("plan", "question.yaml", "--json", cwd=tmp_path)
        assert planned.returncode == 0 and json.loads(planned.stdout)["name"] == "sdxl_urepa"
        assert cli("import", "config.json", cwd=tmp_path).stdout == (tmp_path / "question.yaml").read_text()

    def test_flags_are_taken_as_they_stand_on_a_command_line(self, tmp_path):
        flags = (
            "--crepa_enabled=true",
            "--crepa_lambda",
            "0.25",
            "--crepa_encoder_frames_batch_size",
            "-1",
            "--seed=7",
        )
        done = cli("import", *flags, "--output", "fragment.yaml", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "weight: 0.25" in (tmp_path / "fragment.yaml").read_text()
        assert cli("import", *flags).stdout == (tmp_path / "fragment.yaml").read_text()

    def test_what_is_refused_writes_nothing(self, tmp_path):
        (tmp_path / "bad.json").write_text(self.CONFIG.replace("sdxl", "flux").replace("1.0", '"abc"'))
        done = cli("import", "bad.json", "--output", "new/question.yaml", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [
            "bad.json:1:26: urepa_enabled: urepa is for UNets; flux is a transformer: use crepa_*",
            "bad.json:1:49: urepa_manifold_weight: expected a number, got 'abc'",
        ]
        mistyped = cli("import", "bad.json", "--ouput", "x.yaml", cwd=tmp_path)
        assert mistyped.returncode == 2 and "expected one file, or flags such as --crepa_lambda=0.5" in mistyped.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]

    def test_no_file_is_written_over(self, tmp_path):
        (tmp_path / "config.json").write_text(self.CONFIG)
        done = cli("import", "config.json", "--output", "config.json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, "'config.json' exists; name a new file\n")
        assert (tmp_path / "config.json").read_text() == self.CONFIG
        done = cli("import", "config.json", "--output", "config.json/x", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, "cannot write 'config.json/x': File exists\n")

    def test_a_run_is_exported_as_the_settings_that_it_was_imported_from(self, tmp_path):
        (tmp_path / "config.json").write_text(self.CONFIG)
        cli("import", "config.json", "--output", "question.yaml", cwd=tmp_path)
        describe_run(tmp_path)
        done = cli("export", "abc", "--format", "simpletuner", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        settings = json.loads(done.stdout)
        assert (settings["urepa_enabled"], settings["urepa_manifold_weight"], settings["urepa_lambda"]) == (
            True,
            1.0,
            0.5,
        )
        assert cli("export", "abc", "out.json", "--format", "simpletuner", cwd=tmp_path).stdout == ""
        assert cli("export", "abc", "--format", "simpletuner", "--output", "too.json", cwd=tmp_path).returncode == 0
        assert (tmp_path / "out.json").read_text() == (tmp_path / "too.json").read_text() == done.stdout

    def test_what_cannot_be_exported_is_named_beside_the_settings(self, tmp_path):
        (tmp_path / "config.json").write_text(self.CONFIG)
        cli("import", "config.json", "--output", "question.yaml", cwd=tmp_path)
        describe_run(tmp_path, {"regularizer.loss": "nt_xent"})
        done = cli("export", "abc", "--format", "simpletuner", cwd=tmp_path)
        assert done.returncode == 0 and json.loads(done.stdout)["urepa_enabled"] is True
        assert done.stderr == "regularizer.loss: nt_xent cannot be expressed: SimpleTuner has the cosine alone\n"

    def test_an_export_says_what_it_lacks(self, tmp_path):
        (tmp_path / "config.json").write_text(self.CONFIG)
        cli("import", "config.json", "--output", "question.yaml", cwd=tmp_path)
        describe_run(tmp_path)
        for words, message in (
            ((), "FOLDER: name a new folder for the model"),
            (("--format", "comfy"), "--format: unknown format 'comfy'; allowed: diffusers, simpletuner"),
            (("a", "--output", "b", "--format", "simpletuner"), "--output: 'a' is named as well; give one of them"),
        ):
            done = cli("export", "abc", *words, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (2, f"{message}\n")


def describe_run(folder, overrides=None):
    """A run's directory as training would begin it."""
    from repa_lab.runs import RunsRoot
    from repa_lab.runs.directory import RunWriter
    from repa_lab.spec import load_spec
    from repa_lab.spec.identity import Run

    run = Run("abc", load_spec(folder / "question.yaml", overrides).arms[0].config, 0)
    with RunWriter(RunsRoot(folder / "runs").run("abc")) as writer:
        writer.describe(run.to_json(), {})


def test_families_are_listed_with_what_can_be_tapped():
    rows = {row["family"]: row for row in json.loads(cli("families", "--json").stdout)}
    assert (rows["sdxl"]["grid"], rows["sdxl"]["block_index"], rows["sdxl"]["regularizer"]) == (
        [32, 32],
        "mid",
        "urepa",
    )
    assert (rows["flux"]["blocks"], rows["flux"]["width"], rows["flux"]["parameters"]) == (57, 3072, 11_901_408_320)
    table = cli("families").stdout
    assert all(name in table for name in rows) and "64x64" in table and "11,901,408,320" in table
