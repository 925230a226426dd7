"""Who listens to a run, as its options say, and what is said of W&B before a sweep and after it."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from repa_lab import plan, sweep
from repa_lab.orchestration.api import run_one
from repa_lab.orchestration.checks import check
from repa_lab.orchestration.scheduler import Task, TrainJob
from repa_lab.orchestration.worker import open_trackers
from repa_lab.runs import RunsRoot, SweepManifest
from repa_lab.runs.root import ComparisonRecord
from repa_lab.spec import RunOptions, SpecError, load_spec
from repa_lab.training.resolve import Inventory, metric_name
from tests.tracking.conftest import clean, numbers, server, without_none
from tests.tracking.server import KEY, serving
from tests.training.conftest import make_run

__all__ = ["clean", "server"]


def job(root: RunsRoot, **options) -> TrainJob:
    return TrainJob(Task(make_run(), "an arm, seed 0"), "mine", RunOptions.model_validate(options), root)


@pytest.mark.parametrize(
    "options, listeners",
    [
        ({"wandb": {"mode": "disabled"}}, []),
        ({"wandb": {"mode": "offline"}}, []),
        ({"wandb": {"mode": "disabled"}, "tensorboard": True}, ["TensorBoardListener"]),
        ({"wandb": {"mode": "online"}, "tensorboard": True}, ["WandbListener", "TensorBoardListener"]),
    ],
)
def test_who_listens(tmp_path, options, listeners):
    assert [type(listener).__name__ for listener in open_trackers(job(RunsRoot(tmp_path), **options))] == listeners


def test_a_headline_is_of_what_the_sweep_compares_or_else_of_what_the_run_measures(tmp_path):
    root, measured = RunsRoot(tmp_path), metric_name(make_run().config)
    rows = [{"step": 1, measured: 3.0, "fid:x@16/ode2": 1.0}, {"step": 2, measured: 2.0, "fid:x@16/ode2": 4.0}]

    def told() -> dict:
        (listener,) = open_trackers(job(root, wandb={"mode": "online"}))
        return listener._description.headline(rows)

    assert told() == {"metric": measured, "final": 2.0, "best": 2.0, "best_step": 2}
    sweep = root.sweep("mine")
    sweep.path.mkdir()
    compare = ComparisonRecord(metric="fid:x@16/ode2", goal="max", targets={"fid:x@16/ode2": [2.0]})
    sweep.record(SweepManifest(name="mine", compare=compare, arms=()))
    said = {"metric": "fid:x@16/ode2", "final": 4.0, "best": 4.0, "best_step": 2}
    assert told() == {**said, "steps_to/2": pytest.approx(4 / 3)}


def test_tensorboard_that_is_not_installed_is_refused_before_anything_is_made(tiny, monkeypatch):
    experiment = load_spec(tiny(run={"tensorboard": True}))
    check(experiment, Inventory())
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("tensorboard") else find(name)
    )
    with pytest.raises(SpecError, match=r"run\.tensorboard: needs TensorBoard: pip install 'repa-lab\[tensorboard\]'"):
        check(experiment, Inventory())


def spec_file(tmp_path, spec: dict):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def cli(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "repa_lab", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "wandb, variables, line, said",
    [
        ({"project": "a/b"}, {}, "    project: a/b", "run.wandb.project: W&B takes no name with / \\ # ? % :, got / in 'a/b'"),
        ({"entity": "my team"}, {}, "    entity: my team", "run.wandb.entity: W&B takes no user or team with spaces, got 'my team'"),
        ({"mode": "online"}, {}, "    mode: online", "run.wandb.mode: WANDB_API_KEY: not set, and `wandb login` has stored no key; W&B's mode online needs one"),
        ({"mode": "auto"}, {"WANDB_API_KEY": "short"}, "    mode: auto", "run.wandb.mode: WANDB_API_KEY: a key of W&B has 40 or more characters, this one has 5"),
        ({"mode": "auto"}, {"WANDB_MODE": "onlin"}, "    mode: auto", "run.wandb.mode: WANDB_MODE: expected one of online, offline, disabled, run, shared, dryrun, got 'onlin'"),
        ({"mode": "auto"}, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "https://wandb.ai"}, "    mode: auto", "run.wandb.mode: WANDB_BASE_URL: "),
    ],
)  # fmt: skip
def test_what_wandb_refuses_is_refused_by_every_command_with_its_place(
    tiny, tmp_path, clean, monkeypatch, wandb, variables, line, said
):
    spec = spec_file(tmp_path, tiny(run={"device": "cpu", "wandb": wandb}))
    number = 1 + spec.read_text().splitlines().index(line)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for command in (plan, sweep, lambda *given: run_one(given[0], None, None, given[1])):
        with pytest.raises(SpecError) as refused:
            command(spec, tmp_path / "runs")
        (problem,) = str(refused.value).splitlines()
        assert problem.startswith(f"{spec}:{number}:") and f": {said}" in problem
    assert not (tmp_path / "runs").exists()


def test_a_key_that_the_server_refuses_stops_a_sweep_before_anything_is_made(tiny, tmp_path, clean, monkeypatch):
    spec = tiny(run={"device": "cpu", "wandb": {"mode": "auto"}})
    with serving(refuses=True) as refusing:
        monkeypatch.setenv("WANDB_BASE_URL", refusing.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for command in (sweep, lambda *given: run_one(given[0], None, None, given[1])):
            with pytest.raises(SpecError, match=r"run\.wandb\.mode: WANDB_API_KEY: .* refuses the key \(status 401\)"):
                command(spec, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_sweep_whose_server_is_away_says_so_once_and_is_sent_later(tiny, tmp_path, server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    options = {"device": "cpu", "log_every": 1, "wandb": {"mode": "auto", "project": "p", "entity": "us"}}
    spec, root = tiny(run=options, seeds=1), tmp_path / "runs"
    shown = io.StringIO()
    outcome = sweep(spec, root, workers=1, console=Console(file=shown, width=300))
    away = "W&B's server http://127.0.0.1:9 cannot be reached: Connection refused"
    assert shown.getvalue().count(away) == 1
    assert f"{away}; `repa-lab sync tiny` sends the rows later" in shown.getvalue().splitlines()
    runs = [RunsRoot(root).run(run_id) for run_id in outcome.directory.manifest.run_ids]
    assert outcome.untracked == {run.run_id: away for run in runs} and len(runs) == 2
    assert all(not [event for event in run.events() if event["event"] == "listener-failed"] for run in runs)
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    assert sweep(spec, root).untracked == dict.fromkeys(outcome.untracked, "not sent during training")
    sent = cli("sync", "tiny", "--root", root)
    assert [line.split(": ")[1] for line in sent.stdout.splitlines()] == ["synced", "synced"]
    assert [numbers(server, run) for run in runs] == [without_none(run.rows()) for run in runs]
    before = {run_id: list(rows) for run_id, rows in server.rows.items()}
    again = cli("sync", "tiny", "--root", root)
    assert [line.split(": ")[1] for line in again.stdout.splitlines()] == ["already synced"] * 2
    assert server.rows == before
    stands = json.loads(cli("status", "tiny", "--root", root, "--json").stdout)
    assert [run["wandb"] for run in stands] == [f"{len(run.rows())} of {len(run.rows())} rows" for run in runs]
    assert sweep(spec, root).untracked == {}


def test_the_last_lines_of_a_sweep_say_of_how_many_runs_wandb_has_no_record_and_why(tiny, tmp_path, clean):
    options = {"device": "cpu", "log_every": 1, "wandb": {"mode": "auto"}}
    train, evaluate = {**tiny()["train"], "steps": 2}, {**tiny()["evaluate"], "encoder": None}
    spec, root = spec_file(tmp_path, tiny(run=options, train=train, evaluate=evaluate, seeds=1)), tmp_path / "runs"
    lines = cli("sweep", spec, "--root", root).stdout.splitlines()
    assert lines[-3:] == [
        "W&B has no complete record of 2 of 2 runs: WANDB_API_KEY is not set, and `wandb login` has stored no key",
        f"`repa-lab sync tiny --root {root}` sends what it lacks",
        f"report: {root / 'tiny' / 'report.html'}",
    ]
    silent = cli("sweep", spec, "--root", root, "--set", "run.wandb.mode=disabled").stdout
    assert "W&B" not in silent
