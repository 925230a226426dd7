from __future__ import annotations

import json

import pytest

from repa_lab.runs import RunDirectory, RunState, RunStatus, RunWriter, State, checkpoints


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


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("step, error, is_diverged", [(0, None, False), (10**9, "ValueError: \n é", True)])
def test_states_survive_json(state, step, error, is_diverged):
    given = RunState(state, step, error, is_diverged)
    plain = json.loads(json.dumps(given.to_json()))
    assert plain == {"state": state.value, "step": step, "error": error, "is_diverged": is_diverged}
    assert RunState.from_json(plain) == given


def test_a_state_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'finished' is not a valid State"):
        RunState.from_json({"state": "finished", "step": 0, "error": None})
