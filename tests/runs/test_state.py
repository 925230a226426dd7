from __future__ import annotations

import json

import pytest

from repa_lab.runs import RunState, State


def test_only_done_and_pruned_are_final():
    assert {state for state in State if state.is_finished} == {State.DONE, State.PRUNED}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("step, error", [(0, None), (10**9, "ValueError: \n é")])
def test_states_survive_json(state, step, error):
    given = RunState(state, step, error)
    plain = json.loads(json.dumps(given.to_json()))
    assert plain == {"state": state.value, "step": step, "error": error}
    assert RunState.from_json(plain) == given


def test_a_state_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'finished' is not a valid State"):
        RunState.from_json({"state": "finished", "step": 0, "error": None})
