"""What a sweep costs beside its training. Prints; asserts nothing about time."""

import subprocess
import sys
import time

import pytest

from repa_lab import plan, sweep
from repa_lab.runs import RunsRoot
from repa_lab.spec import load_spec
from tests.sweep.conftest import TINY

pytestmark = pytest.mark.bench
# As a worker does, with its one thread: imports, then every run in turn; prints the seconds of the imports and of the runs.
BARE = """
import sys, time
began = time.perf_counter()
import torch, repa_lab.sweep.prepare, repa_lab.training.loop
torch.set_num_threads(1)
from repa_lab import plan
from repa_lab.runs import RunsRoot
from repa_lab.training.loop import train
ready, (spec, root) = time.perf_counter(), sys.argv[1:]
planned = plan(spec, root)
for run in planned.pending:
    train(run, planned.root.run(run.run_id), planned.experiment.run, planned.root.cache)
print(ready - began, time.perf_counter() - ready)
"""


def test_24_tiny_runs_on_two_workers(tmp_path):
    """Against half of what one process takes for all of them, and one warm start; caches are filled beforehand for both."""
    import yaml

    spec = {**TINY, "axes": {"regularizer.weight": [i / 10 for i in range(1, 9)]}, "seeds": 3}
    spec["compare"] = {"baseline": {"regularizer.weight": 0.1}}
    spec["train"] = {**TINY["train"], "steps": 100, "batch_size": 64}
    spec["evaluate"] = {**TINY["evaluate"], "every": 50}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    sweep(load_spec({**spec, "seeds": [99]}), tmp_path / "warm", workers=2)
    for name in ("bare", "sweep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(tmp_path / "warm" / "cache")
    bare = subprocess.run([sys.executable, "-c", BARE, file, tmp_path / "bare"], capture_output=True, text=True, check=True)
    start, trained = map(float, bare.stdout.split())
    began = time.perf_counter()
    assert sweep(file, tmp_path / "sweep", workers=2).trained == 24
    spent = time.perf_counter() - began
    assert len(RunsRoot(tmp_path / "bare").runs()) == len(plan(file, tmp_path / "sweep").runs) == 24
    ideal = trained / 2 + start
    print(f"\n24 runs on 2 workers / (training / 2 + a warm start): {spent / ideal:.3f} ({spent:.1f} s; {trained:.1f} s / 2 + {start:.1f} s)")
