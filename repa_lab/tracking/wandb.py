"""A run on Weights & Biases: curves over ``images``, sample grids, a table of evaluations; offline when there is no key."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.runs import State, checkpoints
from repa_lab.runs.directory import RunDirectory
from repa_lab.runs.files import Row

Headline = Callable[[list[Row]], dict[str, Any]]


def resolve_mode(mode: str) -> str:
    """``auto`` is online with WANDB_API_KEY in the environment, else offline; WANDB_MODE wins, as W&B's users expect."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


@dataclass(frozen=True)
class WandbRun:
    """What W&B is told of a run beside its rows.

    Attributes:
        name: what people call the run.
        group: the sweep's name.
        config: the resolved settings, nested; what the run's numbers depend on is added to them as ``protocols``.
        project: the W&B project.
        mode: ``online`` or ``offline``.
        entity: the W&B user or team; None is the key's own.
        tags: labels to filter by.
        keeps_weights: whether the averaged weights of a run that is done become an artifact.
        headline: from all rows, what stands in the run's summary under ``headline/``.
    """

    name: str
    group: str
    config: dict[str, Any]
    project: str
    mode: str
    entity: str | None = None
    tags: Sequence[str] = ()
    keeps_weights: bool = False
    headline: Headline = field(default=lambda rows: {})


class WandbListener:
    """Sends a run's rows to W&B; a resumed run goes on under the same id.

    W&B is started by the first row: a run that turns out to be finished, or to be another process's, never gets there.
    What the run directory already holds when W&B hears of the run for the first time, such as steps shared with another
    run, is told then. W&B only appends: a row that a kill had a run write again is there twice, with the same values.

    Args:
        run: the run's directory; W&B's own files go to ``wandb/`` in it.
        told: what W&B is told beside the rows.
    """

    def __init__(self, run: RunDirectory, told: WandbRun) -> None:
        self._directory, self._told = run, told
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
        """Close the W&B run, with its headline, and with its table and weights if it is done."""
        if self._run is None:
            return
        rows = self._directory.rows()
        self._run.summary.update({f"headline/{name}": value for name, value in self._told.headline(rows).items()})
        if state is State.DONE:
            self._conclude(rows)
        self._run.finish(exit_code=0 if state.status.is_over else 1)

    def _conclude(self, rows: list[Row]) -> None:
        import wandb

        table = evaluations(rows)
        if table:
            columns: list[Any] = list(dict.fromkeys(name for row in table for name in row))
            data = [[row.get(name) for name in columns] for row in table]
            self._run.log({**self._progress, "evaluations": wandb.Table(columns=columns, data=data)})
        if self._told.keeps_weights:
            self._run.log_artifact(_weights(self._directory))

    def _log(self, row: Row) -> None:
        self._progress = {key: row[key] for key in ("step", "images") if key in row}
        self._run.log({key: value for key, value in row.items() if value is not None})

    def _started(self) -> Any:
        if self._run is None:
            is_new = not any(self._directory.path.glob(f"wandb/*run-*-{self._directory.run_id}"))
            self._run = _start(self._directory, self._told)
            # The last row is the one that is being told.
            for row in self._directory.rows()[:-1] if is_new else []:
                self._log(row)
        return self._run


def evaluations(rows: list[Row]) -> list[Row]:
    """The rows of measurements on averaged weights, without what is logged while training."""
    return [row for row in rows if any("@" in name or name.startswith("heldout/") for name in row)]


def _start(run: RunDirectory, told: WandbRun) -> Any:
    import wandb  # 1 s

    # W&B would otherwise store the command line, the machine's name and the source tree.
    quiet: dict[str, Any] = {"console": "off", "silent": True, "host": ""}
    settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, **quiet)
    where: dict[str, Any] = {"project": told.project, "entity": told.entity, "mode": told.mode, "dir": str(run.path)}
    # They are recorded before the first row is, so before W&B is started.
    config = {**told.config, "protocols": run.protocols}
    what: dict[str, Any] = {"name": told.name, "group": told.group, "config": config, "tags": list(told.tags)}
    # Without "create_new", W&B answers with the run of this process that is still open, if there is one.
    how: dict[str, Any] = {"resume": "allow", "reinit": "create_new", "settings": settings, "job_type": "train"}
    started: Any = wandb.init(id=run.run_id, **where, **what, **how)
    started.define_metric("images")
    started.define_metric("*", step_metric="images")
    return started


def _weights(run: RunDirectory) -> Any:
    import wandb

    found = checkpoints.latest(run.checkpoints)
    assert found is not None  # a run that is done has a checkpoint of its last step
    step, folder = found
    artifact = wandb.Artifact(f"{run.run_id}-ema", type="model", metadata={"run_id": run.run_id, "step": step})
    # In place: the last checkpoint of a run that is done is never deleted, and a copy would be as large again.
    artifact.add_file(str(folder / "ema.safetensors"), policy="immutable")
    artifact.add_file(str(run.path / "spec.json"), policy="immutable")
    return artifact
