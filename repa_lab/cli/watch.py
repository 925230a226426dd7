"""See where runs stand and why, and change it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live

from repa_lab.cli.shared import JsonOption, RootOption, clean_errors, mistake, out, table
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.runs import RunDirectory, RunsRoot
    from repa_lab.runs.root import SweepDirectory

_REFRESH_S = 2.0
_GIB = 1 << 30
SweepArgument = Annotated[
    Path | None, typer.Argument(metavar="[SWEEP]", help="A sweep's name or folder; else all runs.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's id, or its folder.")]


def status(
    sweep: SweepArgument = None,
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until all runs have come to rest.")] = False,
) -> None:
    """Show where runs stand."""
    with clean_errors():
        from repa_lab.runs import RunsRoot

        runs = RunsRoot(root)
        rows = _rows(runs, sweep)
        if json_:
            print(json.dumps(rows))
            return
        title = str(sweep or root)
        if not watch:
            out.print(table(title, rows))
            return
        if not out.is_terminal:  # in a file or a pipe nothing is shown over: a table whenever a run's state is another
            out.print(table(title, rows))
            for before, now in _later(runs, sweep, rows):
                if [row["state"] for row in now] != [row["state"] for row in before]:
                    out.print(table(title, now))
            return
        with Live(table(title, rows), console=out, auto_refresh=False) as live:
            for _, now in _later(runs, sweep, rows):
                live.update(table(title, now), refresh=True)


def why(run: RunArgument, root: RootOption = DEFAULT_ROOT, json_: JsonOption = False) -> None:
    """Show what happened to a run: its history, and the reason of a failure."""
    with clean_errors():
        from repa_lab.runs import RunsRoot

        directory = RunsRoot(root).find_run(run)
        events = directory.events()
        if json_:
            print(json.dumps(events))
            return
        rows = [_told(event) for event in events]
        out.print(table(f"{directory.run_id}: {directory.status().value}", rows))
        if directory.state.error:
            out.print(directory.state.error, highlight=False, markup=False, soft_wrap=True)


def retry(
    run: RunArgument,
    root: RootOption = DEFAULT_ROOT,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Forget its rows, samples and checkpoints.")
    ] = False,
) -> None:
    """Have the next sweep take a run up again: one that was pruned, or, from scratch, any."""
    with clean_errors():
        from repa_lab.runs import RunsRoot, RunWriter, State

        directory = RunsRoot(root).find_run(run)
        if directory.state.state is State.DONE and not from_scratch:
            raise mistake(str(run), "the run is done, and so would be its rerun; give --from-scratch to train it anew")
        if directory.state.state is State.STOPPED and not from_scratch:
            message = "a stop rule ended the run; a sweep without the rule takes it up, or give --from-scratch to train it anew"
            raise mistake(str(run), message)
        with RunWriter(directory, patience_s=0) as writer:
            if from_scratch:
                writer.start_over()
            writer.state(State.NEW, 0 if from_scratch else directory.state.step)
        out.print(f"{directory.run_id} is taken up by the next sweep that asks for it", highlight=False)


def stop(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's name or folder.")],
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Have the process that carries out a sweep checkpoint its runs and end, as Ctrl-C there would."""
    with clean_errors():
        from repa_lab.runs import RunsRoot
        from repa_lab.runs.root import SweepDirectory

        # Not recorded yet while it prepares.
        held = (one for path in (sweep, root / sweep) if (one := SweepDirectory(path)).is_held)
        directory = next(held, None) or RunsRoot(root).find_sweep(sweep)
        if not directory.is_held:
            raise mistake(str(sweep), "nobody is carrying out this sweep")
        directory.ask_to_stop()
        out.print(f"{directory.path.name} ends at its runs' next steps; run the sweep again to go on", highlight=False)


def pin(
    run: RunArgument,
    root: RootOption = DEFAULT_ROOT,
    off: Annotated[bool, typer.Option("--off", help="Let go of it again.")] = False,
) -> None:
    """Keep all of a run, whatever disk is short."""
    with clean_errors():
        from repa_lab.runs import RunsRoot
        from repa_lab.runs.directory import PIN

        path = RunsRoot(root).find_run(run).path / PIN
        path.unlink(missing_ok=True) if off else path.touch()


