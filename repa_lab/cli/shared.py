"""What commands share: consoles, options, usage errors, tables, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from repa_lab.errors import InputError
from repa_lab.files import write_text

_PIPE_WIDTH = 160


def _console(is_error: bool, stream: TextIO) -> Console:
    """Return a console for plain text: labels and paths may hold brackets and colons.

    A pipe has no width; a table must not be cut for a terminal that is not there.
    """
    return Console(stderr=is_error, width=None if stream.isatty() else _PIPE_WIDTH, markup=False, emoji=False)


out, err = _console(False, sys.stdout), _console(True, sys.stderr)

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec file: one question.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's id, or its folder.")]
SweepArgument = Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's name or folder.")]
RootOption = Annotated[Path, typer.Option("--root", help="The folder of all runs.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Lay a value over the spec.")]
WithOption = Annotated[
    list[Path] | None,
    typer.Option("--with", metavar="FILE", help="Lay a fragment over the spec, under --set; may be given again."),
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="How many runs go on at a time.")]
WeightsOption = Annotated[str, typer.Option(help="ema (the averages that are measured) or last.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="A new file instead of the terminal.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class UsageError(InputError):
    """A mistake on the command line itself.

    Args:
        given: the word or the option at fault; empty where the message names it.
    """

    def __init__(self, message: str, given: str = "") -> None:
        super().__init__(f"{given}: {message}" if given else message)


def require_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value of an option that is not one of those allowed.

    Raises:
        UsageError: with the allowed values.
    """
    if value not in allowed:
        raise UsageError(f"unknown {option.removeprefix('--')} '{value}'; allowed: {', '.join(allowed)}", option)


def deliver(text: str, output: Path | None) -> None:
    """Print a text as it is, or write it to a new file.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    if output is None:
        print(text, end="")
        return
    try:
        if output.exists():
            raise UsageError(f"'{output}' exists; name a new file")
        write_text(output, text)
    except OSError as error:
        raise UsageError(f"cannot write '{output}': {error.strerror}") from None


def overrides(given: list[str] | None) -> dict[str, Any]:
    """Return what ``--set`` was given, by dotted path.

    Raises:
        UsageError: a word is not ``PATH=VALUE``, or its value is no YAML.
    """
    from repa_lab.spec.document import parse_scalar

    overrides = {}
    for text in given or []:
        path, equals, value = text.partition("=")
        try:
            if not path or not equals:
                raise ValueError("expected PATH=VALUE")
            overrides[path] = parse_scalar(value)
        except ValueError as error:
            raise UsageError(str(error), f"--set {text}") from None
    return overrides


@contextmanager
def progress(task: str, console: Console, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar from the first progress on, so that what is refused before shows none.

    Yields:
        A function to call with the number of things done, and of all.
    """
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bars = Progress(*columns, console=console, disable=not is_shown)
    bar = bars.add_task(task, total=None)

    def show(done: int, total: int) -> None:
        bars.start()
        bars.update(bar, completed=done, total=total)

    try:
        yield show
    finally:
        if bars.live.is_started:
            bars.stop()


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows as a table, with their keys as columns."""
    drawn = Table(*(rows or [{"run": ""}])[0], title=title, title_justify="left")
    for row in rows:
        drawn.add_row(*map(str, row.values()))
    return drawn
