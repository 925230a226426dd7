"""Show where runs stand and why, change it, and send W&B what it lacks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from repa_lab.cli.shared import JsonOption, RootOption, RunArgument, SweepArgument, UsageError, out, table
from repa_lab.runs import RunDirectory, RunsRoot, RunWriter, State
from repa_lab.runs.files import DamagedFileError, garbage_collection_paused, require_no_links
from repa_lab.runs.root import DEFAULT_ROOT, SweepDirectory, UnknownRunError, UnknownSweepError

_REFRESH_S = 2.0
_GIB = 1 << 30


def status(
    sweep: Annotated[
        Path | None, typer.Argument(metavar="[SWEEP]", help="A sweep's name or folder; else all runs.")
    ] = None,
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until all runs have come to rest.")] = False,
) -> None:
    """Show where runs stand."""
    runs, title = RunsRoot(root), str(sweep or root)
    rows = _rows(runs, sweep)
    updates = _updates(runs, sweep, rows) if watch else [rows]
    if json_:
        print(json.dumps(rows))
    elif watch and out.is_terminal:
        with Live(console=out, auto_refresh=False) as live:
            for rows in updates:
                live.update(table(title, rows), refresh=True)
    else:  # a file or a pipe gets another table whenever a run's status changes
        shown = None
        for rows in updates:
            if shown != (shown := [row["state"] for row in rows]):
                out.print(table(title, rows))


def why(run: RunArgument, root: RootOption = DEFAULT_ROOT, json_: JsonOption = False) -> None:
    """Show what happened to a run: its history, and the reason of a failure."""
    directory = RunsRoot(root).find_run(run)
    events = directory.events()
    if json_:
        print(json.dumps(events))
        return
    rows = []
    for event in events:
        facts = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        rows.append({"time": at, "event": event["event"], "": facts})
    out.print(table(f"{directory.run_id}: {directory.status().value}", rows))
    if error := directory.state.error:
        typer.echo(error)


def retry(
    run: RunArgument,
    root: RootOption = DEFAULT_ROOT,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Forget its rows, samples and checkpoints.")
    ] = False,
) -> None:
    """Have the next sweep take a run up again: one that was pruned, or, from scratch, any."""
    directory = RunsRoot(root).find_run(run)
    ends = {
        State.DONE: "the run is done, and so would be its rerun; give",
        State.STOPPED: "a stop rule ended the run; a sweep without the rule takes it up, or give",
    }
    if not from_scratch and (end := ends.get(directory.state.state)):
        raise UsageError(f"{end} --from-scratch to train it anew", str(run))
    with RunWriter(directory, patience_s=0) as writer:
        left_alone = writer.start_over() if from_scratch else []
        writer.state(State.NEW, 0 if from_scratch else directory.state.step)
    for path in left_alone:
        typer.echo(f"left alone, because it is a link or no checkpoint of repa-lab: {path}")
    typer.echo(f"{directory.run_id} is taken up by the next sweep that asks for it")


def stop(sweep: SweepArgument, root: RootOption = DEFAULT_ROOT) -> None:
    """Have the process that carries out a sweep checkpoint its runs and end, as Ctrl-C there would."""
    # A sweep that still fills its caches is not recorded yet.
    unrecorded = (directory for path in (sweep, root / sweep) if (directory := SweepDirectory(path)).is_held)
    directory = next(unrecorded, None) or RunsRoot(root).find_sweep(sweep)
    if not directory.is_held:
        raise UsageError("nobody is carrying out this sweep", str(sweep))
    directory.stop.touch()
    typer.echo(f"{directory.path.name} ends at its runs' next steps; run the sweep again to go on")


def pin(
    run: RunArgument,
    root: RootOption = DEFAULT_ROOT,
    off: Annotated[bool, typer.Option("--off", help="Allow deletions again.")] = False,
) -> None:
    """Protect a run from garbage collection, even if the disk is full."""
    directory = RunsRoot(root).find_run(run)
    require_no_links(*directory.links)
    directory.pin.unlink(missing_ok=True) if off else directory.pin.touch()


def gc(
    root: RootOption = DEFAULT_ROOT,
    disk_gib: Annotated[
        float | None, typer.Option(min=0, help="Delete more that can go, until the root is no larger than this.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go.")] = False,
) -> None:
    """Delete leftovers of kills and checkpoints of pruned runs; never a run's last good one, nor a pinned run."""
    from repa_lab.runs.garbage_collection import collect, size_of

    deleted, skipped = collect(RunsRoot(root), None if disk_gib is None else int(disk_gib * _GIB), dry_run)
    if deleted:
        rows = [{"path": item.path, "MiB": f"{item.size / 2**20:.1f}", "why": item.why} for item in deleted]
        out.print(table("would go" if dry_run else "gone", rows))
    if skipped:
        out.print(table("left alone", [{"path": item.path, "why": item.why} for item in skipped]))
    freed = sum(item.size for item in deleted) / _GIB
    left = size_of(root) / _GIB - (freed if dry_run else 0)
    typer.echo(f"{freed:.2f} GiB {'would be ' if dry_run else ''}freed, {left:.2f} GiB left")
    if disk_gib is not None and left > disk_gib:
        typer.echo(f"cannot free enough space: {disk_gib:g} GiB requested, and nothing more can be deleted")
    if any(item.kind == "failed" for item in skipped):
        raise typer.Exit(1)


