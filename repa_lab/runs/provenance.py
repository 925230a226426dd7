"""What a number was made with: code, versions, machine. Never the environment: it may hold secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

GPUS = Path("/proc/driver/nvidia/gpus")
_PACKAGES = ("repa-lab", "torch", "diffusers", "timm", "accelerate", "torch-fidelity", "numpy", "scikit-learn")


def provenance() -> dict[str, Any]:
    """Plain data on the code (version, git commit, whether the tree is dirty), the libraries and the machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpu_models(),
    }


def gpu_models(folder: Path = GPUS) -> list[str]:
    """Return the GPUs of this machine as the driver names them; none without a driver."""
    return [_model(path) for path in sorted(folder.glob("*/information"))]


def _model(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "the GPU")


def git_state() -> dict[str, Any] | None:
    """Return the commit of this checkout and whether it is changed; None if the package is not in a repository."""
    here = Path(__file__).parent
    try:
        _run(["git", "ls-files", "--error-unmatch", Path(__file__).name], here)  # else it is someone else's repository
        commit = _run(["git", "rev-parse", "HEAD"], here)
        dirty = bool(_run(["git", "status", "--porcelain", "--untracked-files=no"], here))
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
