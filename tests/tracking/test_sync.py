"""What `repa-lab sync` sends to a server of our own on this machine: no row of this lab was ever sent to W&B's."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest

from repa_lab.runs import RunDirectory, RunsRoot, RunWriter, State, SweepManifest
from repa_lab.runs.root import TrackingRecord
from repa_lab.tracking import wandb as tracking
from repa_lab.tracking.wandb import SyncResult, WandbListener, WandbRecord, sync
from repa_lab.training.loop import train
from tests.faults.test_kill import kill_when
from tests.training.conftest import OFF, cache, make_options, make_run

from .conftest import ROWS, SPEC, TOLD, draw, numbers, record, without_none
from .server import serving

__all__ = ["cache"]

PROCESSES = multiprocessing.get_context("fork")  # of this process, which has torch imported; killing them is real


def cli(root: RunsRoot, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repa_lab", "sync", *map(str, words), "--root", str(root.path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def made(root: RunsRoot, name: str, rows: list[dict] = ROWS, state: State = State.DONE) -> RunDirectory:
    """A run that W&B was never told of."""
    record(root.run(name), rows, state)
    return root.run(name)


def swept(root: RunsRoot, name: str, *run_ids: str, **wandb: object) -> None:
    """A sweep that asks for these runs."""
    runs = [{"seed": seed, "run_id": run_id} for seed, run_id in enumerate(run_ids)]
    (root.path / name).mkdir(parents=True)
    arms = [{"label": "an arm", "runs": runs}]
    root.sweep(name).record(SweepManifest(name=name, compare={"metric": "m"}, arms=arms, wandb=wandb))


def test_a_run_that_wandb_was_never_told_of_is_sent_once(run, server):
    record(run, ROWS, State.DONE)
    draw(run, 2)
    assert sync(run, TOLD) == SyncResult(run.run_id, "synced", f"{server.address}/us/p/runs/{run.run_id}")
    assert numbers(server, run) == without_none(ROWS)
    told = {key: server.runs[run.run_id][key] for key in ("entity", "project", "groupName", "displayName", "tags")}
    named = {"groupName": "mine", "displayName": "arm, seed 3", "tags": ["sit", "repa", "slow"]}
    assert told == {"entity": "us", "project": "p", **named}
    before = list(server.rows[run.run_id])
    assert sync(run, TOLD) == SyncResult(run.run_id, "already synced")
    assert server.rows[run.run_id] == before and server.sessions == [run.run_id]


def test_without_the_record_the_server_says_what_it_has(run, server):
    record(run, ROWS, State.DONE)
    assert sync(run, TOLD).outcome == "synced"
    before = list(server.rows[run.run_id])
    (run.path / tracking.RECORD).unlink()
    assert sync(run, TOLD).outcome == "synced"
    assert server.rows[run.run_id] == before and WandbRecord.read(run).covers(run)


def test_a_run_that_goes_on_after_a_sync_is_sent_the_rest(run, server):
    record(run, ROWS[:2], State.INTERRUPTED)
    assert sync(run, TOLD).outcome == "synced"
    assert sync(run, TOLD).outcome == "already synced"
    record(run, ROWS[2:], State.DONE)
    assert sync(run, TOLD).outcome == "synced"
    assert numbers(server, run) == without_none(ROWS)


def test_what_another_project_or_server_has_is_not_taken_for_sent(run, server, monkeypatch):
    record(run, ROWS, State.DONE)
    assert sync(run, TOLD).outcome == "synced"
    record_there = WandbRecord.read(run)
    assert not record_there.is_at(tracking.WandbRun(TrackingRecord(project="q", entity="us")))
    assert not record_there.is_at(tracking.WandbRun(TrackingRecord(project="p", entity="others")))
    assert record_there.is_at(tracking.WandbRun(TrackingRecord(project="p")))  # of the key's own team
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not record_there.is_at(TOLD)


def test_rows_that_wandb_had_buffered_when_a_process_was_killed_are_there_after_a_sync(run, cache, server):
    trained = make_run(**OFF, **{"train.steps": 40, "evaluate.every": 20})
    options = make_options(log_every=1, checkpoint_every=5)
    server.takes_rows.clear()
    arguments = (trained, run, options, cache, [WandbListener(run, TOLD)])
    process = PROCESSES.Process(target=train, args=arguments)
    assert kill_when(process, lambda: len(run.rows()) > 22 and server.sessions)
    server.takes_rows.set()
    with RunWriter(run):  # as every start does: cuts off a row that the kill tore
        rows = run.rows()
    assert len(numbers(server, run)) < len(rows)
    assert sync(run, TOLD).outcome == "synced"
    assert numbers(server, run) == without_none(rows)
    assert sync(run, TOLD).outcome == "already synced"
    assert train(trained, run, options, cache, [WandbListener(run, TOLD)]) is State.DONE
    told = [(row["step"], row.get("loss/total")) for row in numbers(server, run)]
    assert told == [(row["step"], row.get("loss/total")) for row in run.rows()]
    grids = [row["step"] for row in server.history(run.run_id) if "samples" in row]
    assert grids == sorted(run.sample_grids()) == [20, 40]
    assert sync(run, TOLD).outcome == "already synced"


def test_a_run_that_is_being_trained_is_left(run, server):
    record(run, ROWS, State.RUNNING)
    with RunWriter(run):
        assert sync(run, TOLD).outcome == "left"


def test_what_the_server_refuses_is_told_with_its_words(run, server):
    record(run, ROWS, State.DONE)
    server.refuses = True
    found = sync(run, TOLD)
    assert found.outcome == "failed"
    assert "401" in found.detail and "user is not logged in" in found.detail and "\n" not in found.detail


def test_the_command_line_says_what_became_of_every_run(tmp_path, server, monkeypatch):
    root = RunsRoot(tmp_path / "runs")
    for name in ("aaa", "bbb"):
        made(root, name)
    with RunWriter(root.run("ccc")) as writer:
        writer.describe(SPEC, {})
    swept(root, "mine", "bbb", "ccc", mode="online", project="a-project", entity="a-team", tags=["swept"])
    one = cli(root, "mine")
    assert (one.returncode, one.stderr) == (0, "")
    assert one.stdout == f"bbb: synced: {server.address}/a-team/a-project/runs/bbb\n"
    told = server.runs["bbb"]
    assert (told["groupName"], told["displayName"], told["tags"]) == (
        "mine",
        "an arm, seed 0",
        ["sit", "repa", "swept"],
    )
    both = cli(root, "bbb", "mine", root.run("aaa").path)
    assert both.stdout.splitlines() == [
        "bbb: already synced",
        f"aaa: synced: {server.address}/us/repa-lab/runs/aaa",
    ]
    assert cli(root).stdout.splitlines() == ["aaa: already synced", "bbb: already synced"]
    unknown = cli(root, "nope")
    assert unknown.returncode == 2
    assert unknown.stderr == f"no run and no sweep 'nope' in {root.path}; sweeps: mine; `repa-lab status` lists runs\n"
    assert cli(root, "ccc").stdout == f"no rows to send in {root.path}\n"


@pytest.mark.parametrize(
    "variables, status, said",
    [
        ({"WANDB_API_KEY": ""}, 2, "WANDB_API_KEY: not set, and `wandb login` has stored no key; W&B's mode online needs one"),
        ({"WANDB_API_KEY": "short"}, 2, "WANDB_API_KEY: a key of W&B has 40 or more characters, this one has 5"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, 1, "W&B's server http://127.0.0.1:9 cannot be reached: Connection refused"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_of_all_runs_is_said_once(tmp_path, server, monkeypatch, variables, status, said):
    root = RunsRoot(tmp_path / "runs")
    for name in ("aaa", "bbb"):
        made(root, name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = cli(root)
    assert (refused.returncode, refused.stdout, refused.stderr) == (status, "", f"{said}\n")


def test_a_key_that_the_server_refuses_is_said_once(tmp_path, monkeypatch, clean):
    root = RunsRoot(tmp_path / "runs")
    for name in ("aaa", "bbb"):
        made(root, name)
    with serving(refuses=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        refused = cli(root)
    assert refused.stderr == f"WANDB_API_KEY: {server.address} refuses the key (status 401)\n"
    assert refused.returncode == 2


def test_runs_of_a_sweep_without_wandb_are_sent_only_if_the_sweep_is_named(tmp_path, server):
    root = RunsRoot(tmp_path / "runs")
    made(root, "aaa")
    swept(root, "private", "aaa", mode="disabled")
    unnamed = cli(root)
    left = "1 runs left: their sweeps have run.wandb.mode disabled; name a sweep to send its runs"
    assert unnamed.stdout.splitlines() == [left, f"no rows to send in {root.path}"]
    assert cli(root, "private").stdout.startswith("aaa: synced: ")
    assert numbers(server, root.run("aaa")) == without_none(ROWS)
