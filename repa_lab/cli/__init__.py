"""The command line: parse, call, print. Exit status 2 means the input was refused and nothing was created."""

from __future__ import annotations

import logging

# Each puts its commands on the app, and help lists them in this order.
from repa_lab.cli import sweeps  # noqa: F401, I001
from repa_lab.cli import watch  # noqa: F401
from repa_lab.cli import models  # noqa: F401
from repa_lab.cli.shared import app


def main() -> None:
    """Entry point of `repa-lab`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()
