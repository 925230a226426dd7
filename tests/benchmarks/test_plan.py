"""How planning, looking and collecting garbage grow with the number of runs. Prints; asserts nothing about time."""

import pytest

from repa_lab.runs import RunsRoot
from tests.benchmarks.many_runs import write_sweep
from tests.benchmarks.ratios import spent

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
SETUP = """
import json
from pathlib import Path
from repa_lab.cli.runs import _rows
from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.display import arm_rows, as_json, sentences
from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot
from repa_lab.runs.garbage_collection import find_garbage
from tests.benchmarks.many_runs import experiment
root, (arms, seeds) = RunsRoot(Path(sys.argv[1])), map(int, sys.argv[2:])
files = sorted(root.path.glob("by-id/*/metrics.jsonl"))
"""
WORK = {
    "json.loads": "rows = [json.loads(line) for file in files for line in file.open()]",
    "plan": "e = estimate(make_plan(experiment(arms, seeds), root)); arm_rows(e), sentences(e), json.dumps(as_json(e))",
    "plan of as many arms": "e = estimate(make_plan(experiment(arms * seeds, 1, 'new'), root)); arm_rows(e), sentences(e)",
    "status": "_rows(root, None)",
    "status of the sweep": "_rows(root, Path('many'))",
    "gc": "find_garbage(root)",
}


def test_growth_of_planning_and_looking(tmp_path):
    """Imports are not counted. The runs are done; of the plan of as many arms none is begun."""
    before = {}
    for arms, seeds in ((5, 2), (10, 10), (10, 100), (100, 100)):
        runs, root = arms * seeds, RunsRoot(tmp_path / f"{arms * seeds}")
        write_sweep(root, arms, seeds)
        for name, work in WORK.items():
            seconds, memory = spent(SETUP, work, root.path, arms, seeds)
            growth = f", {seconds / before[name]:.1f} x the time of a tenth of the runs" if name in before else ""
            print(f"\n{runs:,} runs, {name}: {seconds:.2f} s, {memory:.0f} MiB{growth}", end="")
            before[name] = seconds
