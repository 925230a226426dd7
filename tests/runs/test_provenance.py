from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import repa_lab.runs.directory as module
from repa_lab.runs.directory import gpu_models, provenance


def test_versions_and_machine():
    found = provenance()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert set(found["packages"]) >= {"repa-lab", "torch", "diffusers", "timm", "numpy"}
    assert (found["python"], found["platform"]) == (platform.python_version(), platform.platform())
    assert json.loads(json.dumps(found)) == found


def test_gpus_as_the_driver_calls_them(tmp_path):
    assert gpu_models(tmp_path) == []
    for number, model in enumerate(("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    assert gpu_models(tmp_path) == ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe"]
    assert provenance()["gpus"] == gpu_models()


def test_no_secret_of_the_environment_is_told(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-0123456789")
    assert "very-secret" not in json.dumps(provenance())


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def checkout(tmp_path: Path, monkeypatch) -> Path:
    """A repository that holds the module's file."""
    file = tmp_path / "repa_lab" / "directory.py"
    file.parent.mkdir()
    file.write_text("code\n")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(module, "__file__", str(file))
    return file


def test_the_commit_and_whether_the_tree_is_clean(tmp_path, monkeypatch):
    file = checkout(tmp_path, monkeypatch)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance()["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "notes.txt").write_text("untracked")
    assert provenance()["git"] == {"commit": commit, "dirty": False}
    file.write_text("changed\n")
    assert provenance()["git"] == {"commit": commit, "dirty": True}


def test_a_repository_that_only_happens_to_lie_around_the_code_is_not_its_own(tmp_path, monkeypatch):
    """A virtual environment inside someone's project."""
    checkout(tmp_path, monkeypatch)
    (tmp_path / "README").write_text("theirs")
    git(tmp_path, "add", "README")
    git(tmp_path, "commit", "-qm", "theirs")
    assert provenance()["git"] is None


def test_no_repository_and_no_git(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "directory.py"))
    assert provenance()["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git"] is None


def test_the_run_directory_needs_no_torch():
    code = "import sys, repa_lab.runs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
