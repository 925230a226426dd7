"""With the real W&B client, without a network."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest
import wandb

from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.tracking import Journal
from repa_lab.tracking.wandb import WandbListener, resolve_mode
from repa_lab.training.loop import train
from tests.training.conftest import OFF, cache, make_options, make_run, rows, stop_after

__all__ = ["cache"]

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_very_secret_token_of_this_test",
    "AWS_SECRET_ACCESS_KEY": "another-very-secret-value",
}


@pytest.fixture
def server(monkeypatch) -> Iterator[socket.socket]:
    """What W&B is told its server is: it hears every attempt to connect. Every secret is in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening


def listen(run: RunDirectory, **config: object) -> WandbListener:
    run.path.mkdir(parents=True, exist_ok=True)
    return WandbListener(run, "a name", "the-sweep", config, "a-project", "offline")


def recorded(run: RunDirectory) -> list[bytes]:
    """What W&B wrote for the run, one entry per start, oldest first."""
    wandb.teardown()  # waits for W&B's own process, which writes the files
    files = sorted(run.path.glob(f"wandb/offline-run-*-{run.run_id}*/run-{run.run_id}.wandb"))
    return [path.read_bytes() for path in files]


def test_a_run_is_recorded_offline_and_resumed_under_its_id(tmp_path, cache, server):
    run, directory = make_run(**OFF), RunDirectory(tmp_path / "by-id" / "abcdef012345")
    listener = listen(directory, **run.to_json())
    train(run, directory, make_options(), cache, [listener], stop_after(2))
    first = recorded(directory)
    train(run, directory, make_options(), cache, [listen(directory, **run.to_json())])
    both = recorded(directory)
    assert (len(first), len(both)) == (1, 2)
    for content in both:
        for said in (b"a-project", b"the-sweep", b"a name", b"abcdef012345", b"loss/total", b"label_dropout"):
            assert said in content
    # The numbers are those of the run directory; what is measured at the end is there too, and the grid of samples.
    for row in rows(directory)[:2]:
        assert repr(row["loss/total"]).encode()[:10] in both[0]
    assert b"frechet:efficientnet_lite0@16/ode2" in both[1]
    assert list(directory.path.glob("wandb/offline-run-*/files/media/images/samples*.png"))
    with pytest.raises(BlockingIOError):
        server.accept()  # nobody tried to connect
    assert len(directory.rows()) == 6


def test_no_secret_stands_in_any_file_of_a_run(tmp_path, cache, server):
    run, directory = make_run(**OFF), RunDirectory(tmp_path / "by-id" / "abcdef012345")
    listener = listen(directory, **run.to_json())
    train(run, directory, make_options(), cache, [listener])
    assert recorded(directory)
    files = [path for path in directory.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"spec.json", "provenance.json", "state.json", "metrics.jsonl", "events.jsonl"}
    for path in files:
        content = path.read_bytes()
        for value in SECRETS.values():
            assert value.encode() not in content, path


def test_neither_the_machine_nor_the_command_is_told(tmp_path, server, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "the-name-of-this-machine")
    monkeypatch.setattr(sys, "argv", ["the-program", "--the-argument"])
    directory = RunDirectory(tmp_path / "abc")
    listener = listen(directory)
    listener.row({"step": 1, "images": 8, "loss/total": 0.5})
    listener.finish(State.DONE)
    (content,) = recorded(directory)
    assert b"loss/total" in content
    files = [path for path in directory.path.rglob("*") if path.is_file()]
    assert not {path.name for path in files} & {"wandb-metadata.json", "diff.patch", "output.log"}
    for path in files:
        for told in (b"the-name-of-this-machine", b"the-program", b"the-argument"):
            assert told not in path.read_bytes(), path


def test_a_run_that_is_finished_starts_no_wandb(tmp_path, cache, server):
    run, directory = make_run(**OFF), RunDirectory(tmp_path / "abc")
    train(run, directory, make_options(), cache, should_stop=stop_after(1, State.PRUNED))
    assert train(run, directory, make_options(), cache, [listen(directory)]) is State.PRUNED
    assert not (directory.path / "wandb").exists()


def test_every_run_of_a_process_has_its_own(tmp_path, server):
    # Else the rows of a run go to the run before it, if that was never finished.
    directories = [RunDirectory(tmp_path / name) for name in ("first", "second")]
    listeners = [listen(directory) for directory in directories]
    for listener, name in zip(listeners, ("of_first", "of_second"), strict=True):
        listener.row({"step": 1, "images": 8, name: 0.5})
    for listener in reversed(listeners):
        listener.finish(State.DONE)
    first, second = (recorded(directory)[0] for directory in directories)
    assert b"of_first" in first and b"of_second" not in first
    assert b"of_second" in second and b"of_first" not in second


def test_one_that_cannot_start_costs_no_row(tmp_path, server, monkeypatch):
    directory = RunDirectory(tmp_path / "abc")
    listener = WandbListener(directory, "n", "g", {}, "a/bad/project?name", "offline")
    with RunWriter(directory) as writer:
        journal = Journal(writer, [listener])
        for step in (1, 2):
            journal.row({"step": step, "images": step})
        journal.state(State.DONE, 2)
    assert [row["step"] for row in directory.rows()] == [1, 2]
    failed = [event for event in directory.events() if event["event"] == "listener-failed"]
    assert len(failed) == 1
    assert failed[0]["listener"] == "WandbListener"


@pytest.mark.parametrize(
    "mode, environment, resolved",
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_the_mode(monkeypatch, mode, environment, resolved):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(mode) == resolved
