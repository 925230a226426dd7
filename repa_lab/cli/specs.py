"""Write and read specs: from an example or a SimpleTuner config; what set each value, what differs, the JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
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
    UsageError,
    WithOption,
    deliver,
    overrides,
)
from repa_lab.files import examples
from repa_lab.registry import did_you_mean
from repa_lab.runs import RunsRoot
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    from repa_lab.spec import Experiment
    from repa_lab.spec.explain import Difference

_ABSENT = "-"
_MAX_SHOWN = 60
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9_.-]+")


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new spec, such as question.yaml.")],
    like: Annotated[str, typer.Option(metavar="EXAMPLE", help="The example to start from.")] = "quickstart",
) -> None:
    """Write a whole spec with comments, from one of the examples, that runs where it stands."""
    from repa_lab.spec.documentation import template

    folder = examples() / "experiments"
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    names = {name: path for name, path in names.items() if "presets" not in path.parts and name != "paper/nano"}
    if like not in names:
        raise UsageError(f"no example '{like}'; there are: {', '.join(names)}{did_you_mean(like, names)}", "--like")
    name = _NOT_IN_A_NAME.sub("_", file.stem.lower()).lstrip("_.-")
    deliver(template(names[like], name or "question"), file)
    typer.echo(f"{file} is written; next: repa-lab plan {file}")


def import_(
    config: Annotated[
        list[str], typer.Argument(metavar="CONFIG", help="A file of JSON or of flags, or the flags themselves.")
    ],
    output: OutputOption = None,
) -> None:
    """Turn a SimpleTuner config into a spec; say which settings it cannot carry, and which mean something else here."""
    from repa_lab.bridge.importing import import_config

    imported = import_config(config)
    deliver(imported.spec, output)
    for remark in imported.remarks:
        typer.echo(remark, err=True)


def schema(
    output: OutputOption = None,
    tables: Annotated[Path | None, typer.Option(metavar="FILE", help="Rewrite the tables of fields in a page.")] = None,
) -> None:
    """Print the JSON schema of a spec, with which an editor completes fields and marks mistakes."""
    from repa_lab.spec.documentation import json_schema, write_tables

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
    """Show what set each resolved value: a file with line and column, --set, or the default."""
    from repa_lab.spec import load_spec
    from repa_lab.spec.explain import explain as settings_of

    experiment = load_spec(spec, overrides(set_), with_ or ())
    settings = settings_of(experiment, path, arm)
    if json_:
        print(json.dumps([asdict(setting) for setting in settings]))
        return
    total = len(experiment.arms)
    rows = []
    for setting in settings:
        held_by = f"in {len(setting.arms)} of {total} arms: {_listed(setting.arms)}" if setting.arms else ""
        rows.append((setting.path, _as_yaml(setting.value), setting.source, held_by))
    _print_columns(rows)


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A spec file, or a run: its id or folder.")],
    right: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Show what differs between two specs or two runs; the exit status is 0, 1 if something does, or 2."""
    are_specs = [Path(name).suffix in (".yaml", ".yml") or Path(name).is_file() for name in (left, right)]
    if len(set(are_specs)) == 2:
        raise UsageError(f"'{left}' and '{right}' are a spec and a run; compare two of a kind")
    difference = _compare_specs(left, right) if are_specs[0] else _compare_runs(left, right, RunsRoot(root))
    print(json.dumps(difference)) if json_ else _print_difference(difference, left, right)
    if not difference["equal"]:
        raise typer.Exit(1)


def _compare_specs(left: str, right: str) -> dict[str, Any]:
    from repa_lab.spec import load_spec
    from repa_lab.spec.explain import compare_specs

    specs = [load_spec(left), load_spec(right)]
    difference, (ours, theirs) = compare_specs(*specs), map(_run_ids, specs)
    return {
        "equal": difference.is_empty,
        "removed": list(difference.removed),
        "added": list(difference.added),
        "fields": list(map(_field_json, difference.fields)),
        "runs": {"a": len(ours), "b": len(theirs), "shared": len(ours & theirs)},
    }


def _run_ids(experiment: Experiment) -> set[str]:
    from repa_lab.data import DataError
    from repa_lab.orchestration.plan import identify_run
    from repa_lab.spec import SpecError
    from repa_lab.training.resolve import Inventory

    ids, inventory = set(), Inventory()
    for arm in experiment.arms:
        try:
            ids |= {identify_run(arm.config, seed, inventory).run_id for seed in experiment.seeds}
        except DataError as error:
            raise SpecError([arm.problem(f"data.{error.field}", str(error))]) from None
    return ids


def _compare_runs(left: str, right: str, root: RunsRoot) -> dict[str, Any]:
    from repa_lab.spec.explain import differences
    from repa_lab.spec.identity import Run

    fields = differences(*(Run.read(root.find_run(Path(name))).to_json() for name in (left, right)))
    return {"equal": not fields, "fields": list(map(_field_json, fields))}


def _field_json(field: Difference) -> dict[str, Any]:
    """Return a difference as JSON; a side that has no such field is left out."""
    sides = {side: value[0] for side, value in (("a", field.left), ("b", field.right)) if value is not None}
    return {"path": field.path, **sides, "arms": list(field.arms)}


def _print_difference(difference: dict[str, Any], left: str, right: str) -> None:
    for key, name in (("removed", left), ("added", right)):
        for label in difference.get(key, ()):
            print(f"only in {name}: arm '{label}'")
    rows = []
    for field in difference["fields"]:
        sides = (_as_yaml(field[side]) if side in field else _ABSENT for side in ("a", "b"))
        rows.append((field["path"], *sides, f"in {_listed(field['arms'])}" if field["arms"] else ""))
    _print_columns([("", left, right, ""), *rows] if rows else [])
    if runs := difference.get("runs"):
        print(f"{runs['a']} and {runs['b']} runs, {runs['shared']} of them shared")


def _listed(labels: Iterable[str]) -> str:
    text = "; ".join(labels)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _as_yaml(value: Any) -> str:
    """Return a value as YAML would have it: text stays bare unless it reads as something else."""
    from repa_lab.spec.document import reads_as_text

    return value if isinstance(value, str) and reads_as_text(value) else json.dumps(value, ensure_ascii=False)


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in aligned columns; unlike a drawn table they are never cut, and can be searched."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
