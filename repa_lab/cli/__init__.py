"""The command line: parse, call, print. Exit status 2 means the input was refused and nothing was created."""

from __future__ import annotations

import importlib
import logging

from repa_lab.cli.shared import app

# Each puts its commands on the app, and help lists them in this order.
for _group in ("sweeps", "specs", "watch", "models"):
    importlib.import_module(f"repa_lab.cli.{_group}")


def main() -> None:
    """Entry point of `repa-lab`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()
