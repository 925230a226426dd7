"""The command line: parse, call, print. Exit status 2 means that the input was refused and nothing was created."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from repa_lab.cli import doctor, models, runs, specs, sweeps
from repa_lab.errors import UserError, hide_passwords
from repa_lab.registry import load_plugins

# In the order in which --help lists them.
COMMANDS = (
    specs.new, sweeps.sweep, sweeps.plan, sweeps.run, sweeps.report,
    specs.schema, specs.explain, specs.diff,
    runs.status, runs.why, runs.retry, runs.stop, runs.pin, runs.gc,
    models.profile, sweeps.leaderboard, runs.sync,
    sweeps.reproduce, sweeps.bench,
    models.families, models.export, models.sample,
    doctor.doctor,
)  # fmt: skip


class _Commands(TyperGroup):
    """All commands; the one place where their errors become a line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke a command; an interruption is exit status 130. An error of no kind below is a defect: a traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            message, status = "interrupted; run the same command again to go on from the last checkpoints", 130
        except UserError as error:
            message, status = str(error), error.status
        except BrokenPipeError:  # a reader such as `head` has seen enough
            raise
        except OSError as error:  # such as a disk that is full or read-only
            message, status = f"'{error.filename}': " if error.filename else "", 1
            message += error.strerror or str(error)
        except Exception as error:
            if isinstance(text := getattr(error, "message", None), str):  # typer's, about a word on the command line
                error.message = hide_passwords(text)  # type: ignore[attr-defined]
            raise
        typer.echo(message, err=True)
        raise typer.Exit(status)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"repa-lab {importlib.metadata.version('repa-lab')}")
        raise typer.Exit


@app.callback()
def _load(
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE", help="Load a plugin, for runs of components that it registers."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    load_plugins(plugin or [])


for _command in COMMANDS:
    app.command()(_command)
app.command("import", context_settings={"ignore_unknown_options": True})(specs.import_)
app.add_typer(models.data, name="data")


def main() -> None:
    """Entry point of `repa-lab`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()
