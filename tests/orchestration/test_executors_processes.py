"""Runs that several processes share, on the CPU: results, crashes, and slots that come back."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from repa_lab import plan, sweep
from repa_lab.runs import RunsRoot, State
from tests.faults.processes import holders, meanwhile, parent_of, signal_holders, wait_until
from tests.training.conftest import rows


def question(tiny, steps=6, **options):
    run = {**tiny()["run"], **options}
    return tiny(
        train={**tiny()["train"], "steps": steps}, evaluate={**tiny()["evaluate"], "every": steps}, seeds=1, run=run
    )


@pytest.mark.slow
def test_two_processes_train_as_one_does_but_for_rounding(tiny, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert sweep(question(tiny), one, workers=1).failures == {}
    assert sweep(question(tiny, gpus_per_run=2), two, workers=1).failures == {}
    for expected in RunsRoot(one).runs():
        found = RunsRoot(two).run(expected.run_id)
        assert (expected.provenance["processes"], found.provenance["processes"]) == (1, 2)
        for ours, theirs in zip(rows(found), rows(expected), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-2, abs=1e-3)


def siblings(pid: int) -> list[int]:
    """Worker processes of the same fork server."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_worker = b"executors.forkserver" in (process / "cmdline").read_bytes()
            if is_worker and int(process.name) != pid and parent_of(int(process.name)) == parent_of(pid):
                found.append(int(process.name))
    return found


def test_a_process_that_dies_costs_its_run_and_the_slot_comes_back(tiny, tmp_path):
    """The second process, which the first would wait for for ever."""
    spec = question(tiny, steps=60, gpus_per_run=2, checkpoint_every=5)
    victim, other = (RunsRoot(tmp_path).run(run.run_id) for run in plan(spec, tmp_path).pending)

    def kill_follower():
        wait_until(lambda: len(victim.rows()) > 8)
        (first,) = holders(victim)
        (second,) = siblings(first)
        os.kill(second, signal.SIGKILL)

    killer = meanwhile(kill_follower)
    outcome = sweep(spec, tmp_path, workers=1)
    killer.join()
    assert outcome.failures == {victim.run_id: "the worker died (signal 9)"}
    assert other.state.state is State.DONE
    assert sweep(spec, tmp_path, workers=1).failures == {}
    assert [row["step"] for row in victim.rows() if "loss/total" in row] == list(range(1, 61))


@pytest.mark.slow
def test_a_run_that_fails_in_both_processes_leaves_a_slot_that_works(tiny, tmp_path):
    axes = {"train.lr": [1e30, 1e-3]}
    spec = tiny(axes=axes, seeds=1, compare={"baseline": {"train.lr": 1e-3}}, run={**tiny()["run"], "gpus_per_run": 2})
    outcome = sweep(spec, tmp_path, workers=1)
    assert outcome.trained == 1
    (reason,) = outcome.failures.values()
    assert reason.startswith("DivergedError: the loss is")


@pytest.mark.slow
def test_a_signal_to_one_of_many_workers_is_the_loss_of_one_run(tiny, tmp_path):
    spec = question(tiny, steps=60)
    victim, other = (RunsRoot(tmp_path).run(run.run_id) for run in plan(spec, tmp_path).pending)
    killer = meanwhile(lambda: signal_holders(victim, signal.SIGKILL, after=5))
    outcome = sweep(spec, tmp_path, workers=2)
    killer.join()
    assert list(outcome.failures) == [victim.run_id] and other.state.state is State.DONE
