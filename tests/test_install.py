"""What an installed repa-lab does in an empty folder, and what `doctor` tells of an installation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repa_lab.cli.doctor import diagnose
from tests.test_cli import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of a wheel's content, built from this tree and installed beside the environment's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        folder / "site",
    ]
    subprocess.run([*install, wheel], check=True)
    return folder / "site"


def test_a_wheel_in_an_empty_folder_writes_plans_trains_and_reports(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def run(*words):
        command = [sys.executable, "-m", "repa_lab", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    run("new", "question.yaml")
    small = [
        "--set",
        "train.steps=2",
        "--set",
        "evaluate={every: 2, samples: 16, sampler: {steps: 2}}",
        "--set",
        "seeds=1",
    ]
    small += ["--set", "axes.denoiser={sit: {model.size: nano/2}}"]
    planned = json.loads(run("plan", "question.yaml", *small, "--json"))
    assert [run["arm"] for run in planned["runs"]] == ["baseline, sit", "aligned, sit"]
    run("sweep", "question.yaml", *small, "--workers", "1")
    assert "aligned, sit" in run("report", "question")
    assert "repa/b2" in run("reproduce")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["question.yaml", "runs"]


def test_new_refuses_a_file_that_exists_and_an_unknown_example(tmp_path):
    assert cli("new", "My Question.yaml", "--like", "sdxl_manifold", cwd=tmp_path).returncode == 0
    assert "name: my_question\n" in (tmp_path / "My Question.yaml").read_text()
    again = cli("new", "My Question.yaml", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (2, "'My Question.yaml' exists; name a new file\n")
    unknown = cli("new", "other.yaml", "--like", "sdxl_manifolt", cwd=tmp_path)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("--like: no example 'sdxl_manifolt'; there are: flux_block_index, ")
    assert unknown.stderr.endswith("did you mean 'sdxl_manifold'?\n")
    assert not (tmp_path / "other.yaml").exists()


def test_doctor_tells_whether_secrets_are_set_and_never_what_they_are(tmp_path):
    environment = {
        "WANDB_API_KEY": "secret" * 8,
        "WANDB_BASE_URL": "http://user:secret@127.0.0.1:9/secret",  # the port `discard`, which nobody serves
        "RAY_ADDRESS": "secret:6379",
        "WORLD_SIZE": "4",
        "RANK": "0",
    }
    facts = diagnose(tmp_path / "not" / "there", environment)
    assert facts["services"]["W&B"].startswith("127.0.0.1 cannot be reached, a key is set")
    assert facts["launcher variables"] == ["RANK", "WORLD_SIZE"]
    assert "secret" not in json.dumps(facts)
    assert facts["versions"]["torch"] == __import__("torch").__version__.partition("+")[0]
    assert not (tmp_path / "not").exists()


def test_doctor_tells_that_torch_is_broken(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    reason = "torch cannot be used: OSError: libcudart.so.13: cannot open shared object file"
    assert diagnose(tmp_path)["devices"] == {"unknown": reason}


def test_doctor_prints_its_facts_as_text_and_as_json(tmp_path):
    facts = json.loads(cli("doctor", "--json", cwd=tmp_path).stdout)
    lines = cli("doctor", cwd=tmp_path).stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == list(facts)
    assert f"  python: {facts['versions']['python']}" in lines


def test_version_is_that_of_the_distribution():
    import repa_lab

    assert cli("--version").stdout == f"repa-lab {repa_lab.__version__}\n"