def sync(
    names: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|SWEEP]...", help="Ids of runs, names of sweeps, or folders; else all."),
    ] = None,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Send W&B what run directories hold and its server does not have."""
    from repa_lab.report.statistics import headline
    from repa_lab.tracking.server import require_server
    from repa_lab.tracking.wandb import WandbRun, descriptions
    from repa_lab.tracking.wandb import sync as upload

    runs, sweeps = _runs_and_sweeps(RunsRoot(root), names or [])
    described = descriptions(sweeps, headline)
    pairs = [(run, described.get(run.run_id) or WandbRun.by_itself(run)) for run in runs if _may_have_rows(run)]
    if not names:
        wanted = [(run, description) for run, description in pairs if description.options.mode != "disabled"]
        if unwanted := len(pairs) - len(wanted):
            typer.echo(
                f"{unwanted} runs left: their sweeps have run.wandb.mode disabled; name a sweep to send its runs"
            )
        pairs = wanted
    if not pairs:
        typer.echo(f"no rows to send in {root}")
        return
    require_server()
    failed = False
    for run, description in pairs:
        with out.status(f"uploading {run.run_id}"):
            result = upload(run, description)
        failed |= result.outcome == "failed"
        typer.echo(": ".join(filter(None, (result.run_id, result.outcome, result.detail))))
    if failed:
        raise typer.Exit(1)


def _updates(root: RunsRoot, sweep: Path | None, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows again and again until all runs have come to rest, and no sweep is about to start more."""
    while True:
        yield rows
        statuses = {row["state"] for row in rows}
        sweeps = [root.find_sweep(sweep)] if sweep else root.sweeps()
        if "running" not in statuses and not ("new" in statuses and any(directory.is_held for directory in sweeps)):
            return
        time.sleep(_REFRESH_S)
        rows = _rows(root, sweep)


@garbage_collection_paused()
def _rows(root: RunsRoot, sweep: Path | None) -> list[dict[str, Any]]:
    if sweep is not None:
        directory = root.find_sweep(sweep)
        return [_row(name, directory.run(run_id)) for name, run_id in _named_runs(directory)]
    names = _names(root)
    return [_row(names.get(run.run_id, ""), run) for run in root.runs()]


def _names(root: RunsRoot) -> dict[str, str]:
    """Return the names of runs, by their ids, in the first sweep that asks for them."""
    names: dict[str, str] = {}
    for directory in root.sweeps():
        with suppress(ValueError, LookupError, TypeError):  # a damaged manifest; its runs are there all the same
            for name, run_id in _named_runs(directory):
                names.setdefault(run_id, f"{directory.path.name}: {name}")
    return names


def _named_runs(directory: SweepDirectory) -> list[tuple[str, str]]:
    """Return the names of a sweep's runs, with their ids; arms of the same settings share their runs."""
    return [(f"{arm.label}, seed {run.seed}", run.run_id) for arm in directory.manifest.arms for run in arm.runs]


def _row(name: str, run: RunDirectory) -> dict[str, Any]:
    from repa_lab.tracking.wandb import WandbRecord

    state, rows, record = run.state, run.rows(), WandbRecord.read(run)
    status = run.status(state=state)
    last = (rows or [{"step": 0}])[-1]
    left = ""
    if status == "running" and last["step"]:  # at the pace of its steps so far
        seconds = (run.spec["train"]["steps"] - last["step"]) * last["seconds"] / last["step"]
        left = str(timedelta(seconds=int(seconds)))
    row = {"run": name, "run_id": run.run_id, "state": status.value, "step": last["step"]}
    tracked = f"{record.count(rows)} of {len(rows)} rows" if record else ""
    return {**row, "left": left, "wandb": tracked, "error": state.error or ""}


def _runs_and_sweeps(root: RunsRoot, names: Sequence[Path]) -> tuple[list[RunDirectory], list[SweepDirectory]]:
    """Return the runs of sweeps, or the runs, of these names, each once; all runs without names.

    Returns:
        The runs, and the sweeps that may ask for them, the named ones first.
    """
    runs, sweeps = [] if names else root.runs(), list[SweepDirectory]()
    for name in names:
        found = _sweep_or_run(root, name)
        if isinstance(found, SweepDirectory):
            sweeps.append(found)
            runs += [found.run(run_id) for run_id in found.manifest.run_ids]
        else:
            runs.append(found)
    roots = {run.path.parents[1]: RunsRoot(run.path.parents[1]) for run in runs}
    sweeps += [sweep for root in roots.values() for sweep in root.sweeps()]
    return list({run.path.resolve(): run for run in runs}.values()), sweeps


def _may_have_rows(run: RunDirectory) -> bool:
    try:
        return bool(run.rows())
    except DamagedFileError:  # its upload says so
        return True


def _sweep_or_run(root: RunsRoot, name: Path) -> SweepDirectory | RunDirectory:
    with suppress(UnknownSweepError):
        return root.find_sweep(name)
    try:
        return root.find_run(name)
    except UnknownRunError:
        known = ", ".join(sweep.path.name for sweep in root.sweeps()) or "none"
        message = f"no run and no sweep '{name}' in {root.path}; sweeps: {known}; `repa-lab status` lists runs"
        raise UnknownRunError(message) from None
