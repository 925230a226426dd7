"""A run on Weights & Biases, told from the run's directory: curves over ``images``, sample grids, evaluations.

Every row and every sample grid has a W&B step that depends on its place in the directory alone, and W&B takes no step
that a run has passed. So any process can tell a run again, after a kill or once the server is back: it continues where
the server stands, and nothing is there twice.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from repa_lab.registry import one_line
from repa_lab.runs import RunDirectory, RunWriter, State, checkpoints, files
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.files import DamagedFileError, Row
from repa_lab.runs.root import ComparisonRecord, SweepDirectory, TrackingRecord
from repa_lab.tracking.server import ServerError, ask, resolve_mode, server_address, why_offline

RECORD = "wandb.json"  # what the server has of a run, in the run directory
_SPACING = 100  # W&B steps for each training step: its rows, then its sample grid and the table of evaluations
_GRID, _TABLE = 98, 99
_MAX_NAME, _MAX_TAG = 128, 64
_START_S = 20.0
_FINISH_S, _UPLOAD_S = 20.0, 600.0  # to send the last rows of a run in training; a whole run, or weights
_SETTLE_S = 10.0  # the server counts rows up to seconds after it took them


Headline = Callable[[ComparisonRecord, list[Row]], dict[str, Any]]


@dataclass(frozen=True)
class WandbRun:
    """The description of a run on W&B, beside the settings in its directory.

    Attributes:
        options: what W&B is told of the runs of a sweep; its tags stand beside the family and the regularizers.
        name: the run's display name; None leaves W&B's.
        group: the sweep's name; None leaves W&B's.
        headline: returns, from all rows, the entries of the run's summary under ``headline/``.
    """

    options: TrackingRecord
    name: str | None = None
    group: str | None = None
    headline: Callable[[list[Row]], dict[str, Any]] = lambda rows: {}

    @classmethod
    def by_itself(cls, run: RunDirectory) -> WandbRun:
        """Return how a run that no sweep asks for is described: by the options with which it was started first."""
        return cls(TrackingRecord(**run.provenance.get("options", {}).get("wandb", {})))


def descriptions(sweeps: Iterable[SweepDirectory], headline: Headline) -> dict[str, WandbRun]:
    """Return how runs are described, by their ids: as the first of the sweeps that asks for them does."""
    described: dict[str, WandbRun] = {}
    for sweep in sweeps:
        with suppress(ValueError, LookupError, TypeError):  # a damaged manifest
            manifest = sweep.manifest
            of_run = partial(headline, manifest.compare)
            for arm in manifest.arms:
                for run in arm.runs:
                    name = f"{arm.label}, seed {run.seed}"
                    described.setdefault(run.run_id, WandbRun(manifest.wandb, name, manifest.name, of_run))
    return described


@dataclass(frozen=True)
class WandbRecord:
    """What W&B's server has of a run, by its own word after the last upload.

    Attributes:
        server: the server's address.
        url: the run's page.
        step: the W&B step of the last row, grid or table that the server has; -1 for none.
        state: the state of the run that the server was told.
    """

    server: str
    project: str
    entity: str
    url: str
    step: int
    state: State

    @classmethod
    def read(cls, run: RunDirectory) -> WandbRecord | None:
        """Return the record in a run directory; None if there is none that can be read."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            fields = files.read_record(run.path / RECORD)
            return cls(**{**fields, "state": State(fields["state"])})
        return None

    def is_at(self, description: WandbRun) -> bool:
        """Return whether the record is of the server and the project to which a description leads."""
        options = description.options
        is_same_entity = options.entity in (None, self.entity)
        return is_same_entity and (self.project, self.server) == (options.project, server_address())

    def count(self, rows: Iterable[Row]) -> int:
        """Return how many of a run's rows the server has."""
        steps = accumulate(rows, _row_step, initial=-1)
        return sum(0 <= step <= self.step for step in steps)

    def covers(self, run: RunDirectory) -> bool:
        """Return whether the server has all that the run directory holds."""
        state = run.state.state
        return self.state is state and self.step >= last_step(run, state)


def _row_step(before: int, row: Row) -> int:
    """Return the W&B step of a row, which follows the row with W&B step ``before``."""
    step = int(row["step"])
    return before + 1 if before // _SPACING == step else step * _SPACING


class Entry(NamedTuple):
    """An entry of a run's history on W&B: a metric row, or a sample grid if ``grid`` is given."""

    step: int
    values: Row
    grid: Path | None = None