def gc(
    root: RootOption = DEFAULT_ROOT,
    disk_gib: Annotated[
        float | None, typer.Option(min=0, help="Delete more that can go, until the root is so small.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go.")] = False,
) -> None:
    """Delete what is of no use: leftovers of kills, checkpoints of pruned runs; never a run's last good one, nor a pin."""
    with clean_errors():
        from repa_lab.runs import RunsRoot
        from repa_lab.runs.waste import collect, size_of

        gone = collect(RunsRoot(root), None if disk_gib is None else int(disk_gib * _GIB), dry_run)
        rows = [{"path": one.path, "MiB": f"{one.size / 2**20:.1f}", "why": one.why} for one in gone]
        if rows:
            out.print(table("would go" if dry_run else "gone", rows))
        freed = sum(one.size for one in gone) / _GIB
        left = size_of(root) / _GIB - (freed if dry_run else 0)
        out.print(f"{freed:.2f} GiB {'would be ' if dry_run else ''}freed, {left:.2f} GiB left", highlight=False)
        if disk_gib is not None and left > disk_gib:
            out.print(f"nothing more can go: {disk_gib:g} GiB cannot be kept to", highlight=False)


def _later(
    root: RunsRoot, sweep: Path | None, rows: list[dict[str, Any]]
) -> Iterator[tuple[list[dict[str, Any]], ...]]:
    """What stood in the rows and what stands in them now, again and again until all runs have come to rest."""
    while _goes_on(root, sweep, rows):
        time.sleep(_REFRESH_S)
        before, rows = rows, _rows(root, sweep)
        yield before, rows


def _goes_on(root: RunsRoot, sweep: Path | None, rows: list[dict[str, Any]]) -> bool:
    """Whether a run is trained, or waits for its turn in a sweep that somebody carries out."""
    states = {row["state"] for row in rows}
    held = [root.find_sweep(sweep)] if sweep else root.sweeps()
    return "running" in states or ("new" in states and any(directory.is_held for directory in held))


def _rows(root: RunsRoot, sweep: Path | None) -> list[dict[str, Any]]:
    if sweep is None:
        names = _names(root)
        return [_row(names.get(run.run_id, ""), run) for run in root.runs()]
    directory = root.find_sweep(sweep)
    return [_row(name, directory.root.run(run_id)) for name, run_id in _asked(directory)]


def _names(root: RunsRoot) -> dict[str, str]:
    """What runs are called in the first sweep that asks for each."""
    found: dict[str, str] = {}
    for directory in root.sweeps():
        with suppress(ValueError, LookupError, TypeError):  # a damaged manifest; its runs are there all the same
            found = {run_id: f"{directory.path.name}: {name}" for name, run_id in _asked(directory)} | found
    return found


def _asked(directory: SweepDirectory) -> list[tuple[str, str]]:
    """What runs are called in a sweep, and their ids; arms of the same settings share their runs."""
    return [(f"{a['label']}, seed {r['seed']}", r["run_id"]) for a in directory.manifest["arms"] for r in a["runs"]]


def _row(name: str, run: RunDirectory) -> dict[str, Any]:
    status, last = run.status(), (run.rows() or [{"step": 0}])[-1]
    left = _left(run, last) if status == "running" else ""
    row = {"run": name, "run_id": run.run_id, "state": status.value, "step": last["step"]}
    return {**row, "left": left, "error": run.state.error or ""}


def _left(run: RunDirectory, last: dict[str, Any]) -> str:
    """The time that a run still needs, at the pace of its steps so far."""
    if not last["step"]:
        return ""
    seconds = (run.spec["train"]["steps"] - last["step"]) * last["seconds"] / last["step"]
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _told(event: dict[str, Any]) -> dict[str, Any]:
    facts = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])),
        "event": event["event"],
        "": facts,
    }
