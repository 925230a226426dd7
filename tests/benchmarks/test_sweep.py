"""What a sweep costs beside its training. Prints; asserts nothing about time."""

import resource
import subprocess
import sys
import time

import pytest

from repa_lab import plan, sweep
from repa_lab.orchestration.executors import forkserver
from repa_lab.spec import load_spec
from tests.orchestration.conftest import TINY

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
# As a worker does, with its one thread: imports, then every second run; prints its seconds and its CPU seconds.
BARE = """
import gc, sys, time
began = time.perf_counter()
import torch, repa_lab.orchestration.prepare, repa_lab.training.loop
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


def cpu_seconds():
    """Of this process and of all that have ended below it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def test_24_tiny_runs_on_two_workers(tmp_path):
    """Against two bare processes that share the runs, imports, plan and report in; caches are filled beforehand for both."""
    import yaml

    spec = {**TINY, "axes": {"regularizer.weight": [i / 10 for i in range(1, 9)]}, "seeds": 3}
    spec["compare"] = {"baseline": {"regularizer.weight": 0.1}}
    spec["train"] = {**TINY["train"], "steps": 100, "batch_size": 64}
    spec["evaluate"] = {**TINY["evaluate"], "every": 50}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    sweep(load_spec({**spec, "seeds": [99], "axes": {}}), tmp_path / "warm", workers=1)
    forkserver.close_server()
    for name in ("bare", "sweep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(tmp_path / "warm" / "cache")
    bare, bare_cpu = train_bare(file, tmp_path / "bare")
    began, cpu_began = time.perf_counter(), cpu_seconds()
    assert sweep(file, tmp_path / "sweep", workers=2).trained == 24
    spent = time.perf_counter() - began
    time.sleep(2)  # its workers end
    forkserver.close_server()
    cpu = cpu_seconds() - cpu_began
    print(
        f"\n24 runs on 2 workers / two bare processes: {spent / bare:.3f} ({spent:.1f} s / {bare:.1f} s), "
        f"CPU time {cpu / bare_cpu:.3f} ({cpu:.1f} s / {bare_cpu:.1f} s)"
    )
