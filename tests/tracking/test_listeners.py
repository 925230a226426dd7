from __future__ import annotations

import logging
from pathlib import Path

import pytest

from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.runs.files import Row
from repa_lab.tracking import Listeners
from repa_lab.training.evaluate import DivergedError
from repa_lab.training.loop import RunRecorder, train
from tests.training.conftest import OFF, cache, make_options, make_run, stop_after

__all__ = ["cache"]

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
        everyone = Listeners(writer, listeners)
        for row in ROWS:
            everyone.row(row)
        everyone.image(3, run.samples / "step-00000003.png")
        everyone.finish(State.DONE)


def test_all_listeners_hear_everything_in_order(run):
    first, second = Heard(), Heard()
    tell_everything(run, first, second)
    assert first.said == second.said == [*ROWS, (3, run.samples / "step-00000003.png"), State.DONE]


def test_a_row_is_written_before_a_listener_hears_it(run):
    kept: list[int] = []

    class Reading(Heard):
        def row(self, row: Row) -> None:
            kept.append(len(run.rows()))

    with RunWriter(run) as writer:
        RunRecorder(writer, Listeners(writer, [Reading(), Heard("row")])).rows(ROWS)
    assert kept == [1, 2, 3]
    assert run.rows() == ROWS


def test_training_tells_its_rows_and_its_end(run, cache):
    heard = Heard()
    train(make_run(**OFF), run, make_options(log_every=1), cache, [heard], stop_after(2, State.PRUNED))
    assert heard.said == [*run.rows(), State.PRUNED]
    assert len(run.rows()) == 2


def test_a_failure_is_an_end_too(run, cache):
    heard = Heard()
    with pytest.raises(DivergedError):
        train(make_run(**OFF, **{"train.lr": 1e30, "train.grad_clip": None}), run, make_options(), cache, [heard])
    assert heard.said[-1] is State.FAILED


@pytest.mark.parametrize("fails_at, heard", [("row", 0), ("image", 3), ("finish", 4)])
def test_a_listener_that_fails_costs_nothing_but_itself(run, fails_at, heard, caplog):
    failing, other = Heard(fails_at), Heard()
    with caplog.at_level(logging.WARNING):
        tell_everything(run, failing, other)
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
        Listeners(writer, [Interrupting()]).row(ROWS[0])
    assert run.events() == []
