"""A run on Weights & Biases: curves over `step` and `images`, sample grids; offline when there is no key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from repa_lab.runs import State
from repa_lab.runs.directory import RunDirectory
from repa_lab.runs.files import Row


def resolve_mode(mode: str) -> str:
    """``auto`` is online with WANDB_API_KEY in the environment, else offline; WANDB_MODE wins, as W&B's users expect."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


class WandbListener:
    """Sends a run's rows to W&B; a resumed run goes on under the same id.

    W&B is started by the first row: a run that turns out to be finished, or to be another process's, never gets there.

    Args:
        run: the run's directory; W&B's own files go to ``wandb/`` in it.
        name: what people call the run.
        group: the sweep's name.
        config: the resolved settings.
        project: the W&B project.
        mode: ``online`` or ``offline``.
    """

    def __init__(self, run: RunDirectory, name: str, group: str, config: dict[str, Any], project: str, mode: str) -> None:
        self._options: dict[str, Any] = {"project": project, "group": group, "name": name, "config": config, "mode": mode}
        self._options |= {"id": run.run_id, "dir": str(run.path)}
        self._run: Any = None

    def row(self, row: Row) -> None:
        """Log the row with its ``step`` and ``images`` as values: W&B drops rows whose own step does not increase."""
        self._started().log({key: value for key, value in row.items() if value is not None})

    def image(self, step: int, path: Path) -> None:
        """Log a sample grid."""
        import wandb

        self._started().log({"samples": wandb.Image(str(path)), "step": step})

    def finish(self, state: State) -> None:
        """Close the W&B run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if state.is_finished else 1)

    def _started(self) -> Any:
        if self._run is None:
            self._run = _start(self._options)
        return self._run


def _start(options: dict[str, Any]) -> Any:
    import wandb  # 1 s

    # W&B would otherwise store the command line, the machine's name and the source tree.
    quiet: dict[str, Any] = {"console": "off", "silent": True, "host": ""}
    settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, **quiet)
    # Without "create_new", W&B answers with the run of this process that is still open, if there is one.
    run: Any = wandb.init(resume="allow", reinit="create_new", settings=settings, **options)
    run.define_metric("images")
    run.define_metric("*", step_metric="images")
    return run
