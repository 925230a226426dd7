"""Worker processes by themselves, spoken to as the scheduler does."""

import pytest

from repa_lab.orchestration.executors import MessageKind, Task, TrainJob
from repa_lab.orchestration.executors.local import LocalExecutor
from repa_lab.runs import RunsRoot, State
from tests.training.conftest import OFF, make_options, make_run

STEPS = 2000


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_asked_of_a_run_before_its_worker_has_come_up_is_heeded(tmp_path, processes):
    root, run = RunsRoot(tmp_path), make_run(**{"train.steps": STEPS, "evaluate.every": STEPS, **OFF})
    executor = LocalExecutor([None], tmp_path / "log", processes)
    try:
        executor.submit(TrainJob(Task(run, "long"), "group", make_options(), root))
        executor.stop(run.run_id, State.PRUNED)
        messages = []
        while not any(message.kind is MessageKind.FINISHED for message in messages):
            messages += executor.poll(1)
    finally:
        executor.close()
    assert messages[-1].state is State.PRUNED
    found = root.run(run.run_id).state
    assert found.state is State.PRUNED and found.step < STEPS
