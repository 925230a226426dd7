"""`python -m repa_lab.cli`."""

from repa_lab.cli import main

main()