class History:
    """Reads the rows and sample grids of a run directory as entries, in order, also while the run is trained."""

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._reader = run, run.metrics_reader()
        self._row, self._step, self._last_grid = Row(), -1, -1

    def new_entries(self) -> Iterator[Entry]:
        """Yield the entries that were not yielded before."""
        # Listed before the rows are read: all rows of a step are written before its grid.
        grids = deque((step, path) for step, path in self._run.sample_grids().items() if step > self._last_grid)
        for row in self._reader.new_rows():
            step = _row_step(self._step, row)
            yield from self._grids(grids, step)
            self._row, self._step = row, step
            yield Entry(step, row)
        yield from self._grids(grids, (self._step // _SPACING + 1) * _SPACING)

    def _grids(self, grids: deque[tuple[int, Path]], before: int) -> Iterator[Entry]:
        while grids and (place := grids[0][0] * _SPACING + _GRID) < before:
            self._last_grid, path = grids.popleft()
            yield Entry(place, {**_progress(self._row), "step": self._last_grid}, path)


def _progress(row: Row) -> Row:
    return {key: row[key] for key in ("step", "images") if key in row}


def last_step(run: RunDirectory, state: State) -> int:
    """Return the W&B step of the last entry of a run in a state; -1 for a run without rows."""
    steps = [entry.step for entry in History(run).new_entries()]
    if state is State.DONE and _evaluations(run.rows()):
        return steps[-1] // _SPACING * _SPACING + _TABLE
    return max(steps, default=-1)


def _evaluations(rows: Iterable[Row]) -> list[Row]:
    """Return the measurements on averaged weights, without the rows that are logged while training."""
    return [row for row in rows if any("@" in name or name.startswith("heldout/") for name in row)]


class WandbWriter:
    """The one writer of a W&B run: sends what the run directory holds and the server does not have.

    Args:
        run: the run's directory; W&B's own files lie in ``wandb/`` in it until the server has everything.
        description: the run's description.
        finish_s: how long the last rows may take, in seconds.

    Raises:
        Exception: whatever W&B raises if it cannot start.
    """

    def __init__(self, run: RunDirectory, description: WandbRun, finish_s: float) -> None:
        self._directory, self._description, self._history = run, description, History(run)
        self._wandb = _start(run, description, finish_s)
        self._next = int(self._wandb.step)  # the first W&B step that the server does not have

    def send(self) -> None:
        """Send the rows and sample grids that the directory has by now."""
        import wandb

        for entry in self._history.new_entries():
            if entry.step >= self._next:
                values = {key: value for key, value in entry.values.items() if value is not None}
                self._log(entry.step, values | ({"samples": wandb.Image(str(entry.grid))} if entry.grid else {}))

    def close(self, state: State) -> str:
        """Send the headline, and of a finished run the table of evaluations and the weights; record what arrived.

        Returns:
            The address of the run's page.

        Raises:
            ServerError: the server does not say that it has everything.
            Exception: whatever W&B raises.
        """
        rows, run = self._directory.rows(), self._wandb
        run.summary.update({f"headline/{name}": value for name, value in self._description.headline(rows).items()})
        if state is State.DONE:
            self._conclude(rows)
        run.finish(exit_code=0 if state.status.is_over else 1)
        step = last_step(self._directory, state)
        until = time.monotonic() + _SETTLE_S
        while (held := _step_on_server(run)) < step and time.monotonic() < until:
            time.sleep(0.5)
        record = WandbRecord(run.settings.base_url, run.project, run.entity, run.url, held, state)
        files.write_record(self._directory.path / RECORD, asdict(record))
        if held < step:
            raise ServerError(f"{run.settings.base_url} has not taken all rows; `repa-lab sync` sends the others")
        shutil.rmtree(self._directory.path / "wandb", ignore_errors=True)  # W&B's copies of what is here and there
        return str(run.url)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._wandb.log(values, step=step, commit=True)
        self._next = step + 1

    def _conclude(self, rows: list[Row]) -> None:
        import wandb

        step = last_step(self._directory, State.DONE)
        if (evaluations := _evaluations(rows)) and step >= self._next:
            columns: list[Any] = list(dict.fromkeys(name for row in evaluations for name in row))
            data = [[row.get(name) for name in columns] for row in evaluations]
            self._log(step, {**_progress(rows[-1]), "evaluations": wandb.Table(columns=columns, data=data)})
        if self._description.options.artifacts == "final":
            run_id, newest = self._directory.run_id, checkpoints.latest(self._directory.checkpoints)
            assert newest is not None  # a finished run has a checkpoint of its last step
            step, folder = newest
            artifact = wandb.Artifact(f"{run_id}-ema", type="model", metadata={"run_id": run_id, "step": step})
            # By reference: the last checkpoint of a finished run is never deleted, and a copy would double its size.
            artifact.add_file(str(folder / "ema.safetensors"), policy="immutable")
            artifact.add_file(str(self._directory.path / "spec.json"), policy="immutable")
            self._wandb.log_artifact(artifact)


def _step_on_server(run: Any) -> int:
    """Return the W&B step of the last entry that the server has, as it tells a client that resumes the run."""
    query = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
        model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) { historyTail } }
    }"""
    variables = {"project": run.project, "entity": run.entity, "name": run.id}
    try:
        model = ask(run.settings.base_url, query, variables).get("model") or {}
        tail = json.loads((model.get("bucket") or {}).get("historyTail") or "[]")
        return max((int(json.loads(row)["_step"]) for row in tail), default=-1)
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"{run.settings.base_url} does not say what it has of the run: {error}") from None


def _start(run: RunDirectory, description: WandbRun, finish_s: float) -> Any:
    import wandb  # 1 s

    wandb.setup(settings=wandb.Settings(silent=True))  # before a run has settings, W&B prints whose key it uses
    spec = run.spec
    config = {**spec, "protocols": run.protocols}  # protocols are recorded before the first row
    regularizers = spec["regularizer"] if isinstance(spec["regularizer"], list) else [spec["regularizer"]]
    tags = [spec["model"]["family"], *(regularizer["type"] for regularizer in regularizers), *description.options.tags]
    started: Any = wandb.init(
        id=run.run_id,
        project=description.options.project,
        entity=description.options.entity,
        mode="online",
        dir=str(run.path),
        name=_shortened(description.name),
        group=description.group,
        config=config,
        tags=list(dict.fromkeys(tag[:_MAX_TAG] for tag in tags)),
        job_type="train",
        resume="allow",
        reinit="create_new",  # without it, W&B returns an open run of this process if there is one
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_START_S,
            finish_timeout=finish_s,
            finish_timeout_raises=True,
            # W&B would otherwise store the command line, the machine's name and the source tree.
            host="",
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
        ),
    )
    started.config.update(config, allow_val_change=True)  # a run that is resumed has its earlier one
    started.define_metric("images")
    started.define_metric("*", step_metric="images")
    return started


def _shortened(name: str | None) -> str | None:
    """Return a name as W&B takes it, with its end, which has the seed."""
    return name if name is None or len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 23]}...{name[-20:]}"


class WandbListener:
    """Has a run's rows sent to W&B in a thread: training waits for W&B at its end alone, and there not for long.

    The first row starts W&B, so a run that is already finished, or held by another process, never starts W&B.
    """

    def __init__(self, run: RunDirectory, description: WandbRun) -> None:
        self._directory, self._description = run, description
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        self._writer: WandbWriter | None = None
        self._sending: Future[None] | None = None

    def row(self, row: Row) -> None:
        """Have the row sent, with what the directory holds beside it; raise what has failed since the last call."""
        if self._sending is None or self._sending.done():
            if self._sending is not None:
                self._sending.result()
            self._sending = self._thread.submit(self._send)

    def image(self, step: int, path: Path) -> None:
        """Have a sample grid sent."""
        self.row({})

    def finish(self, state: State) -> None:
        """Wait until everything is sent, or W&B gives up; see :meth:`WandbWriter.close`."""
        if self._sending is None:
            return
        with self._thread:
            self._sending.result()
            self._thread.submit(self._close, state).result()

    def _send(self) -> None:
        if self._writer is None:
            finish_s = _UPLOAD_S if self._description.options.artifacts == "final" else _FINISH_S
            self._writer = WandbWriter(self._directory, self._description, finish_s)
        self._writer.send()

    def _close(self, state: State) -> None:
        self._send()
        assert self._writer is not None
        self._writer.close(state)


@dataclass(frozen=True)
class SyncResult:
    """The outcome of an upload; ``detail`` is the run's address, or the reason why nothing was uploaded."""

    run_id: str
    outcome: Literal["synced", "already synced", "failed", "left"]
    detail: str = ""


