"""Upload what W&B recorded offline, with W&B's own command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from repa_lab.runs import RunDirectory

KEY = "WANDB_API_KEY"


class NoKeyError(ValueError):
    """There is something to upload and no key to do it with."""


@dataclass(frozen=True)
class Synced:
    """What became of a run: ``detail`` is its address, or why it failed or was left."""

    run_id: str
    outcome: Literal["synced", "already synced", "failed", "left"]
    detail: str = ""


def offline_folders(run: RunDirectory) -> list[Path]:
    """What W&B recorded of a run offline, a folder for each time the run was started, oldest first."""
    return sorted(folder for folder in run.path.glob("wandb/offline-run-*") if _records(folder))


def is_synced(folder: Path) -> bool:
    """Whether W&B says that it has uploaded all of a folder."""
    return all(record.with_name(f"{record.name}.synced").exists() for record in _records(folder))


def sync(run: RunDirectory) -> Synced:
    """Upload what was not uploaded yet of a run that W&B recorded offline.

    A run that is being trained is left alone, for what it has yet to record would be taken for uploaded.

    Raises:
        NoKeyError: WANDB_API_KEY is not in the environment.
    """
    waiting = [folder for folder in offline_folders(run) if not is_synced(folder)]
    if not waiting:
        return Synced(run.run_id, "already synced")
    if run.is_held:
        return Synced(run.run_id, "left", "it is being trained; sync it when it has come to rest")
    if not os.environ.get(KEY):
        raise NoKeyError(f"no W&B key: set {KEY} to upload run {run.run_id} (keys are read from the environment alone)")
    said = _upload(waiting)
    # W&B's command ends with 0 even where it could not upload; the marks that it leaves are what counts.
    if all(is_synced(folder) for folder in waiting):
        return Synced(run.run_id, "synced", _address(said))
    return Synced(run.run_id, "failed", _reason(said))


def sync_command(folders: list[Path]) -> list[str]:
    """W&B's command that uploads the folders of one run, one after the other in the order in which they were recorded."""
    return [sys.executable, "-m", "wandb", "sync", *(str(folder.absolute()) for folder in folders)]


def _upload(folders: list[Path]) -> str:
    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:  # W&B writes a log to where it is called
        done = subprocess.run(sync_command(folders), cwd=scratch, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("run-*.wandb"))


def _address(said: str) -> str:
    found = re.findall(r"View run.* at (http\S+)", said)
    return found[-1] if found else ""


def _reason(said: str) -> str:
    """The last line that W&B calls an error, or else its last line."""
    lines = [line.removeprefix("wandb: ").strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["W&B said nothing"]
    return errors[-1].removeprefix("ERROR ").removeprefix("Error: ")
