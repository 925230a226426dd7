"""With the real W&B client and a server of our own."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace
from functools import partial

from repa_lab.report.statistics import headline
from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.runs.root import ComparisonRecord, TrackingRecord
from repa_lab.tracking import wandb as tracking
from repa_lab.tracking.wandb import History, WandbListener, WandbRecord, WandbRun, sync
from repa_lab.training.loop import train
from tests.training.conftest import OFF, cache, make_options, make_run, rows, stop_after

from .conftest import METRIC, ROWS, SPEC, TOLD, draw, numbers, record, without_none
from .server import KEY

__all__ = ["cache"]


def test_the_wandb_step_of_a_row_and_of_a_grid_depends_on_its_place_in_the_directory(run):
    history = History(run)
    with RunWriter(run) as writer:
        for row in ROWS[:2]:
            writer.row(row)
        assert [entry.step for entry in history.new_entries()] == [100, 200]
        writer.row(ROWS[2])
        two = draw(run, 2)
        assert [(entry.step, entry.grid) for entry in history.new_entries()] == [(201, None), (298, two)]
        assert list(history.new_entries()) == []
        draw(run, 3)  # from before a kill: its step has no row yet
        assert list(history.new_entries()) == []
        writer.row(ROWS[3])
    again = [(entry.step, entry.values) for entry in History(run).new_entries()]
    grids = [(298, {"step": 2, "images": 16}), (398, {"step": 3, "images": 24})]
    assert again == [(100, ROWS[0]), (200, ROWS[1]), (201, ROWS[2]), grids[0], (300, ROWS[3]), grids[1]]
    assert [entry.step for entry in history.new_entries()] == [300, 398]


def test_the_server_has_the_rows_grids_and_settings_of_a_run_its_headline_and_its_evaluations(run, server):
    compared = ComparisonRecord(metric=METRIC, targets={METRIC: [25.0, 10.0]})
    draw(run, 2)
    failures = record(
        run,
        ROWS,
        State.DONE,
        WandbListener(run, replace(TOLD, headline=partial(headline, compared))),
    )
    assert failures == []
    assert numbers(server, run) == without_none(ROWS)
    *_, table = server.history(run.run_id)
    (grid,) = [row for row in server.history(run.run_id) if "samples" in row]
    assert (grid["step"], grid["images"]) == (2, 16)
    assert server.files[grid["samples"]["path"]] == (run.samples / "step-00000002.png").read_bytes()
    assert (table["images"], table["evaluations"]["nrows"]) == (24, 2)
    assert json.loads(server.files[table["evaluations"]["path"]]) == {
        "columns": ["step", "images", "seconds", METRIC, "heldout/cka"],
        "data": [[2, 16, 0.2, 30.0, None], [3, 24, 0.3, 20.0, 0.25]],
    }
    found = server.summaries[run.run_id]
    assert {key: value for key, value in found.items() if key.startswith("headline/")} == {
        "headline/metric": METRIC,
        "headline/final": 20,
        "headline/best": 20,
        "headline/best_step": 3,
        "headline/steps_to/25": 2.5,
    }
    said = server.runs[run.run_id]
    assert {key: said[key] for key in ("entity", "project", "groupName", "displayName", "jobType", "tags")} == {
        **{"entity": "us", "project": "p", "groupName": "mine", "displayName": "arm, seed 3", "jobType": "train"},
        **{"tags": ["sit", "repa", "slow"]},
    }
    assert server.config(run.run_id) == SPEC
    assert list(server.artifacts) == [f"run-{run.run_id}-evaluations"]  # nobody asked for weights


def test_training_is_told_as_it_goes_and_a_resumed_run_continues_under_its_id(run, cache, server):
    trained = make_run(**OFF)
    train(trained, run, make_options(), cache, [WandbListener(run, TOLD)], stop_after(2))
    assert numbers(server, run) == without_none(run.rows())
    train(trained, run, make_options(), cache, [WandbListener(run, TOLD)])
    assert len(rows(run)) == 6 and numbers(server, run) == without_none(run.rows())
    assert [row["step"] for row in server.history(run.run_id) if "samples" in row] == list(run.sample_grids())
    assert server.config(run.run_id)["protocols"] == run.protocols
    assert len(server.sessions) == 2
    assert [event for event in run.events() if event["event"] == "listener-failed"] == []
    record = WandbRecord.read(run)
    assert record.covers(run) and record.count(run.rows()) == len(run.rows())


def test_a_run_that_goes_on_tells_what_its_numbers_depend_on_by_then(run, server):
    for start, images in enumerate((100, 200)):
        with RunWriter(run) as writer:
            writer.protocols({METRIC: {"real": images}})
        assert record(run, ROWS[start : start + 1], State.INTERRUPTED, WandbListener(run, TOLD)) == []
        assert server.config(run.run_id)["protocols"][METRIC]["real"] == images


def test_rows_that_are_measured_again_after_a_kill_are_there_once_and_none_is_missing(run, server):
    """The first process was killed after step 3; its checkpoint is of step 1, and it is resumed with other intervals."""
    draw(run, 2)
    record(run, ROWS, State.RUNNING, WandbListener(run, TOLD))
    with RunWriter(run) as writer:
        writer.rewind(1)
    assert list(run.sample_grids()) == []  # drawn again, with the rows of the step
    again = [{**row, "seconds": 9.0} for row in ROWS if METRIC in row]
    later = [{"step": step, "images": 8 * step, "loss/total": 0.1} for step in (4, 5)]
    record(run, again + later, State.INTERRUPTED, WandbListener(run, TOLD))
    assert numbers(server, run) == without_none([*ROWS, *later])


def test_what_a_run_has_from_another_run_is_told_first_and_once(run, server):
    with RunWriter(run) as writer:
        writer.replace_rows(ROWS[:2])
    record(run, ROWS[2:3], State.INTERRUPTED, WandbListener(run, TOLD))
    record(run, ROWS[3:], State.INTERRUPTED, WandbListener(run, TOLD))
    assert numbers(server, run) == without_none(ROWS)


def test_training_does_not_wait_for_a_server_that_is_slow_to_answer(run, server):
    server.answers.clear()
    listener = WandbListener(run, TOLD)
    with RunWriter(run) as writer:
        writer.describe(SPEC, {})
        for row in ROWS:
            writer.row(row)
            listener.row(row)  # would never return if it waited for the server
        writer.state(State.INTERRUPTED, 3)
        assert server.sessions == []
        server.answers.set()
        listener.finish(State.INTERRUPTED)
    assert numbers(server, run) == without_none(ROWS)


def test_a_server_that_never_answers_costs_no_row_and_is_an_event(run, server, monkeypatch):
    monkeypatch.setattr(tracking, "_START_S", 0.5)
    server.answers.clear()
    (failure,) = record(run, ROWS, State.DONE, WandbListener(run, TOLD))
    assert failure["listener"] == "WandbListener" and run.run_id in failure["error"]
    assert run.rows() == ROWS and WandbRecord.read(run) is None


def test_rows_that_the_server_refuses_are_not_taken_for_sent_though_the_client_ends_well(run, server, monkeypatch):
    monkeypatch.setattr(tracking, "_SETTLE_S", 0.0)
    server.refuses_rows = True
    (failure,) = record(run, ROWS, State.DONE, WandbListener(run, TOLD))
    assert "has not taken all rows" in failure["error"]
    assert WandbRecord.read(run).count(run.rows()) == 0
    assert list(run.path.glob("wandb/run-*/logs/*.log"))  # to find out why
    server.refuses_rows = False
    assert sync(run, TOLD).outcome == "synced"
    assert not (run.path / "wandb").exists()
    assert numbers(server, run) == without_none(ROWS)


def test_a_run_that_is_finished_starts_no_wandb(run, cache, server):
    trained = make_run(**OFF)
    train(trained, run, make_options(), cache, should_stop=stop_after(1, State.PRUNED))
    assert train(trained, run, make_options(), cache, [WandbListener(run, TOLD)]) is State.PRUNED
    assert not (run.path / "wandb").exists() and server.bodies == []


def test_every_run_of_a_process_has_its_own(tmp_path, server):
    # Else the rows of a run go to the run before it, if that was never finished.
    directories = [RunDirectory(tmp_path / name) for name in ("first", "second")]
    listeners = [WandbListener(directory, TOLD) for directory in directories]
    for listener, directory in zip(listeners, directories, strict=True):
        with RunWriter(directory) as writer:
            writer.describe(SPEC, {})
            writer.row({"step": 1, "images": 8, directory.run_id: 0.5})
        listener.row({})
    for listener in reversed(listeners):
        listener.finish(State.INTERRUPTED)
    assert server.history("first") == [{"step": 1, "images": 8, "first": 0.5}]
    assert server.history("second") == [{"step": 1, "images": 8, "second": 0.5}]


def test_final_weights_are_an_artifact_when_asked_for(run, cache, server):
    trained, told = make_run(**OFF), WandbRun(TrackingRecord(project="p", artifacts="final"))
    train(trained, run, make_options(), cache, [WandbListener(run, told)], stop_after(2))
    assert server.artifacts == {}
    train(trained, run, make_options(), cache, [WandbListener(run, told)])
    weights = server.artifacts[f"{run.run_id}-ema"]
    assert (weights["artifactTypeName"], json.loads(weights["metadata"])) == (
        "model",
        {"run_id": run.run_id, "step": 5},
    )
    assert (weights["state"], sorted(weights["files"])) == ("COMMITTED", ["ema.safetensors", "spec.json"])
    newest = run.checkpoints / "step-00000005" / "ema.safetensors"
    assert server.files[f"{run.run_id}-ema/ema.safetensors"] == newest.read_bytes()


def test_neither_secrets_nor_the_machine_nor_the_command_are_told_or_written(run, server, monkeypatch):
    monkeypatch.setattr(tracking, "_SETTLE_S", 0.0)
    secrets = {"HF_TOKEN": "hf_very_secret_token_of_this_test", "AWS_SECRET_ACCESS_KEY": "another-very-secret-value"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "the-name-of-this-machine")
    monkeypatch.setattr(sys, "argv", ["the-program", "--the-argument"])
    server.refuses_rows = True  # so that W&B's own files stay
    record(run, ROWS, State.DONE, WandbListener(run, TOLD))
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert not {path.name for path in files} & {"wandb-metadata.json", "diff.patch", "output.log"}
    told = {**{path.name: path.read_bytes() for path in files}, **dict(enumerate(server.bodies))}
    assert any(b"loss/total" in content for place, content in told.items() if isinstance(place, int))
    assert any(b"loss/total" in told[path.name] for path in files if path.suffix == ".wandb")
    for place, content in told.items():
        for kept in (KEY, *secrets.values(), "the-name-of-this-machine", "--the-argument"):
            assert kept.encode() not in content, place


def test_a_name_and_tags_that_are_too_long_for_wandb_are_shortened(run, server):
    with RunWriter(run) as writer:
        writer.describe({**SPEC, "regularizer": [{"type": "x" * 70}, {"type": "none"}]}, {})
    record(run, ROWS, State.DONE, WandbListener(run, WandbRun(TrackingRecord(), f"{'arm' * 50}, seed 3")))
    assert len(server.runs[run.run_id]["displayName"]) == 128
    assert server.runs[run.run_id]["displayName"].endswith("arm, seed 3")
    assert server.runs[run.run_id]["tags"] == ["sit", "x" * 64, "none"]


def test_what_is_told_lies_in_the_run_directory_alone(run, server):
    """A run directory that was copied to another machine is told there as here."""
    with RunWriter(run) as writer:
        writer.describe(SPEC, {})
        writer.replace_rows(ROWS)
        writer.state(State.DONE, 3)
    copy = RunDirectory(run.path.parents[1] / "elsewhere" / run.run_id)
    shutil.copytree(run.path, copy.path)
    assert sync(copy, TOLD).outcome == "synced"
    assert numbers(server, run) == without_none(ROWS)
    before = list(server.rows[run.run_id])
    assert sync(run, TOLD).outcome == "synced"  # from here nothing was sent yet, and nothing is missing there
    assert server.rows[run.run_id] == before
