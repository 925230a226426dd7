"""The order of a sweep's runs, and when it gives up: real sweeps in real worker processes."""

import io
import pickle
import signal
import time
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from repa_lab import plan, sweep
from repa_lab.orchestration.api import SweepBrokenError, SweepBusyError
from repa_lab.orchestration.scheduler import PackedJob, PrepareJob, Task, TrainJob
from repa_lab.orchestration.worker import do, train_run
from repa_lab.runs import RunsRoot, RunWriter, State
from repa_lab.spec import RunOptions
from tests.faults.processes import meanwhile, signal_holders, steps_of
from tests.training.conftest import assert_same, cache, make_options, make_run, rows, run_to_end, weights

__all__ = ["cache"]
DIVERGING = 1e30


def begun(root: RunsRoot) -> list[tuple[int, float]]:
    """The seeds and the learning rates of runs in the order of their first steps."""
    events = ((run, next(e["time"] for e in run.events() if e["event"] == "running")) for run in root.runs())
    return [(run.spec["seed"], run.spec["train"]["lr"]) for run, _ in sorted(events, key=lambda pair: pair[1])]


def test_the_first_seed_of_every_arm_goes_before_any_second_seed(tiny, tmp_path):
    spec = tiny(axes={"train.lr": [1e-3, 2e-3]}, seeds=[5, 3], compare={"baseline": {"train.lr": 1e-3}})
    order = [(5, 1e-3), (5, 2e-3), (3, 1e-3), (3, 2e-3)]
    assert [(run.seed, run.config.train.lr) for run in plan(spec, tmp_path).pending] == order
    sweep(spec, tmp_path, workers=1)
    assert begun(RunsRoot(tmp_path)) == order


def diverging(tiny, *rates, **options):
    """Runs that diverge in their first step, each for a reason of its own, and, at a rate below 1, ones that do not."""
    run = {**tiny()["run"], **options}
    return tiny(axes={"train.lr": list(rates)}, seeds=1, compare={"baseline": {"train.lr": rates[0]}}, run=run)


def test_after_so_many_failures_no_run_is_started(tiny, tmp_path):
    spec = diverging(tiny, DIVERGING, 1e-3, 2 * DIVERGING, 2e-3, 3e-3, max_failures=2)
    outcome = sweep(spec, tmp_path, workers=1)
    assert (outcome.trained, len(outcome.failures)) == (1, 2)
    assert outcome.stopped == "2 runs were not started: run.max_failures is 2"
    assert all(reason.startswith("DivergedError: the loss is") for reason in outcome.failures.values())
    assert "DivergedError" in (outcome.path / "report.md").read_text()
    assert [rate for _, rate in begun(RunsRoot(tmp_path))] == [DIVERGING, 1e-3, 2 * DIVERGING]
    again = sweep(diverging(tiny, DIVERGING, 1e-3, 2 * DIVERGING, 2e-3, 3e-3), tmp_path, workers=1)
    assert (again.trained, again.stopped) == (2, None)


@pytest.mark.slow
def test_what_runs_beside_the_last_failure_is_finished(tiny, tmp_path):
    spec = diverging(tiny, DIVERGING, 1e-3, 2e-3, max_failures=1)
    outcome = sweep(spec, tmp_path, workers=2)
    assert (outcome.trained, len(outcome.failures)) == (1, 1)
    assert outcome.stopped == "1 runs were not started: run.max_failures is 1"


def test_where_the_first_runs_fail_alike_the_rest_is_not_tried(tiny, tmp_path):
    rates = [DIVERGING * factor for factor in range(1, 6)]
    with pytest.raises(SweepBrokenError) as caught:
        sweep(diverging(tiny, *rates), tmp_path, workers=1)
    (line,) = str(caught.value).splitlines()
    assert line == "the first 3 runs failed alike: DivergedError: the loss is nan at step 2"
    assert len(RunsRoot(tmp_path).runs()) == 3


@pytest.mark.slow
def test_a_run_that_is_done_lets_the_others_be_tried(tiny, tmp_path):
    rates = [1e-3, *(DIVERGING * factor for factor in range(1, 5))]
    outcome = sweep(diverging(tiny, *rates), tmp_path, workers=1)
    assert (outcome.trained, len(outcome.failures), outcome.stopped) == (1, 4, None)


def test_a_run_that_another_process_trains_is_waited_for_and_never_told_to_have_failed(tiny, tmp_path):
    spec = tiny(axes={"train.lr": [1e-3, 2e-3]}, seeds=1, compare={"baseline": {"train.lr": 1e-3}})
    ours, theirs = (RunsRoot(tmp_path).run(run.run_id) for run in plan(spec, tmp_path).pending)
    seen = io.StringIO()
    with RunWriter(theirs) as writer:
        outcomes = []
        sweeping = meanwhile(
            lambda: outcomes.append(sweep(spec, tmp_path, workers=1, console=Console(file=seen, width=200)))
        )
        while "another process trains it" not in seen.getvalue():
            assert sweeping.is_alive()
            time.sleep(0.1)
        assert ours.state.state is State.DONE and outcomes == []
        writer.describe({"seed": 0}, {})
        writer.state(State.DONE, 6)
    sweeping.join()
    (outcome,) = outcomes
    assert (outcome.trained, outcome.failures) == (1, {})
    assert [event["event"] for event in theirs.events()] == ["done"]


