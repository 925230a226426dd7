"""How reading and reporting grow with the number of runs. Prints; asserts nothing about time."""

import pytest

from repa_lab.runs import RunsRoot
from tests.benchmarks.many_runs import write_sweep
from tests.benchmarks.ratios import spent

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
SETUP = """
import json
from pathlib import Path
from repa_lab.report import leaderboards, load_results
from repa_lab.runs import RunsRoot
root = RunsRoot(Path(sys.argv[1]))
files = sorted(root.path.glob("by-id/*/metrics.jsonl"))
"""
DRAWING = """
import matplotlib.backends.backend_svg, repa_lab.report.figures
from repa_lab.report import write_report
"""
WORK = {
    "json.loads": ("", "rows = [json.loads(line) for file in files for line in file.open()]"),
    "leaderboard": ("", "boards = leaderboards(root.path)"),
    "load_results, summary": ("import pandas", "summary = load_results(root.sweep('many').path).summary"),
    "load_results, runs and curves": (
        "import pandas",
        "results = load_results(root.path); results.runs, results.curves",
    ),
    "gc --dry-run": (
        "from repa_lab.runs.garbage_collection import collect, size_of",
        "collect(root, dry_run=True), size_of(root.path)",
    ),
    "status": ("from repa_lab.cli.runs import _rows", "_rows(root, None)"),
    "what a report reads": (
        "import pandas",
        "results = load_results(root.sweep('many').path)\nresults.rows, results.troubles",
    ),
    "report": (DRAWING, "write_report(root.sweep('many'))"),
    "report without news": (DRAWING, "write_report(root.sweep('many'))"),
}


def test_growth_of_reading_and_reporting(tmp_path):
    """Imports are not counted. The times are compared with that of the plainest loop over the rows of all runs."""
    before = {}
    for arms, seeds in ((5, 2), (10, 10), (10, 100), (100, 100)):
        runs, root = arms * seeds, RunsRoot(tmp_path / f"{arms * seeds}")
        write_sweep(root, arms, seeds)
        plain = 0.0
        for name, (imports, work) in WORK.items():
            seconds, memory = spent(SETUP + imports, work, root.path)
            plain = plain or seconds
            growth = f", {seconds / before[name]:.1f} x the time of a tenth of the runs" if name in before else ""
            print(
                f"\n{runs:,} runs, {name}: {seconds:.2f} s, {seconds / plain:.1f} x json.loads, {memory:.0f} MiB{growth}"
            )
            before[name] = seconds
