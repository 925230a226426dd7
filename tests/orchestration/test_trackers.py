"""Who listens to a run, as its options say."""

from __future__ import annotations

import importlib.util

import pytest

from repa_lab.orchestration.checks import check
from repa_lab.orchestration.executors import Task, TrainJob
from repa_lab.orchestration.worker import _compared, open_trackers
from repa_lab.runs import RunsRoot, SweepManifest
from repa_lab.runs.root import ComparisonRecord
from repa_lab.spec import RunOptions, SpecError, load_spec
from repa_lab.training.resolve import Inventory, metric_name
from tests.training.conftest import make_run


def job(root: RunsRoot, **options) -> TrainJob:
    return TrainJob(Task(make_run(), "an arm, seed 0"), "mine", RunOptions.model_validate(options), root)


@pytest.mark.parametrize(
    "options, listeners",
    [
        ({"wandb": {"mode": "disabled"}}, []),
        ({"wandb": {"mode": "offline"}}, ["WandbListener"]),
        ({"wandb": {"mode": "disabled"}, "tensorboard": True}, ["TensorBoardListener"]),
        ({"wandb": {"mode": "online"}, "tensorboard": True}, ["WandbListener", "TensorBoardListener"]),
    ],
)
def test_who_listens(tmp_path, options, listeners):
    assert [type(listener).__name__ for listener in open_trackers(job(RunsRoot(tmp_path), **options))] == listeners


def test_a_headline_is_of_what_the_sweep_compares_or_else_of_what_the_run_measures(tmp_path):
    root = RunsRoot(tmp_path)
    assert _compared(job(root)) == ComparisonRecord(metric=metric_name(make_run().config))
    sweep = root.sweep("mine")
    sweep.path.mkdir()
    compare = ComparisonRecord(metric="fid:x@16/ode2", goal="max", targets={"fid:x@16/ode2": [2.0]})
    sweep.record(SweepManifest(name="mine", compare=compare, arms=()))
    assert _compared(job(root)) == compare


def test_tensorboard_that_is_not_installed_is_refused_before_anything_is_made(tiny, monkeypatch):
    experiment = load_spec(tiny(run={"tensorboard": True}))
    check(experiment, Inventory())
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("tensorboard") else find(name)
    )
    with pytest.raises(SpecError, match=r"run\.tensorboard: needs TensorBoard: pip install 'repa-lab\[tensorboard\]'"):
        check(experiment, Inventory())


@pytest.mark.parametrize(
    "wandb, said",
    [
        ({"artifacts": "all"}, "artifacts: expected one of false, final, got 'all'"),
        ({"artifacts": True}, "artifacts: expected one of false, final, got true"),
        ({"tags": ["x" * 65]}, f"tags.0: expected text of at most 64 characters, got '{'x' * 65}'"),
        ({"tags": "one"}, "tags: expected a list, got 'one'"),
    ],
)
def test_what_wandb_would_refuse_is_refused_here(tiny, wandb, said):
    with pytest.raises(SpecError) as refused:
        load_spec(tiny(run={"wandb": wandb}))
    assert str(refused.value) == f"<given>: run.wandb.{said}"