def sync(run: RunDirectory, description: WandbRun) -> SyncResult:
    """Send W&B what a run directory holds and the server does not have; a run that is being trained is left alone."""
    try:
        record = WandbRecord.read(run)
        if record and record.is_at(description) and record.covers(run):
            return SyncResult(run.run_id, "already synced")
        with RunWriter(run, patience_s=0):
            writer = WandbWriter(run, description, _UPLOAD_S)
            writer.send()
            return SyncResult(run.run_id, "synced", writer.close(run.state.state))
    except RunBusyError:
        return SyncResult(run.run_id, "left", "another process trains or sends it; sync it afterwards")
    except Exception as error:  # whatever W&B raises, or a file of the run is damaged
        return SyncResult(run.run_id, "failed", one_line(error))


def untracked(runs: Iterable[RunDirectory], mode: str, unreachable: str | None) -> dict[str, str]:
    """Return why W&B lacks runs, or some of their rows, by run id; empty if W&B is not wanted.

    Args:
        mode: ``run.wandb.mode``, as the spec gives it.
        unreachable: why W&B's server cannot be told; None if it can.
    """
    reasons = {run.run_id: _why_untracked(run, mode, unreachable) for run in runs}
    return {run_id: reason for run_id, reason in reasons.items() if reason}


def _why_untracked(run: RunDirectory, mode: str, unreachable: str | None) -> str | None:
    resolved, record = resolve_mode(mode), WandbRecord.read(run)
    try:
        if resolved == "disabled" or not run.rows() or (record and record.covers(run)):
            return None
        failures = [event for event in run.events() if event.get("listener") == WandbListener.__name__]
    except DamagedFileError as error:
        return str(error)
    if unreachable:
        return unreachable
    if resolved == "offline":
        return why_offline(mode)
    return str(failures[-1]["error"]) if failures else "not sent during training"
