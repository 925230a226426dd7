"""A run on Weights & Biases: curves over ``images``, sample grids, a table of evaluations; offline without a key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from repa_lab.errors import InputError
from repa_lab.runs import State, checkpoints
from repa_lab.runs.directory import RunDirectory
from repa_lab.runs.files import Row

KEY = "WANDB_API_KEY"


def resolve_mode(mode: str) -> str:
    """Return a W&B mode; ``auto`` is WANDB_MODE if set, else online with WANDB_API_KEY set and offline without."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get(KEY) else "offline")


@dataclass(frozen=True)
class WandbRun:
    """The description of a run on W&B.

    Attributes:
        name: the run's display name.
        group: the sweep's name.
        config: the resolved settings, nested; recorded protocols are added as ``protocols``.
        project: the W&B project.
        mode: ``online`` or ``offline``.
        entity: the W&B user or team; None is the key's own.
        tags: labels to filter by.
        keeps_weights: whether the averaged weights of a finished run become an artifact.
        headline: returns, from all rows, the entries of the run's summary under ``headline/``.
    """

    name: str
    group: str
    config: dict[str, Any]
    project: str
    mode: str
    entity: str | None = None
    tags: Sequence[str] = ()
    keeps_weights: bool = False
    headline: Callable[[list[Row]], dict[str, Any]] = field(default=lambda rows: {})


class WandbListener:
    """Sends a run's rows to W&B; a resumed run continues under the same id.

    The first row starts W&B, so a run that is already finished, or held by another process, never starts W&B. Rows that
    the run directory holds before that, such as steps shared with another run, are sent then. W&B only appends: a row
    that is written again after a kill is there twice, with the same values.

    Args:
        run: the run's directory; W&B's own files go to ``wandb/`` in it.
        description: the run's description.
    """

    def __init__(self, run: RunDirectory, description: WandbRun) -> None:
        self._directory, self._description = run, description
        self._run: Any = None
        self._progress: Row = {}

    def row(self, row: Row) -> None:
        """Log the row with its ``step`` and ``images`` as values: W&B drops rows whose own step does not increase."""
        self._started()
        self._log(row)

    def image(self, step: int, path: Path) -> None:
        """Log a sample grid."""
        import wandb

        self._started().log({**self._progress, "samples": wandb.Image(str(path)), "step": step})

    def finish(self, state: State) -> None:
        """Close the W&B run with its headline; add the table of evaluations and the weights if the run is done."""
        if self._run is None:
            return
        rows = self._directory.rows()
        entries = self._description.headline(rows)
        self._run.summary.update({f"headline/{name}": value for name, value in entries.items()})
        if state is State.DONE:
            self._conclude(rows)
        self._run.finish(exit_code=0 if state.status.is_over else 1)

    def _conclude(self, rows: list[Row]) -> None:
        import wandb

        # Measurements on averaged weights, without the rows that are logged while training.
        table = [row for row in rows if any("@" in name or name.startswith("heldout/") for name in row)]
        if table:
            columns: list[Any] = list(dict.fromkeys(name for row in table for name in row))
            data = [[row.get(name) for name in columns] for row in table]
            self._run.log({**self._progress, "evaluations": wandb.Table(columns=columns, data=data)})
        if self._description.keeps_weights:
            run_id, newest = self._directory.run_id, checkpoints.latest(self._directory.checkpoints)
            assert newest is not None  # a finished run has a checkpoint of its last step
            step, folder = newest
            artifact = wandb.Artifact(f"{run_id}-ema", type="model", metadata={"run_id": run_id, "step": step})
            # By reference: the last checkpoint of a finished run is never deleted, and a copy would double its size.
            artifact.add_file(str(folder / "ema.safetensors"), policy="immutable")
            artifact.add_file(str(self._directory.path / "spec.json"), policy="immutable")
            self._run.log_artifact(artifact)

    def _log(self, row: Row) -> None:
        self._progress = {key: row[key] for key in ("step", "images") if key in row}
        self._run.log({key: value for key, value in row.items() if value is not None})

    def _started(self) -> Any:
        if self._run is None:
            is_new = not any(self._directory.path.glob(f"wandb/*run-*-{self._directory.run_id}"))
            self._run = _start(self._directory, self._description)
            # The last row is the one that is being logged.
            for row in self._directory.rows()[:-1] if is_new else []:
                self._log(row)
        return self._run


