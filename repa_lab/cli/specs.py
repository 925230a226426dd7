"""Read specs: who set what, what differs, and the schema that an editor wants."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repa_lab.cli.shared import (
    JsonOption,
    OutputOption,
    RootOption,
    SetOption,
    SpecArgument,
    clean_errors,
    deliver,
    mistake,
    overrides,
)
from repa_lab.cli.sweeps import WithOption
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.spec import Experiment
    from repa_lab.spec.explain import Difference, Setting
    from repa_lab.spec.identity import Run

_ABSENT = "-"
_MAX_SHOWN = 60


def schema(
    output: OutputOption = None,
    tables: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page's tables of fields anew.")] = None,
) -> None:
    """Print the JSON schema of a spec, with which an editor completes fields and marks mistakes."""
    with clean_errors():
        from repa_lab.spec.json_schema import json_schema, write_tables

        if tables is not None:
            write_tables(tables)
            return
        deliver(json.dumps(json_schema(), indent=2) + "\n", output)


def explain(
    spec: SpecArgument,
    path: Annotated[str | None, typer.Argument(metavar="[PATH]", help="A dotted field or section; else all.")] = None,
    arm: Annotated[str | None, typer.Option(help="Label of one arm; else all.")] = None,
    set_: SetOption = None,
    with_: WithOption = None,
    json_: JsonOption = False,
) -> None:
    """Show who set each resolved value: a file with line and column, --set, or the default."""
    with clean_errors():
        from repa_lab.spec import load_spec
        from repa_lab.spec.explain import explain as settings_of

        experiment = load_spec(spec, overrides(set_), with_ or ())
        settings = settings_of(experiment, path, arm)
        if json_:
            print(json.dumps([asdict(setting) for setting in settings]))
            return
        total = len(experiment.arms)
        _print_columns((one.path, _shown(one.value), one.source, _held_by(one, total)) for one in settings)


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A spec file, or a run: its id or folder.")],
    right: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Show what differs between two specs or two runs; exit status 0 if nothing does, 1 if something, 2 if it went wrong."""
    with clean_errors():
        is_spec = [_is_spec(name) for name in (left, right)]
        if len(set(is_spec)) == 2:
            raise mistake("", f"'{left}' and '{right}' are a spec and a run; compare two of a kind")
        found = _between_specs(left, right) if is_spec[0] else _between_runs(left, right, root)
        print(json.dumps(found)) if json_ else _print_difference(found, left, right)
        if not found["equal"]:
            raise typer.Exit(1)


def _is_spec(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") or Path(name).is_file()


def _between_specs(left: str, right: str) -> dict[str, Any]:
    from repa_lab.spec import load_spec
    from repa_lab.spec.explain import compare_specs

    one, other = load_spec(left), load_spec(right)
    found = compare_specs(one, other)
    ids = [_run_ids(experiment) for experiment in (one, other)]
    return {
        "equal": found.is_empty,
        "removed": list(found.removed),
        "added": list(found.added),
        "fields": [_plain(field) for field in found.fields],
        "runs": {"a": len(ids[0]), "b": len(ids[1]), "shared": len(ids[0] & ids[1])},
    }


def _run_ids(experiment: Experiment) -> set[str]:
    from repa_lab.data import DataError
    from repa_lab.orchestration.plan import identify_arm
    from repa_lab.spec import SpecError
    from repa_lab.training.resolve import Inventory

    ids, inventory = set(), Inventory()
    for arm in experiment.arms:
        try:
            ids |= {identify_arm(arm, seed, inventory).run_id for seed in experiment.seeds}
        except DataError as error:
            raise SpecError([arm.problem(f"data.{error.field}", str(error))]) from None
    return ids


def _between_runs(left: str, right: str, root: Path) -> dict[str, Any]:
    from repa_lab.spec.explain import compare_runs

    fields = [_plain(field) for field in compare_runs(_run(left, root), _run(right, root))]
    return {"equal": not fields, "fields": fields}


def _run(name: str, root: Path) -> Run:
    from repa_lab.runs import RunsRoot
    from repa_lab.spec.identity import Run

    directory = RunsRoot(root).find_run(Path(name))
    return Run.from_json(directory.run_id, directory.spec)


def _plain(field: Difference) -> dict[str, Any]:
    """A difference as JSON; a side that has no such field is left out."""
    sides = {"a": field.left, "b": field.right}
    values = {side: held[0] for side, held in sides.items() if held is not None}
    return {"path": field.path, **values, "arms": list(field.arms)}


def _print_difference(found: dict[str, Any], left: str, right: str) -> None:
    for key, name in (("removed", left), ("added", right)):
        for label in found.get(key, ()):
            print(f"only in {name}: arm '{label}'")
    rows = [(one["path"], _side(one, "a"), _side(one, "b"), _arms_of(one["arms"])) for one in found["fields"]]
    _print_columns([("", left, right, ""), *rows] if rows else [])
    if runs := found.get("runs"):
        print(f"{runs['a']} and {runs['b']} runs, {runs['shared']} of them shared")


def _side(field: dict[str, Any], side: str) -> str:
    return _shown(field[side]) if side in field else _ABSENT


def _arms_of(labels: list[str]) -> str:
    return f"in {_listed(labels)}" if labels else ""


def _held_by(setting: Setting, total: int) -> str:
    return f"in {len(setting.arms)} of {total} arms: {_listed(setting.arms)}" if setting.arms else ""


def _listed(labels: Iterable[str]) -> str:
    text = "; ".join(labels)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _shown(value: Any) -> str:
    """A value as YAML would have it: text stays bare unless it reads as something else."""
    from repa_lab.spec.yaml import reads_as_text

    return value if isinstance(value, str) and reads_as_text(value) else json.dumps(value, ensure_ascii=False)


def _print_columns(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows in aligned columns; unlike a drawn table it is never cut and can be searched."""
    kept = list(rows)
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    for row in kept:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
