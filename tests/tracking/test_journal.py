from __future__ import annotations

import logging
from pathlib import Path

import pytest

from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.runs.files import Row
from repa_lab.tracking import Journal

ROWS: list[Row] = [{"step": step, "images": 8 * step, "loss/total": 1 / step} for step in (1, 2, 3)]


class Heard:
    """Writes down what it hears, and raises where it is told to."""

    def __init__(self, fails_at: str = "") -> None:
        self.said: list[object] = []
        self._fails_at = fails_at

    def _note(self, kind: str, value: object) -> None:
        if kind == self._fails_at:
            raise ConnectionError("the server is gone")
        self.said.append(value)

    def row(self, row: Row) -> None:
        self._note("row", row)

    def image(self, step: int, path: Path) -> None:
        self._note("image", (step, path))

    def finish(self, state: State) -> None:
        self._note("finish", state)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "abc")


def tell_everything(run: RunDirectory, *listeners: Heard) -> None:
    with RunWriter(run) as writer:
        journal = Journal(writer, listeners)
        journal.state(State.RUNNING, 0)
        for row in ROWS:
            journal.row(row)
        journal.image(3, run.samples / "step-00000003.png")
        journal.state(State.DONE, 3)


def test_listeners_hear_what_the_directory_keeps(run):
    first, second = Heard(), Heard()
    tell_everything(run, first, second)
    assert run.rows() == ROWS
    assert first.said == second.said == [*ROWS, (3, run.samples / "step-00000003.png"), State.DONE]
    assert (run.state.state, run.state.step) == (State.DONE, 3)


def test_the_directory_is_written_before_a_listener_hears(run):
    kept: list[int] = []

    class Reading(Heard):
        def row(self, row: Row) -> None:
            kept.append(len(run.rows()))

    tell_everything(run, Reading())
    assert kept == [1, 2, 3]


@pytest.mark.parametrize("fails_at, heard", [("row", 0), ("image", 3), ("finish", 4)])
def test_a_listener_that_fails_costs_nothing_but_itself(run, fails_at, heard, caplog):
    failing, other = Heard(fails_at), Heard()
    with caplog.at_level(logging.WARNING):
        tell_everything(run, failing, other)
    assert run.rows() == ROWS
    assert run.state.state is State.DONE
    assert len(failing.said) == heard  # and nothing after
    assert len(other.said) == 5
    events = [event for event in run.events() if event["event"] == "listener-failed"]
    assert [(event["listener"], event["error"]) for event in events] == [
        ("Heard", "ConnectionError: the server is gone")
    ]
    assert "stopped listening" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_failure_of_a_listener(run, error):
    class Interrupting(Heard):
        def row(self, row: Row) -> None:
            raise error

    with RunWriter(run) as writer, pytest.raises(error):
        Journal(writer, [Interrupting()]).row(ROWS[0])
    assert run.rows() == ROWS[:1]


@pytest.mark.parametrize("state", [state for state in State if state not in (State.NEW, State.RUNNING)])
def test_coming_to_rest_ends_the_listeners(run, state):
    listener = Heard()
    with RunWriter(run) as writer:
        Journal(writer, [listener]).state(state, 2, "because")
    assert listener.said == [state]
    assert (run.state.state, run.state.step, run.state.error) == (state, 2, "because")
    assert [(event["event"], event["error"]) for event in run.events()] == [(state.value, "because")]
