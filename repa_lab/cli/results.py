"""Look across sweeps, and hand runs on to W&B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repa_lab.cli.shared import JsonOption, RootOption, clean_errors, err, out, table
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.report.leaderboard import Board
    from repa_lab.runs import RunDirectory, RunsRoot

WhatArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN|SWEEP]...", help="Ids of runs, names of sweeps, or folders; else all."),
]


def leaderboard(
    place: Annotated[Path | None, typer.Argument(metavar="[ROOT]", help="Where runs live; the same as --root.")] = None,
    root: RootOption = DEFAULT_ROOT,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME|KIND", help="One metric, or one kind, such as fid.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(metavar="TEXT", help="What its name must contain, such as @50k/sde250.")
    ] = "",
    json_: JsonOption = False,
) -> None:
    """Show the arms of all sweeps, best first, a table for each protocol."""
    with clean_errors():
        from repa_lab.report.leaderboard import leaderboards

        boards = leaderboards(place or root, metric, protocol, tell=_tell)
        if json_:
            print(json.dumps([_as_json(board) for board in boards]))
            return
        for board in boards:
            out.print(table(_title(board), _rows(board)))


def _tell(line: str) -> None:
    err.print(line, highlight=False, markup=False, soft_wrap=True)


def _as_json(board: Board) -> dict[str, Any]:
    rows = json.loads(board.frame.to_json(orient="records"))  # which knows how to write what is not a number
    return {"metric": board.metric, "goal": board.goal, "protocol": dict(board.protocol), "arms": rows}


def _title(board: Board) -> str:
    better = "lower is better" if board.goal == "min" else "higher is better"
    differing = [f"{field}: {json.dumps(value)}" for field, value in board.protocol.items()]
    return "\n".join([f"{board.metric} ({better})", *differing])


def _rows(board: Board) -> list[dict[str, Any]]:
    from repa_lab.report.tables import decimals, interval

    def row(arm: Any) -> dict[str, Any]:
        places = decimals(arm.mean)
        spread = "" if arm.low != arm.low else f" {interval(arm.low, arm.high, places)}"
        return {
            **{"arm": arm.arm, "sweeps": arm.sweeps, "model": f"{arm.family} {arm.size}".strip()},
            **{"regularizer": f"{arm.regularizer} {arm.encoder}".strip(), "state": arm.state},
            **{"mean [95 % interval]": f"{arm.mean:.{places}f}{spread}", "n": f"{arm.n} of {arm.seeds}"},
            **{"best": f"{arm.best:.{places}f}", "step": arm.step, "images": f"{arm.images:.0f}"},
        }

    return [row(arm) for arm in board.frame.itertuples()]


def sync(what: WhatArgument = None, root: RootOption = DEFAULT_ROOT) -> None:
    """Upload what W&B recorded offline, with the key in WANDB_API_KEY."""
    with clean_errors():
        from repa_lab.runs import RunsRoot
        from repa_lab.tracking.wandb import offline_folders
        from repa_lab.tracking.wandb import sync as upload

        runs = [run for run in _chosen(RunsRoot(root), what or []) if offline_folders(run)]
        failed = False
        for run in runs:
            with out.status(f"uploading {run.run_id}"):
                found = upload(run)
            failed |= found.outcome == "failed"
            line = ": ".join(filter(None, (found.run_id, found.outcome, found.detail)))
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        if not runs:
            out.print(
                f"W&B recorded nothing offline of these runs in {root}", highlight=False, markup=False, soft_wrap=True
            )
        if failed:
            raise typer.Exit(1)


def _chosen(root: RunsRoot, names: list[Path]) -> list[RunDirectory]:
    """The runs of these names, each once; all of the root without any."""
    found = [run for name in names for run in _named(root, name)] if names else root.runs()
    return list({run.path.resolve(): run for run in found}.values())


def _named(root: RunsRoot, name: Path) -> list[RunDirectory]:
    from repa_lab.runs.root import UnknownRunError, UnknownSweepError

    try:
        sweep = root.find_sweep(name)
        return [sweep.root.run(run["run_id"]) for arm in sweep.manifest["arms"] for run in arm["runs"]]
    except UnknownSweepError:
        pass
    try:
        return [root.find_run(name)]
    except UnknownRunError:
        known = ", ".join(sweep.path.name for sweep in root.sweeps()) or "none"
        message = f"no run and no sweep '{name}' in {root.path}; sweeps: {known}; `repa-lab status` lists runs"
        raise UnknownRunError(message) from None
