"""`wandb sync` really run, against a server of our own on this machine: no row of this lab was ever sent to W&B's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repa_lab.runs import RunDirectory, RunsRoot, RunWriter, State, SweepManifest
from repa_lab.tracking import Listeners
from repa_lab.tracking.wandb import NoKeyError, SyncResult, WandbListener, WandbRun, offline_folders, sync, sync_command

from .records import records
from .server import KEY, serving

ROWS = [{"step": step, "images": 8 * step, "loss/total": 1 / step} for step in range(1, 6)]


def record(run: RunDirectory, *parts: list[dict], state: State = State.DONE, name: str = "a name") -> None:
    """What a run leaves that is started once for each part."""
    told = WandbRun(name, "the-sweep", {"train": {"lr": 0.1}}, "a-project", "offline", "a-team", ("sit", "mine"))
    with RunWriter(run) as writer:
        writer.describe({"seed": 0}, {})
        for number, rows in enumerate(parts, start=1):
            listeners = Listeners(writer, [WandbListener(run, told)])
            for row in rows:
                writer.row(row)
                listeners.row(row)
            end = state if number == len(parts) else State.INTERRUPTED
            writer.state(end, rows[-1]["step"])
            listeners.finish(end)
    records(run)  # waits until they are written


@pytest.fixture
def root(tmp_path, monkeypatch) -> RunsRoot:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return RunsRoot(tmp_path / "runs")


def cli(root: RunsRoot, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "repa_lab", "sync", *map(str, words), "--root", str(root.path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def without_own(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def test_the_server_gets_the_rows_of_a_resumed_run_once_and_in_order(root, monkeypatch):
    run = root.run("abcdef012345")
    record(run, ROWS[:3], ROWS[3:])
    assert len(offline_folders(run)) == 2
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        found = sync(run)
        assert found == SyncResult("abcdef012345", "synced", f"{server.address}/a-team/a-project/runs/abcdef012345")
        assert without_own(server.rows["abcdef012345"]) == ROWS
        told = server.runs["abcdef012345"]
        said = {key: told[key] for key in ("entity", "project", "groupName", "displayName", "jobType", "tags")}
        assert said == {
            **{"entity": "a-team", "project": "a-project", "groupName": "the-sweep", "displayName": "a name"},
            **{"jobType": "train", "tags": ["sit", "mine"]},
        }
        assert sync(run) == SyncResult("abcdef012345", "already synced")
        record(run, [{"step": 6, "images": 48, "loss/total": 0.1}])
        assert sync(run).outcome == "synced"
        assert [row["step"] for row in server.rows["abcdef012345"]] == [1, 2, 3, 4, 5, 6]


def test_a_refusal_is_told_with_the_servers_words_though_wandb_ends_with_0(root, monkeypatch):
    run = root.run("abcdef012345")
    record(run, ROWS)
    with serving(refuses=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert (
            subprocess.run(
                sync_command(offline_folders(run)), cwd=root.path, capture_output=True, check=False
            ).returncode
            == 0
        )
        found = sync(run)
    assert found.outcome == "failed"
    assert "401" in found.detail and "user is not logged in" in found.detail and "\n" not in found.detail
    assert sync_needs_a_key(run, monkeypatch)  # it is still waiting


def sync_needs_a_key(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(NoKeyError, match=rf"WANDB_API_KEY .* run {run.run_id} "):
        sync(run)
    return True


def test_a_run_that_is_being_trained_is_left(root):
    run = root.run("abcdef012345")
    record(run, ROWS)
    with RunWriter(run):
        assert sync(run).outcome == "left"


def test_the_command_names_a_runs_folders_from_the_oldest_to_the_newest(root):
    run = root.run("abc")
    for time in ("20260102_000000", "20260101_235959"):
        folder = run.path / f"wandb/offline-run-{time}-abc"
        folder.mkdir(parents=True)
        (folder / "run-abc.wandb").touch()
    (run.path / "wandb/offline-run-20260103_000000-abc").mkdir()  # W&B could not even begin
    (run.path / "wandb/run-20260104_000000-abc").mkdir()  # was online
    command = sync_command(offline_folders(run))
    assert command[:4] == [sys.executable, "-m", "wandb", "sync"]
    assert [Path(path).name for path in command[4:]] == [
        "offline-run-20260101_235959-abc",
        "offline-run-20260102_000000-abc",
    ]


def test_the_command_line_says_what_became_of_every_run(root, monkeypatch):
    for name in ("aaa", "bbb"):
        record(root.run(name), ROWS[:2])
    with RunWriter(root.run("ccc")) as writer:
        writer.describe({"seed": 0}, {})
    sweep = root.sweep("mine")
    sweep.path.mkdir()
    arms = [
        {
            "label": "a",
            "levels": {},
            "baseline": None,
            "runs": [{"seed": 0, "run_id": "bbb"}, {"seed": 1, "run_id": "ccc"}],
        }
    ]
    sweep.record(SweepManifest(name="mine", compare={"metric": "m"}, arms=arms))
    keyless = cli(root)
    assert (keyless.returncode, keyless.stdout) == (2, "")
    (line,) = keyless.stderr.splitlines()
    assert line.startswith("no W&B key: set WANDB_API_KEY to upload run aaa")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        one = cli(root, "mine")
        assert (one.returncode, one.stdout) == (0, f"bbb: synced: {server.address}/a-team/a-project/runs/bbb\n")
        both = cli(root, "bbb", "mine", root.run("aaa").path)
        assert both.stdout.splitlines() == [
            "bbb: already synced",
            f"aaa: synced: {server.address}/a-team/a-project/runs/aaa",
        ]
        server.refuses = True
        record(root.run("aaa"), ROWS[2:])
        refused = cli(root, "aaa")
        assert refused.returncode == 1 and refused.stdout.startswith("aaa: failed: ")
    unknown = cli(root, "nope")
    assert unknown.returncode == 2
    assert unknown.stderr == f"no run and no sweep 'nope' in {root.path}; sweeps: mine; `repa-lab status` lists runs\n"
    assert cli(root, "ccc").stdout == f"W&B recorded nothing offline of these runs in {root.path}\n"
