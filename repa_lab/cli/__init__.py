"""The command line: parse, call, print. Exit status 2 means the input was refused and nothing was created."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from repa_lab.cli import data, models, profile, reproduce, results, specs, sweeps, watch
from repa_lab.cli.shared import clean_errors
from repa_lab.registry import load_plugins

PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Load a plugin, for runs of components that it registers."),
]
# In the order in which help lists them.
COMMANDS = (
    sweeps.sweep, sweeps.plan, sweeps.run, sweeps.report,
    specs.schema, specs.explain, specs.diff,
    watch.status, watch.why, watch.retry, watch.stop, watch.pin, watch.gc,
    profile.profile,
    results.leaderboard, results.sync,
    reproduce.reproduce,
    models.families, models.export, models.sample,
)  # fmt: skip

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _load(plugin: PluginOption = None) -> None:
    with clean_errors():
        load_plugins(plugin or [])


for _command in COMMANDS:
    app.command()(_command)
app.command("import", context_settings={"ignore_unknown_options": True})(models.import_)
app.add_typer(data.app, name="data")


def main() -> None:
    """Entry point of `repa-lab`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()
