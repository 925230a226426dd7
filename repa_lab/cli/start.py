"""Start a spec of one's own, and describe this installation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from repa_lab.cli.shared import JsonOption, RootOption, UsageError, deliver
from repa_lab.files import examples
from repa_lab.registry import did_you_mean
from repa_lab.runs.root import DEFAULT_ROOT

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


def doctor(json_: JsonOption = False, root: RootOption = DEFAULT_ROOT) -> None:
    """Describe this installation and machine, without secrets, for a bug report."""
    from repa_lab.orchestration.doctor import diagnose

    sections = diagnose(root)
    if json_:
        print(json.dumps(sections, indent=2))
        return
    for title, facts in sections.items():
        print(f"{title}:" if facts else f"{title}: none")
        for fact in facts if isinstance(facts, list) else [f"{name}: {value}" for name, value in facts.items()]:
            print(f"  {fact}")
