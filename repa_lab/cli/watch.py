"""See where runs stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from repa_lab.cli.shared import JsonOption, RootOption, app, clean_errors, out, table
from repa_lab.runs.root import DEFAULT_ROOT


@app.command()
def status(
    sweep: Annotated[Path | None, typer.Argument(metavar="[SWEEP]", help="A sweep's name or folder; else all runs.")] = None,
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Show where runs stand."""
    with clean_errors():
        from repa_lab.runs import RunsRoot

        if sweep is None:
            runs = [("", run) for run in RunsRoot(root).runs()]
        else:
            directory = RunsRoot(root).find_sweep(sweep)
            asked = [(f"{a['label']}, seed {r['seed']}", r["run_id"]) for a in directory.manifest["arms"] for r in a["runs"]]
            runs = [(name, directory.root.run(run_id)) for name, run_id in asked]
        rows: list[dict[str, Any]] = []
        for name, one in runs:
            state, last = one.state, (one.rows() or [{"step": 0}])[-1]
            error = state.error or ""
            rows.append({"run": name, "run_id": one.run_id, "state": state.state.value, "step": last["step"], "error": error})
        print(json.dumps(rows)) if json_ else out.print(table(str(sweep or root), rows))
