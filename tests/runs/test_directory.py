from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from repa_lab.runs import RunDirectory, RunState, RunStatus, RunWriter, State, checkpoints
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.files import DamagedFileError, FormatError, LinkError


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "by-id" / "0123456789ab")


@contextmanager
def other_process(run: RunDirectory, then: str = "signal.pause()") -> Iterator[subprocess.Popen]:
    """Another process that holds the run; what it does then is given."""
    code = textwrap.dedent(f"""
        import os, signal, sys, time
        from pathlib import Path
        from repa_lab.runs import RunDirectory, RunWriter
        with RunWriter(RunDirectory(Path({str(run.path)!r}))) as writer:
            print("holding", flush=True)
            {then}
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class TestReading:
    def test_a_run_that_never_was(self, run):
        assert run.run_id == "0123456789ab"
        assert run.state == RunState(State.NEW)
        assert (run.rows(), run.events(), run.sample_grids()) == ([], [], {})
        assert not run.path.exists()

    def test_sample_grids_by_step(self, run):
        run.samples.mkdir(parents=True)
        for step in (100, 20, 12345678):
            (run.samples / f"step-{step:08d}.png").touch()
        for odd in (
            "other.png",
            "step-00000100 (1).png",
            "step-00000100.png.part",
            "step-100.png",
            "step-00000100-old.png",
        ):
            (run.samples / odd).touch()
        assert run.sample_grids() == {step: run.samples / f"step-{step:08d}.png" for step in (20, 100, 12345678)}

    @pytest.mark.parametrize(
        "content",
        [
            "{broken",
            "[]",
            "3",
            '{"format": 1, "fid:inception@16/ode2": 3}',
            '{"format": 1, "fid:x@1/ode2": "abc"}',
            "\x00",
        ],
    )
    def test_damaged_protocols_say_what_to_do(self, run, content):
        with RunWriter(run) as writer:
            writer.protocols({"fid:inception@16/ode2": {"real": 10}})
            assert run.protocols == {"fid:inception@16/ode2": {"real": 10}}
            (run.path / "protocols.json").write_text(content)
            with pytest.raises(
                DamagedFileError, match=r"protocols.json' is damaged; delete it, and it is written again when the run"
            ):
                writer.protocols({})

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "state": "lost", "step": 3, "error": null}', "null"]
    )
    def test_a_damaged_state_says_what_to_do(self, run, content):
        with RunWriter(run) as writer:
            writer.state(State.RUNNING, 3)
        (run.path / "state.json").write_text(content)
        with pytest.raises(
            DamagedFileError, match=r"state.json' is damaged; delete it, and the run continues from its last"
        ):
            _ = run.state
        (run.path / "state.json").unlink()
        assert run.state == RunState(State.NEW)

    def test_a_run_of_another_format_is_refused_in_one_line(self, run):
        run.path.mkdir(parents=True)
        for name in ("spec", "provenance", "profile", "state", "protocols"):
            (run.path / f"{name}.json").write_text('{"state": "done", "step": 3, "error": null}')
            with pytest.raises(FormatError, match=rf"^'{run.path}/{name}.json' has no format number: this version of"):
                getattr(run, name)
        for name in ("rows", "events"):
            file = {"rows": "metrics", "events": "events"}[name]
            (run.path / f"{file}.jsonl").write_text('{"step": 3}\n')
            with pytest.raises(FormatError, match=rf"^'{run.path}/{file}.jsonl' has no format number: this version of"):
                getattr(run, name)()


class TestWriting:
    def test_what_is_written_is_read(self, run, monkeypatch):
        monkeypatch.setattr(time, "time", lambda: 1_800_000_000.12345)
        with RunWriter(run) as writer:
            writer.describe({"seed": 1, "train": {"lr": 1e-4}}, {"python": "3"})
            writer.row({"loss": 0.5, "step": 10})
            writer.event("started", host="x")
            writer.state(State.RUNNING, 10)
        assert run.spec == {"seed": 1, "train": {"lr": 1e-4}}
        assert run.provenance == {"python": "3"}
        assert run.rows() == [{"step": 10, "loss": 0.5}]
        assert list(run.rows()[0]) == ["step", "loss"]
        assert [(event["event"], event.get("host"), event.get("step")) for event in run.events()] == [
            ("started", "x", None),
            ("running", None, 10),
        ]
        assert run.events()[0]["time"] == 1_800_000_000.123
        assert run.state == RunState(State.RUNNING, 10)

    def test_a_row_without_a_step_is_refused(self, run):
        with RunWriter(run) as writer, pytest.raises(KeyError, match="step"):
            writer.row({"loss": 0.5})
        assert run.rows() == []

    def test_a_run_is_described_once(self, run):
        with RunWriter(run) as writer:
            writer.describe({"seed": 1}, {"git": "first"})
            writer.describe({"seed": 2}, {"git": "second"})
        assert (run.spec, run.provenance) == ({"seed": 1}, {"git": "first"})

    def test_a_description_cut_short_is_written_anew(self, run):
        with RunWriter(run) as writer:
            writer.describe({"seed": 1}, {"git": "first"})
            (run.path / "spec.json").unlink()
            writer.describe({"seed": 1}, {"git": "second"})
        assert (run.spec, run.provenance) == ({"seed": 1}, {"git": "second"})

    @pytest.mark.parametrize("state", list(State))
    def test_states_come_back(self, run, state):
        error = "ValueError: é" if state is State.FAILED else None
        with RunWriter(run) as writer:
            writer.state(state, 42, error)
        assert run.state == RunState(state, 42, error)
        assert run.events()[-1].get("error") == error


class TestTornTails:
    def test_a_row_after_a_torn_one_stands_on_its_own(self, run):
        with RunWriter(run) as writer:
            writer.row({"step": 1})
            writer.event("started")
        for name in ("metrics.jsonl", "events.jsonl"):
            with (run.path / name).open("ab") as file:
                file.write('{"step": 2, "note": "é'.encode()[:-1])
        assert run.rows() == [{"step": 1}]
        with RunWriter(run) as writer:
            writer.row({"step": 2, "again": True})
            writer.event("resumed")
        assert run.rows() == [{"step": 1}, {"step": 2, "again": True}]
        assert [event["event"] for event in run.events()] == ["started", "resumed"]

    def test_rows_of_a_killed_process_are_all_there(self, run):
        then = "[writer.row({'step': step}) for step in range(200)]; os.kill(os.getpid(), signal.SIGKILL)"
        with other_process(run, then) as process:
            assert process.wait() == -9
        assert [row["step"] for row in run.rows()] == list(range(200))


class TestRewind:
    ROWS = [{"step": step, "loss": step / 7} for step in (0, 10, 20, 20, 30, 40)]  # noqa: RUF012

    @pytest.mark.parametrize("step, kept", [(-1, 0), (0, 1), (19, 2), (20, 4), (25, 4), (40, 6), (99, 6)])
    def test_it_drops_exactly_the_later_rows(self, run, step, kept):
        with RunWriter(run) as writer:
            for row in self.ROWS:
                writer.row(row)
            writer.rewind(step)
            assert run.rows() == self.ROWS[:kept]
            events = [event for event in run.events() if event["event"] == "rewound"]
            if kept == len(self.ROWS):
                assert events == []
            else:
                assert [(e["step"], e["rows_dropped"]) for e in events] == [(step, len(self.ROWS) - kept)]
            writer.row({"step": 50})
        assert run.rows() == [*self.ROWS[:kept], {"step": 50}]

    def test_a_run_without_rows_can_be_rewound(self, run):
        with RunWriter(run) as writer:
            writer.rewind(0)
        assert (run.rows(), run.events()) == ([], [])


class TestTheLock:
    def test_a_second_process_is_kept_out_and_let_in_after(self, run):
        with other_process(run, "sys.stdin.readline()") as process:
            with pytest.raises(RunBusyError, match="run 0123456789ab is being trained by another process"):
                RunWriter(run, patience_s=0.1).__enter__()
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait() == 0
            with RunWriter(run, patience_s=0.1) as writer:
                writer.event("in")
        assert [event["event"] for event in run.events()] == ["in"]

    def test_a_killed_holder_lets_go(self, run):
        with other_process(run) as process:
            process.kill()
            process.wait()
            with RunWriter(run, patience_s=0.1) as writer:
                writer.event("in")
        assert [event["event"] for event in run.events()] == ["in"]

    def test_it_waits_for_as_long_as_it_is_told(self, run):
        with other_process(run, "time.sleep(0.5)"), RunWriter(run, patience_s=3600) as writer:
            writer.event("in")
        assert [event["event"] for event in run.events()] == ["in"]

    def test_two_writers_of_one_process_are_kept_apart_too(self, run):
        with RunWriter(run), pytest.raises(RunBusyError):
            RunWriter(run, patience_s=0.1).__enter__()

    def test_an_error_inside_lets_go(self, run):
        with pytest.raises(ZeroDivisionError), RunWriter(run):
            raise ZeroDivisionError
        with RunWriter(run, patience_s=0.1):
            pass

    def test_other_runs_are_not_held(self, run):
        with RunWriter(run), RunWriter(RunDirectory(run.path.with_name("another")), patience_s=0.1):
            pass

    def test_readers_are_not_kept_out(self, run):
        with RunWriter(run) as writer:
            writer.row({"step": 1})
            assert run.rows() == [{"step": 1}]


def test_only_done_and_pruned_are_final():
    assert {status for status in RunStatus if status.is_final} == {RunStatus.DONE, RunStatus.PRUNED}


@pytest.mark.parametrize(
    ("recorded", "checkpoint", "plain", "ruled", "held"),
    [
        (None, 0, "new", "new", "running"),
        (State.NEW, 0, "new", "new", "running"),
        (State.NEW, 4, "resumable", "resumable", "running"),  # `repa-lab retry`, or a fork that was taken
        (State.RUNNING, 0, "resumable", "resumable", "running"),  # killed
        (State.INTERRUPTED, 4, "resumable", "resumable", "running"),
        (State.FAILED, 4, "failed", "failed", "running"),
        (State.STOPPED, 4, "stopped", "resumable", "running"),  # goes on in a sweep without the rule
        (State.PRUNED, 4, "pruned", "pruned", "pruned"),
        (State.DONE, 4, "done", "done", "done"),
    ],
)
def test_a_status_is_read_from_record_lock_and_checkpoints(tmp_path, recorded, checkpoint, plain, ruled, held):
    run = RunDirectory(tmp_path)
    with RunWriter(run) as writer:
        if recorded:
            writer.state(recorded, 4)
    if checkpoint:
        checkpoints.commit(run.checkpoints, checkpoint, lambda folder: None)
    assert (run.status(), run.status(rules=[])) == (plain, ruled)
    with RunWriter(run) as writer:
        assert run.status() == held
        writer.row({"step": 4, "fid": 3.0})
    assert run.status([lambda row: row.get("fid", 9.0) < 1]) == ruled
    assert run.status([lambda row: row.get("fid", 9.0) < 4]) == (
        ruled if recorded and recorded.status.is_final else "stopped"
    )


def test_plugins_are_copied_byte_for_byte(run, tmp_path):
    content = b"# -*- coding: latin-1 -*-\r\nNAME = '\xe9'\r\n"
    (tmp_path / "mine.py").write_bytes(content)
    with RunWriter(run) as writer:
        writer.plugins([tmp_path / "mine.py"])
    assert (run.path / "plugins" / "mine.py").read_bytes() == content


@pytest.mark.parametrize("name", ["checkpoints", "forks", "samples", "metrics.jsonl", "events.jsonl", "wandb"])
def test_nothing_is_written_to_a_run_whose_part_lies_behind_a_link(run, tmp_path, name):
    with RunWriter(run) as writer:
        writer.describe({"seed": 0}, {})
    (tmp_path / "disk").mkdir()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "disk")
    with pytest.raises(LinkError, match=f"0123456789ab/{name}' is a link to '{tmp_path}/disk', and nothing behind a"):
        RunWriter(run)


def test_starting_over_leaves_what_is_not_ours(run):
    with RunWriter(run) as writer:
        for folder in (run.checkpoints, run.samples):
            folder.mkdir()
        ours = [run.samples / "step-00000010.png", run.profile_file, run.profile_picture(), run.profile_picture(run)]
        theirs = [run.samples / "best.png", run.path / "profile-notes.md", run.checkpoints / "step-10.bak"]
        for path in (*ours, *theirs):
            path.write_text("x")
        assert writer.start_over() == [theirs[-1]]
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
