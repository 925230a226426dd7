"""With the real W&B client, without a network."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import wandb

from repa_lab.report.statistics import headline
from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.runs.root import ComparisonRecord
from repa_lab.tracking import Listeners
from repa_lab.tracking.wandb import WandbListener, WandbRun, offline_folders, resolve_mode
from repa_lab.training.loop import train
from tests.training.conftest import OFF, cache, make_options, make_run, rows, stop_after

from .records import config, history, records, summary

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
    return WandbListener(run, WandbRun("a name", "the-sweep", config, "a-project", "offline"))


def recorded(run: RunDirectory) -> list[bytes]:
    """What W&B wrote for the run, one entry per start, oldest first."""
    wandb.teardown()  # waits for W&B's own process, which writes the files
    files = sorted(run.path.glob(f"wandb/offline-run-*-{run.run_id}*/run-{run.run_id}.wandb"))
    return [path.read_bytes() for path in files]


def models(run: RunDirectory) -> list:
    """The artifacts of weights that W&B was given."""
    given = [record.request.log_artifact.artifact for record in records(run) if record.request.HasField("log_artifact")]
    given += [record.artifact for record in records(run) if record.HasField("artifact")]
    return [artifact for artifact in given if artifact.type == "model"]


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
    assert models(directory) == []  # nobody asked for them


def test_no_secret_stands_in_any_file_of_a_run(tmp_path, cache, server):
    run, directory = make_run(**OFF), RunDirectory(tmp_path / "by-id" / "abcdef012345")
    listener = listen(directory, **run.to_json())
    train(run, directory, make_options(), cache, [listener])
    assert recorded(directory)
    files = [path for path in directory.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "spec.json",
        "provenance.json",
        "state.json",
        "metrics.jsonl",
        "events.jsonl",
    }
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
    listener = WandbListener(directory, WandbRun("n", "g", {}, "a/bad/project?name", "offline"))
    with RunWriter(directory) as writer:
        listeners = Listeners(writer, [listener])
        for step in (1, 2):
            writer.row({"step": step, "images": step})
            listeners.row({"step": step, "images": step})
        listeners.finish(State.DONE)
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


ROWS = [
    {"step": 1, "images": 8, "seconds": 0.1, "loss/total": 0.5},
    {"step": 2, "images": 16, "seconds": 0.2, "loss/total": None},
    {"step": 2, "images": 16, "seconds": 0.2, "fid:inception@16/ode2": 30.0, "heldout/cka": None},
    {"step": 3, "images": 24, "seconds": 0.3, "fid:inception@16/ode2": 20.0, "heldout/cka": 0.25},
]


def tell(directory: RunDirectory, told: WandbRun, rows: list[dict], state: State = State.DONE) -> None:
    with RunWriter(directory) as writer:
        writer.describe({"seed": 0}, {})
        listeners = Listeners(writer, [WandbListener(directory, told)])
        for row in rows:
            writer.row(row)
            listeners.row(row)
        writer.state(state, rows[-1]["step"])
        listeners.finish(state)
    assert [event for event in directory.events() if event["event"] == "listener-failed"] == []


def test_a_run_is_described_by_nested_settings_its_sweep_and_its_tags(tmp_path, server):
    directory = RunDirectory(tmp_path / "abc")
    settings = {"train": {"lr": 0.1, "ema": None}, "seed": 3}
    tell(directory, WandbRun("arm, seed 3", "mine", settings, "p", "offline", "a-team", ("sit", "repa")), ROWS)
    (described,) = [record for record in records(directory) if record.HasField("run")]
    run = described.run
    assert (run.run_id, run.display_name, run.run_group, run.job_type) == ("abc", "arm, seed 3", "mine", "train")
    assert (run.project, run.entity, list(run.tags)) == ("p", "a-team", ["sit", "repa"])
    assert config(described) == {**settings, "protocols": {}}


def test_its_config_says_what_the_runs_numbers_depend_on(tmp_path, cache, server):
    run, directory = make_run(**OFF), RunDirectory(tmp_path / "abc")
    train(run, directory, make_options(), cache, [listen(directory, **run.to_json())])
    (described,) = [record for record in records(directory) if record.HasField("run")]
    told = config(described)
    assert {name: told[name] for name in run.to_json()} == run.to_json()
    assert told["protocols"] == directory.protocols
    measured = {name for row in directory.rows() for name in row if "@" in name or name.startswith("heldout/")}
    assert measured and measured <= told["protocols"].keys()
    assert told["protocols"]["frechet:efficientnet_lite0@16/ode2"]["samples"] == 16


def test_a_run_that_goes_on_tells_what_its_numbers_depend_on_by_then(tmp_path, server):
    directory = RunDirectory(tmp_path / "abc")
    for start, images in enumerate((100, 200)):
        with RunWriter(directory) as writer:
            writer.protocols({"fid:inception@16/ode2": {"real": images}})
        tell(directory, WandbRun("a", "b", {"seed": 3}, "p", "offline"), ROWS[start : start + 1], State.INTERRUPTED)
    told = [config(record)["protocols"] for record in records(directory) if record.HasField("run")]
    assert [one["fid:inception@16/ode2"]["real"] for one in told] == [100, 200]


def test_the_curves_are_the_run_directorys_and_the_summary_has_its_headline(tmp_path, server):
    directory = RunDirectory(tmp_path / "abc")
    compared = ComparisonRecord(metric="fid:inception@16/ode2", targets={"fid:inception@16/ode2": [25.0, 10.0]})
    told = WandbRun("a", "b", {}, "p", "offline", headline=partial(headline, compared))
    tell(directory, told, ROWS)
    rows, table = history(directory)[:-1], history(directory)[-1]
    assert rows == [{key: value for key, value in row.items() if value is not None} for row in directory.rows()]
    found = summary(directory)
    assert {key: value for key, value in found.items() if key.startswith("headline/")} == {
        "headline/metric": "fid:inception@16/ode2",
        "headline/final": 20,
        "headline/best": 20,
        "headline/best_step": 3,
        "headline/steps_to/25": 2.5,
    }
    assert (table["images"], table["evaluations/_type"], table["evaluations/nrows"]) == (24, "table-file", 2)
    (path,) = directory.path.glob("wandb/offline-run-*/files/media/table/evaluations*.json")
    assert json.loads(path.read_text()) == {
        "columns": ["step", "images", "seconds", "fid:inception@16/ode2", "heldout/cka"],
        "data": [[2, 16, 0.2, 30.0, None], [3, 24, 0.3, 20.0, 0.25]],
    }


def test_what_a_run_has_from_another_run_is_told_first_and_once(tmp_path, server):
    directory = RunDirectory(tmp_path / "abc")
    with RunWriter(directory) as writer:
        writer.replace_rows(ROWS[:2])
    told = WandbRun("a", "b", {}, "p", "offline")
    tell(directory, told, ROWS[2:3], State.INTERRUPTED)
    tell(directory, told, ROWS[3:], State.INTERRUPTED)
    assert [row["step"] for row in history(directory)] == [1, 2, 2, 3]
    assert len(offline_folders(directory)) == 2


def test_final_weights_are_an_artifact_when_asked_for(tmp_path, cache, server):
    run, directory = make_run(**OFF), RunDirectory(tmp_path / "abc")
    told = WandbRun("a", "b", run.to_json(), "p", "offline", keeps_weights=True)
    train(run, directory, make_options(), cache, [WandbListener(directory, told)], stop_after(2))
    assert models(directory) == []
    train(run, directory, make_options(), cache, [WandbListener(directory, told)])
    (artifact,) = models(directory)
    assert (artifact.name, json.loads(artifact.metadata)) == ("abc-ema", {"run_id": "abc", "step": 5})
    kept = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    weights = directory.checkpoints / "step-00000005" / "ema.safetensors"
    assert kept == {"ema.safetensors": str(weights), "spec.json": str(directory.path / "spec.json")}