def test_a_second_process_is_refused_before_it_prepares_anything(tiny, tmp_path):
    directory = RunsRoot(tmp_path).sweep("tiny")
    directory.path.mkdir()
    spec = tiny(run={**tiny()["run"], "device": "cuda"})  # which a worker would refuse
    with FileLock(directory.lock), pytest.raises(SweepBusyError, match="another process is carrying out the sweep in"):
        sweep(spec, tmp_path)
    assert list(directory.path.iterdir()) == [directory.lock]
    assert not RunsRoot(tmp_path).cache.exists()


@pytest.mark.parametrize("hangs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_hangs_is_started_again_once(tiny, tmp_path, hangs):
    spec = tiny(axes={}, seeds=1, train={**tiny()["train"], "steps": 40})
    spec["evaluate"] |= {"every": 40}
    spec["run"] |= {"checkpoint_every": 4, "hang_minutes": 0.1}
    (run_id,) = (run.run_id for run in plan(spec, tmp_path).pending)
    run = RunsRoot(tmp_path).run(run_id)

    def stop_again_and_again():
        for number in range(hangs):
            signal_holders(run, signal.SIGSTOP, after=5 + 10 * number)

    stopper = meanwhile(stop_again_and_again)
    outcome = sweep(spec, tmp_path, workers=1)
    stopper.join()
    failed = [event["error"] for event in run.events() if event["event"] == "failed"]
    assert failed == ["no sign of life for 0.1 minutes"] * hangs
    if hangs == 1:
        assert outcome.failures == {} and run.state.state is State.DONE
        assert steps_of(run) == list(range(1, 41))
    else:
        assert outcome.failures == {run_id: "no sign of life for 0.1 minutes"}


def test_jobs_carry_every_option(tmp_path):
    options = RunOptions.model_validate(
        {
            "executor": "slurm",
            "ray": {"address": "auto", "resources": {"slot": 1}, "num_gpus": 0.5},
            "slurm": {"partition": "gpu", "setup": ["module load cuda", "export A='b c'"], "mem_gb": 8},
            "slots_per_gpu": 2,
            "gpus_per_run": 4,
            "max_failures": 3,
            "hang_minutes": 0.5,
        }
    )
    run, root = make_run(), RunsRoot(tmp_path)
    for job in (TrainJob(Task(run, "name"), "group", options, root), PrepareJob((run.config,), options, root)):
        found = pickle.loads(pickle.dumps(PackedJob.of(job))).unpacked()
        assert replace(found, root=root) == job and found.root.path == tmp_path


class TestMemory:
    """Training that runs out of memory at every step of too many images, by a hook on all denoisers of this process."""

    @pytest.fixture
    def limit(self):
        """What fits; a list, to be changed."""
        fits = [2]

        def hook(module, inputs):
            if type(module).__name__ == "SiT" and module.training and len(inputs[0]) > fits[0]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
        yield fits
        handle.remove()

    def job(self, tmp_path, run=None, **options) -> TrainJob:
        return TrainJob(Task(run or make_run(), "name"), "group", make_options(**options), RunsRoot(tmp_path))

    def train(self, job: TrainJob, cache):
        """With the caches that all tests share."""
        job.root.path.mkdir(exist_ok=True)
        (job.root.path / "cache").symlink_to(cache, target_is_directory=True)
        return do(job, lambda: None)

    def test_halves_until_it_fits_and_trains_as_that_size_does(self, limit, cache, tmp_path):
        job = self.job(tmp_path / "runs", micro_batch=None)
        assert self.train(job, cache).state is State.DONE
        directory = job.root.run("run0")
        events = [event for event in directory.events() if event["event"] == "out-of-memory"]
        assert [(event["micro_batch"], event["retried_with"]) for event in events] == [(None, 3), (3, 1)]
        given = run_to_end(make_run(), RunsRoot(tmp_path).run("given"), cache, micro_batch=1)
        assert_same(weights(directory), weights(given))
        assert rows(directory) == rows(given)

    def test_goes_on_from_the_last_checkpoint_with_the_same_randomness(self, limit, cache, tmp_path):
        limit[0] = 6
        run = make_run(**{"train.steps": 6})
        job = self.job(tmp_path / "runs", run, checkpoint_every=2, micro_batch=None)

        def shrink():
            directory = job.root.run("run0")
            if max(steps_of(directory), default=0) == 2:  # asked before the row of a step is written
                limit[0] = 4

        job.root.path.mkdir()
        (job.root.path / "cache").symlink_to(cache, target_is_directory=True)
        assert train_run(job, shrink) is State.DONE
        directory = job.root.run("run0")
        assert [event["step"] for event in directory.events() if event["event"] == "resumed"] == [2]
        assert steps_of(directory) == [1, 2, 3, 4, 5, 6]
        limit[0] = 6
        whole = run_to_end(run, RunsRoot(tmp_path).run("whole"), cache, checkpoint_every=2)
        for ours, theirs in zip(rows(directory), rows(whole), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)

    @pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": "auto"}])
    def test_ends_the_run_where_one_image_does_not_fit(self, limit, options, cache, tmp_path):
        limit[0] = 0
        job = self.job(tmp_path / "runs", **options)
        report = self.train(job, cache)
        assert report.state is State.FAILED
        assert report.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
        assert not [event for event in job.root.run("run0").events() if event["event"] == "out-of-memory"]

    def test_a_measurement_that_does_not_fit_is_not_tried_again(self, cache, tmp_path):
        calls = []

        def hook(module, inputs):
            if type(module).__name__ == "SiT" and not module.training:
                calls.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
        report = self.train(self.job(tmp_path / "runs"), cache)
        handle.remove()
        assert (report.state, len(calls)) == (State.FAILED, 1)
