"""Worker processes by themselves, spoken to as the scheduler does."""

import os
import signal
from pathlib import Path

import pytest

from repa_lab.orchestration.executors.local import LocalExecutor
from repa_lab.orchestration.scheduler import MessageKind, Task, TrainJob
from repa_lab.runs import RunsRoot, State
from tests.faults.processes import parent_of, wait_until
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


class TestWorkersAreForked:
    """From one server, which serves the sweeps of a process one after the other."""

    def start(self, folder, count=1):
        executor = LocalExecutor([None] * count, folder / "log")
        return executor, [slot.processes[0].pid for slot in executor._slots]

    def test_from_a_server_that_has_imported_the_libraries_once_and_has_one_thread(self, tmp_path):
        parents = set()
        for _ in range(2):
            executor, pids = self.start(tmp_path, 2)
            parents |= set(map(parent_of, pids))
            executor.close()
            wait_until(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        (server,) = parents
        assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
        assert "libtorch" in Path(f"/proc/{server}/maps").read_text()

    def test_no_temporary_file_is_shared_which_the_first_worker_to_end_would_delete(self, tmp_path, monkeypatch):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(temporary))
        executor, (pid,) = self.start(tmp_path)
        try:
            assert b"TMPDIR=" + bytes(temporary) in Path(f"/proc/{parent_of(pid)}/environ").read_bytes()
            assert list(temporary.iterdir()) == []
        finally:
            executor.close()

    def test_a_worker_has_no_pipe_or_log_but_its_own(self, tmp_path):
        """A worker that held another's input would keep it alive when the scheduler is gone."""
        executor, pids = self.start(tmp_path, 2)
        try:
            pipes = [{str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()} for pid in pids]
            first, second = ({name for name in names if name.startswith("pipe:")} for names in pipes)
            assert first and second and not first & second
            assert not [name for names in pipes for name in names if name.startswith("socket:")]
        finally:
            executor.close()

    def test_a_slot_whose_worker_and_server_were_killed_comes_back(self, tmp_path):
        executor, (pid,) = self.start(tmp_path)
        try:
            for victim in (parent_of(pid), pid):
                os.kill(victim, signal.SIGKILL)
            wait_until(lambda: not executor.poll(0.1) and not executor._slots[0].processes)
            run = make_run(**{"train.steps": 1, "evaluate.every": 1, **OFF})
            executor.submit(TrainJob(Task(run, "next"), "group", make_options(), RunsRoot(tmp_path)))
            told = []
            wait_until(lambda: told.extend(executor.poll(0.1)) or told)
            assert [(message.kind, message.state) for message in told] == [(MessageKind.FINISHED, State.DONE)]
            assert executor._slots[0].processes[0].pid != pid
        finally:
            executor.close()
