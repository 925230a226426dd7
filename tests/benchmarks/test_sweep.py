"""What a sweep costs beside its training. Prints; asserts nothing about time."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from repa_lab import plan, sweep
from repa_lab.orchestration.executors import forkserver
from repa_lab.runs import RunsRoot
from repa_lab.spec import load_spec
from tests.benchmarks.ratios import spent_by
from tests.orchestration.conftest import TINY

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
ROUNDS = 5
# As a worker does, with its one thread: imports, then every second run; prints its seconds and its CPU seconds.
BARE = """
import gc, sys, time
began = time.perf_counter()
import torch, repa_lab.orchestration.worker
torch.set_num_threads(1)
gc.freeze()
from repa_lab import plan
from repa_lab.training.loop import train
spec, root, part = sys.argv[1:]
planned = plan(spec, root)
for run in planned.pending[int(part) :: 2]:
    train(run, planned.root.run(run.run_id), planned.experiment.run, planned.root.cache)
print(time.perf_counter() - began, time.process_time())
"""


def train_bare(spec, root):
    """Both halves of the runs at a time, for two on two cores are slower than one; the longer's seconds, and all CPU seconds."""
    planned = plan(spec, root)
    halves = [
        subprocess.Popen([sys.executable, "-c", BARE, spec, root, str(part)], stdout=subprocess.PIPE, text=True)
        for part in (0, 1)
    ]
    told = [[float(word) for word in half.communicate()[0].split()] for half in halves]
    assert len(planned.root.runs()) == len(planned.pending)
    return max(seconds for seconds, _ in told), sum(cpu for _, cpu in told)


def test_24_tiny_runs_on_two_workers(tmp_path):
    """Against two bare processes that share the runs, imports, plan and report in; caches are filled beforehand for both."""
    spec = {**TINY, "axes": {"regularizer.weight": [i / 10 for i in range(1, 9)]}, "seeds": 3}
    spec["compare"] = {"baseline": {"regularizer.weight": 0.1}}
    spec["train"] = {**TINY["train"], "steps": 100, "batch_size": 64}
    spec["evaluate"] = {**TINY["evaluate"], "every": 50}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    sweep(load_spec({**spec, "seeds": [99], "axes": {}}), tmp_path / "warm", workers=1)
    forkserver.close_server()

    def empty(name: str) -> Path:
        root = tmp_path / name
        root.mkdir()
        (root / "cache").symlink_to(tmp_path / "warm" / "cache")
        return root

    elapsed, cpu = [], []
    for number in range(ROUNDS):
        bare, bare_cpu = train_bare(file, empty(f"bare {number}"))
        root, began = empty(f"sweep {number}"), time.perf_counter()
        spent, _ = spent_by(sys.executable, "-m", "repa_lab", "sweep", file, "--root", root, "--workers", 2)
        elapsed.append((time.perf_counter() - began) / bare)
        cpu.append(spent / bare_cpu)
        print(f"\nround {number + 1}: CPU time {cpu[-1]:.3f} ({spent:.0f} s / {bare_cpu:.0f} s)", flush=True)
        assert len(RunsRoot(root).runs()) == 24
    for name, found in (("CPU time", cpu), ("elapsed time", elapsed)):
        median = statistics.median(found)
        print(
            f"\n24 runs on 2 workers / two bare processes, {name}: {median:.3f} ({min(found):.3f} to {max(found):.3f})"
        )
