"""What commands share: consoles, options, errors without tracebacks, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 160


def _console(is_error: bool, stream: TextIO) -> Console:
    """A console for plain text: labels and paths may hold brackets and colons. A pipe has no width: a table must not be
    cut for a terminal that is not there."""
    return Console(stderr=is_error, width=None if stream.isatty() else _PIPE_WIDTH, markup=False, emoji=False)


out, err = _console(False, sys.stdout), _console(True, sys.stderr)

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec file: one question.")]
RootOption = Annotated[Path, typer.Option("--root", help="Where runs live.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Lay a value over the spec.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="A new file instead of the terminal.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def clean_errors() -> Iterator[None]:
    """A user's mistake is one message and exit status 2; an interruption says how to go on. A disk that is full or
    read-only is one message too, and exit status 1."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to go on from the last checkpoints")
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError) as error:
        status = _exit_status(error)
        if status is None:
            raise
        err.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(status) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # a reader such as `head` has seen enough
            raise
        where = f"'{error.filename}': " if error.filename else ""
        err.print(f"{where}{error.strerror or error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _exit_status(error: Exception) -> int | None:
    """2 for input that was refused, 1 for work that could not go on, None for a defect: an error that is not the lab's own."""
    if not type(error).__module__.startswith("repa_lab."):
        return None
    return 2 if isinstance(error, ValueError) else 1


def deliver(text: str, output: Path | None) -> None:
    """Print a text as it is, or write it to a file that is not there yet; a file that is there is a mistake of the user's."""
    from repa_lab.runs.files import write_text

    if output is None:
        print(text, end="")
        return
    try:
        if output.exists():
            raise mistake("", f"'{output}' exists; name a new file")
        write_text(output, text)
    except OSError as error:
        raise mistake("", f"cannot write '{output}': {error.strerror}") from None


class UsageError(ValueError):
    """A mistake on the command line itself."""


def mistake(what: str, message: str) -> UsageError:
    """The error of a word or an option of the command line; ``what`` is empty where the message names it."""
    return UsageError(": ".join(part for part in (what, message) if part))


def overrides(given: list[str] | None) -> dict[str, Any]:
    """What ``--set`` was given, by dotted path.

    Raises:
        UsageError: a word is not ``PATH=VALUE``, or its value is no YAML.
    """
    from repa_lab.spec.yaml import parse_scalar

    overrides = {}
    for text in given or []:
        path, equals, value = text.partition("=")
        try:
            if not path or not equals:
                raise ValueError("expected PATH=VALUE")
            overrides[path] = parse_scalar(value)
        except ValueError as error:
            raise mistake(f"--set {text}", str(error)) from None
    return overrides


@contextmanager
def progress(task: str, console: Console, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar that begins with the first progress it is told, so that what is refused before has none.

    Args:
        task: what is counted.
        console: where it is shown.
        is_shown: or not at all.

    Yields:
        What to tell how much is done, and of how much.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, disable=not is_shown)
    bar = bars.add_task(task, total=None)
    with ExitStack() as shown:

        def show(done: int, total: int) -> None:
            if not bars.live.is_started:
                shown.enter_context(bars)
            bars.update(bar, completed=done, total=total)

        yield show


def table(title: str, rows: list[dict[str, Any]], hidden: tuple[str, ...] = ()) -> Table:
    """Rows as a table; their keys are its columns, but for those that are hidden."""
    drawn = Table(title=title, title_justify="left")
    for column in (rows or [{"run": ""}])[0]:
        if column not in hidden:
            drawn.add_column(column)
    for row in rows:
        drawn.add_row(*(str(value) for column, value in row.items() if column not in hidden))
    return drawn
