"""Sweeps through submitit: as processes on this machine, on paper, and, where there is one, in a real Slurm's queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from repa_lab import plan, sweep
from repa_lab.orchestration.executors import slurm
from repa_lab.orchestration.executors.slurm import SlurmExecutor, sbatch_parameters
from repa_lab.orchestration.progress import ProgressView
from repa_lab.orchestration.scheduler import Scheduler, Task, TrainJob
from repa_lab.orchestration.sharing import RunList
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import RunOptions, SpecError
from tests.faults.processes import meanwhile, signal_holders, steps_of, wait_until
from tests.faults.slurm import can_start, is_up, started
from tests.training.conftest import assert_same, rows, weights

submitit = pytest.importorskip("submitit")
GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch.txt"
STEPS = 150


def question(tiny, **options):
    run = {**tiny()["run"], "checkpoint_every": 10, **options}
    evaluate = {**tiny()["evaluate"], "every": STEPS}
    return tiny(train={**tiny()["train"], "steps": STEPS}, evaluate=evaluate, seeds=1, run=run)


@pytest.fixture(scope="module")
def local(tiny, tmp_path_factory):
    """What the sweep comes to in the local executor."""
    root = tmp_path_factory.mktemp("local")
    assert sweep(question(tiny), root, workers=1).failures == {}
    return RunsRoot(root)


def carry_out(spec, root: Path, executor: SlurmExecutor) -> dict[str, str]:
    """What `sweep` does, with this executor."""
    planned = plan(spec, root)
    with ProgressView(Console(quiet=True), "tiny", executor.slots) as view:
        scheduler = Scheduler(executor, planned.root, planned.experiment.run, "tiny", view)
        try:
            scheduler.prepare({entry.run.config: entry.arm for entry in planned.runs})
            scheduler.run(RunList((Task(run, run.run_id) for run in planned.pending), planned.root))
            return scheduler.failures
        finally:
            executor.close()


def test_a_run_that_is_started_again_has_the_grace_of_a_new_job(tiny, tmp_path, monkeypatch):
    """A job that squeue does not list has 20 s for its result, and so has the next job of the same run."""
    executor, now = on_this_machine(question(tiny), tmp_path), [1000.0]
    paths = SimpleNamespace(result_pickle=tmp_path / "none.pkl", stderr="job.err")
    engine = SimpleNamespace(batch=nullcontext, submit=lambda _: SimpleNamespace(job_id="7", paths=paths))
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for name, value in (("_cluster", "slurm"), ("_engine", engine), ("_list", lambda state="": set())):
        monkeypatch.setattr(executor, name, value)
    planned = plan(question(tiny), tmp_path)
    job = TrainJob(planned.runs[0].task, "tiny", planned.experiment.run, planned.root)
    for _ in range(2):
        executor.submit(job)
        assert executor.poll(0) == []
        now[0] += 19.0
        assert executor.poll(0) == []
        now[0] += 2.0
        (message,) = executor.poll(0)
        assert message.error == "the job ended without a result; see job.err"


def on_this_machine(spec, root: Path) -> SlurmExecutor:
    return SlurmExecutor(plan(spec, root).experiment.run, RunsRoot(root), "tiny", 2, "local")


def assert_equal(root: RunsRoot, local: RunsRoot) -> None:
    assert len(local.runs()) == 2
    for expected in local.runs():
        found = root.run(expected.run_id)
        assert found.state.state is State.DONE
        assert_same(weights(found), weights(expected))
        assert rows(found) == rows(expected)


@pytest.mark.slow
def test_a_preempted_job_checkpoints_and_is_queued_again_and_changes_no_bit(tiny, local, tmp_path):
    """USR2 is what Slurm sends before it takes a node away."""
    spec, root = question(tiny, slurm={"time_min": 60}), RunsRoot(tmp_path)
    first, second = (root.run(run.run_id) for run in plan(spec, tmp_path).pending)
    preempting = [
        meanwhile(lambda: signal_holders(first, signal.SIGUSR2, after=15)),
        meanwhile(lambda: signal_holders(second, signal.SIGUSR2, after=33)),
    ]
    assert carry_out(spec, tmp_path, on_this_machine(spec, tmp_path)) == {}
    for thread in preempting:
        thread.join()
    for run in (first, second):
        stopped = [event["step"] for event in run.events() if event["event"] == "interrupted"]
        assert stopped and stopped == [event["step"] for event in run.events() if event["event"] == "resumed"]
    assert_equal(root, local)


@pytest.mark.slow
def test_a_job_that_dies_is_a_failure_that_a_rerun_repairs(tiny, local, tmp_path):
    spec, root = question(tiny), RunsRoot(tmp_path)
    victim, other = (root.run(run.run_id) for run in plan(spec, tmp_path).pending)
    killer = meanwhile(lambda: signal_holders(victim, signal.SIGKILL, after=15))
    failures = carry_out(spec, tmp_path, on_this_machine(spec, tmp_path))
    killer.join()
    assert list(failures) == [victim.run_id] and failures[victim.run_id].startswith(
        "the job ended without a result; see "
    )
    assert Path(failures[victim.run_id].rpartition(" ")[2]).exists()
    assert (victim.state.state, other.state.state) == (State.FAILED, State.DONE)
    assert carry_out(spec, tmp_path, on_this_machine(spec, tmp_path)) == {}
    assert_equal(root, local)


def test_the_batch_file_is_the_golden_one():
    options = RunOptions.model_validate(
        {
            "slurm": {
                "partition": "gpu",
                "account": "vision",
                "time_min": 240,
                "gpus_per_node": 2,
                "cpus_per_task": 8,
                "mem_gb": 64,
                "array_parallelism": 16,
                "setup": ["module load cuda", "export HF_HOME=/shared/hf"],
            }
        }
    )
    parameters = sbatch_parameters(options, "sdxl_manifold")
    text = submitit.slurm.slurm._make_sbatch_string(
        "COMMAND", "/shared/runs/.jobs/sdxl_manifold/slurm", map_count=40, **parameters
    )
    assert text == GOLDEN.read_text()


def test_what_is_not_asked_for_is_left_to_the_cluster():
    text = submitit.slurm.slurm._make_sbatch_string("COMMAND", "/runs", **sbatch_parameters(RunOptions(), "tiny"))
    for flag in ("--partition", "--account", "--gpus-per-node", "--mem", "--array", "# setup"):
        assert flag not in text
    assert "#SBATCH --time=1440" in text and "#SBATCH --requeue" in text


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("submitit", "slurm needs submitit: pip install 'repa-lab[slurm]'"),
        (None, "no Slurm here: srun and sbatch are not on the PATH"),
    ],
)
def test_what_is_missing_is_one_line(tiny, tmp_path, monkeypatch, module, problem):
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpecError) as caught:
        sweep(question(tiny, executor="slurm"), tmp_path / "runs")
    assert str(caught.value) == f"<given>: run.executor: {problem}"


def starts(run) -> list[float]:
    """When the run was begun or taken up."""
    return [event["time"] for event in run.events() if event["event"] == "running"]


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    """This machine's Slurm, or one of our own."""
    if is_up():
        yield
        return
    if not can_start():
        pytest.skip("no Slurm on this machine")
    with started(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("queue")
class TestRealSlurm:
    def test_an_array_with_a_requeued_run_changes_no_bit(self, tiny, local, tmp_path):
        spec, root = question(tiny, executor="slurm", slurm={"time_min": 30, "cpus_per_task": 1}), RunsRoot(tmp_path)
        first = root.run(plan(spec, tmp_path).pending[0].run_id)
        preempting = meanwhile(lambda: signal_holders(first, signal.SIGUSR2, after=15))
        assert sweep(spec, tmp_path).failures == {}
        preempting.join()
        assert any(event["event"] == "resumed" for event in first.events())
        assert_equal(root, local)
        files = {path.name for path in (tmp_path / ".jobs" / "tiny" / "slurm").iterdir()}
        assert len([name for name in files if name.endswith("_0_0_log.out") or name.endswith("_1_0_log.out")]) == 2

    def test_a_scheduler_that_was_killed_finds_its_jobs_again(self, tiny, local, tmp_path):
        file = tmp_path / "spec.yaml"
        file.write_text(
            yaml.safe_dump(
                question(tiny, executor="slurm", slurm={"time_min": 30, "cpus_per_task": 1}), sort_keys=False
            )
        )
        command = [sys.executable, "-m", "repa_lab", "sweep", str(file), "--root", str(tmp_path / "runs")]
        root = RunsRoot(tmp_path / "runs")
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs = [root.run(run.run_id) for run in plan(file, root.path).pending]
        wait_until(lambda: max(len(steps_of(run)) for run in runs) >= 15)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        begun = {run.run_id: starts(run) for run in runs if starts(run)}
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 0, second.stderr
        assert_equal(root, local)
        # Whatever ran or waited when the scheduler died was not started another time.
        assert begun and begun.items() <= {run.run_id: starts(run) for run in runs}.items()
        assert [len(starts(run)) for run in runs] == [1, 1]