def _start(run: RunDirectory, description: WandbRun) -> Any:
    import wandb  # 1 s

    # W&B would otherwise store the command line, the machine's name and the source tree.
    quiet: dict[str, Any] = {"console": "off", "silent": True, "host": ""}
    options: dict[str, Any] = {
        "id": run.run_id,
        "project": description.project,
        "entity": description.entity,
        "mode": description.mode,
        "dir": str(run.path),
        "name": description.name,
        "group": description.group,
        # Protocols are recorded before the first row, and so before W&B is started.
        "config": {**description.config, "protocols": run.protocols},
        "tags": list(description.tags),
        "job_type": "train",
        "resume": "allow",
        "reinit": "create_new",  # without it, W&B returns an open run of this process if there is one
        "settings": wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, **quiet),
    }
    started: Any = wandb.init(**options)
    started.define_metric("images")
    started.define_metric("*", step_metric="images")
    return started


# ---- uploading what was recorded offline, with W&B's own command


class NoKeyError(InputError):
    """There is something to upload and no key to upload it with."""


@dataclass(frozen=True)
class SyncResult:
    """The outcome of an upload; ``detail`` is the run's address, or the reason why nothing was uploaded."""

    run_id: str
    outcome: Literal["synced", "already synced", "failed", "left"]
    detail: str = ""


def offline_folders(run: RunDirectory) -> list[Path]:
    """Return the folders that W&B recorded offline, one for each start of the run, oldest first."""
    return sorted(folder for folder in run.path.glob("wandb/offline-run-*") if _records(folder))


def is_synced(folder: Path) -> bool:
    """Return whether W&B has marked all of a folder as uploaded."""
    return all(record.with_name(f"{record.name}.synced").exists() for record in _records(folder))


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("run-*.wandb"))


def sync(run: RunDirectory) -> SyncResult:
    """Upload what was not uploaded yet of a run that W&B recorded offline.

    A run that is being trained is left alone: W&B would mark it as uploaded before it is complete.

    Raises:
        NoKeyError: WANDB_API_KEY is not in the environment.
    """
    waiting = [folder for folder in offline_folders(run) if not is_synced(folder)]
    if not waiting:
        return SyncResult(run.run_id, "already synced")
    if run.is_held:
        return SyncResult(run.run_id, "left", "it is being trained; sync it when training has ended")
    if not os.environ.get(KEY):
        raise NoKeyError(f"no W&B key: set {KEY} to upload run {run.run_id} (keys are read from the environment alone)")
    with tempfile.TemporaryDirectory(prefix="repa-lab-") as scratch:  # W&B writes a log into the working directory
        done = subprocess.run(sync_command(waiting), cwd=scratch, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    # W&B's command ends with status 0 even if it could not upload; the marks that it leaves are what counts.
    if all(is_synced(folder) for folder in waiting):
        addresses = re.findall(r"View run.* at (http\S+)", output)
        return SyncResult(run.run_id, "synced", addresses[-1] if addresses else "")
    # The last line that W&B calls an error, or else its last line.
    lines = [line.removeprefix("wandb: ").strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["W&B printed nothing"]
    return SyncResult(run.run_id, "failed", errors[-1].removeprefix("ERROR ").removeprefix("Error: "))


def sync_command(folders: list[Path]) -> list[str]:
    """Return W&B's command that uploads the folders of one run in the order in which they were recorded."""
    return [sys.executable, "-m", "wandb", "sync", *(str(folder.absolute()) for folder in folders)]
