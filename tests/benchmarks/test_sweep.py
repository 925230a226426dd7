"""What a sweep costs beside its training. Prints; asserts nothing about time."""

import subprocess
import sys
import time

import pytest

from repa_lab import plan, sweep
from repa_lab.spec import load_spec
from tests.orchestration.conftest import TINY

pytestmark = pytest.mark.bench
# As a worker does, with its one thread: imports, then every second run; prints the seconds of the imports and of the runs.
BARE = """
import gc, sys, time
began = time.perf_counter()
import torch, repa_lab.orchestration.prepare, repa_lab.training.loop
torch.set_num_threads(1)
gc.freeze()
from repa_lab import plan
from repa_lab.training.loop import train
ready, (spec, root, part) = time.perf_counter(), sys.argv[1:]
planned = plan(spec, root)
for run in planned.pending[int(part) :: 2]:
    train(run, planned.root.run(run.run_id), planned.experiment.run, planned.root.cache)
print(ready - began, time.perf_counter() - ready)
"""


def train_bare(spec, root):
    """Both halves of the runs at a time, for two on two cores are slower than one; means of the starts and of the trainings."""
    planned = plan(spec, root)
    halves = [
        subprocess.Popen([sys.executable, "-c", BARE, spec, root, str(part)], stdout=subprocess.PIPE, text=True)
        for part in (0, 1)
    ]
    said = [list(map(float, half.communicate()[0].split())) for half in halves]
    assert len(planned.root.runs()) == len(planned.pending)
    return [sum(seconds) / 2 for seconds in zip(*said, strict=True)]


def test_24_tiny_runs_on_two_workers(tmp_path):
    """Against two bare processes that share the runs, and one warm start; caches are filled beforehand for both."""
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
    start, trained = train_bare(file, tmp_path / "bare")
    began = time.perf_counter()
    assert sweep(file, tmp_path / "sweep", workers=2).trained == 24
    spent = time.perf_counter() - began
    ideal = trained + start
    print(
        f"\n24 runs on 2 workers / (training / 2 + a warm start): {spent / ideal:.3f} ({spent:.1f} s; {trained:.1f} s + {start:.1f} s)"
    )
