"""What this installation and machine have: the facts that a bug report needs, and no secret among them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from repa_lab.cli.shared import JsonOption, RootOption
from repa_lab.runs.directory import git_state
from repa_lab.runs.root import DEFAULT_ROOT

_GIB = float(2**30)
_PATIENCE_S = 3.0
_TORCH_PATIENCE_S = 120.0
_DEVELOPMENT = re.compile(r"extra == .dev")


def doctor(json_: JsonOption = False, root: RootOption = DEFAULT_ROOT) -> None:
    """Describe this installation and machine, without secrets, for a bug report."""
    sections = diagnose(root)
    if json_:
        print(json.dumps(sections, indent=2))
        return
    for title, facts in sections.items():
        print(f"{title}:" if facts else f"{title}: none")
        for fact in facts if isinstance(facts, list) else [f"{name}: {value}" for name, value in facts.items()]:
            print(f"  {fact}")


def diagnose(root: Path, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return facts on versions, devices, disk, services and cached weights, as plain data by section.

    Args:
        root: the folder of all runs, whose disk is looked at.
        environment: the environment variables; of keys and tokens only their presence is told.
    """
    from repa_lab.orchestration.executors import launcher_variables

    return {
        "versions": _versions(),
        "machine": _machine(root),
        "devices": _devices(),
        "services": _services(environment),
        "cached weights": _cached_weights(),
        "launcher variables": sorted(launcher_variables(environment)),
    }


def _versions() -> dict[str, str]:
    """Return the versions of repa-lab and of all that it may use."""
    required = importlib.metadata.requires("repa-lab") or []
    names = dict.fromkeys(re.split(r"[^\w.-]", line)[0] for line in required if not _DEVELOPMENT.search(line))
    git = git_state()
    commit = f" at {git['commit'][:10]}{', changed' if git['dirty'] else ''}" if git else ""
    ours = {"repa-lab": f"{importlib.metadata.version('repa-lab')}{commit}", "python": platform.python_version()}
    return ours | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine(root: Path) -> dict[str, str]:
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    disk = shutil.disk_usage(existing)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "memory": f"{memory / _GIB:.1f} GiB",
        "disk": f"{disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f} GiB",
    }


def _devices() -> dict[str, str]:
    """Return the devices that torch finds, asked in another process, because torch or a driver may be broken."""
    code = f"import json; from {__name__} import devices_of_torch; print(json.dumps(devices_of_torch()))"
    command, patience = [sys.executable, "-c", code], _TORCH_PATIENCE_S
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
        found: dict[str, str] = json.loads(asked.stdout.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"unknown": f"torch does not answer within {_TORCH_PATIENCE_S:g} s"}
    except (ValueError, IndexError):
        lines = asked.stderr.splitlines() or [f"exit status {asked.returncode}"]
        return {"unknown": f"torch cannot be used: {lines[-1]}"}


def devices_of_torch() -> dict[str, str]:
    """Return a line of facts for each device that torch finds in this process."""
    import torch

    if not torch.cuda.is_available():
        built_for = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch has no CUDA"
        return {"cpu": f"{torch.get_num_threads()} threads; no GPU, {built_for}"}
    devices = {}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        precision = "bf16" if facts.major >= 8 else "fp16"
        capability = f"capability {facts.major}.{facts.minor}, {precision}"
        devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / _GIB:.1f} GiB, {capability}"
    return devices


def _services(environment: Mapping[str, str]) -> dict[str, str]:
    from huggingface_hub import constants, get_token

    from repa_lab.tracking.server import KEY, api_key, resolve_mode, server_address

    hub = "offline by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else _reach(constants.ENDPOINT)
    address = environment.get("WANDB_BASE_URL") or server_address()
    wandb = f"{_reach(address)}, {_presence(environment.get(KEY) or api_key(), 'key')}"
    ray = "installed" if _version("ray") != "not installed" else "not installed"
    if "RAY_ADDRESS" in environment:
        ray += ", RAY_ADDRESS is set"
    return {
        "hub": f"{hub}, {_presence(get_token(), 'token')}",
        "W&B": f"{wandb}, mode {resolve_mode('auto')}",
        "Ray": ray,
        "Slurm": "sbatch is here" if shutil.which("sbatch") else "no sbatch here",
    }


def _reach(url: str) -> str:
    """Return whether a server answers, named by its host: the rest of a URL may hold a password."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE_S):
            return f"{host} answers"
    except OSError:
        return f"{host} cannot be reached"


def _presence(secret: str | None, kind: str) -> str:
    return f"a {kind} is set" if secret else f"no {kind}"


def _cached_weights() -> dict[str, str]:
    """Return the models in the cache of the hub with their sizes."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        models = [repository for repository in scan_cache_dir().repos if repository.repo_type == "model"]
    except CacheNotFound:
        return {}
    return {model.repo_id: f"{model.size_on_disk / _GIB:.2f} GiB" for model in sorted(models, key=lambda m: m.repo_id)}
