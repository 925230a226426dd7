"""Jobs that a cluster has, asked to stop by a file."""

import os

import pytest

from repa_lab.orchestration.executors.detached import SharedFolder, carry_out
from repa_lab.orchestration.scheduler import MessageKind, Task, TrainJob
from repa_lab.runs import RunsRoot, State
from tests.training.conftest import OFF, make_options, make_run


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_was_stopped_while_it_waited_for_a_place_is_not_begun(tmp_path, audited, monkeypatch, processes):
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_JOB_ID"):  # of the shell that submitted the job
        monkeypatch.setenv(name, "4")
    root, run = RunsRoot(tmp_path), make_run(**OFF)
    shared = SharedFolder.open(root, "group")
    shared.stop_file(run.run_id).write_text(State.PRUNED)
    with audited("subprocess.Popen") as started:
        job = TrainJob(Task(run, "waiting"), "group", make_options(gpus_per_run=processes), root)
        message = carry_out(shared, shared.pack(job))
    assert (message.kind, message.job, message.state) == (MessageKind.FINISHED, run.run_id, State.PRUNED)
    assert started == [] and root.runs() == []
    left = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_JOB_ID"} & set(os.environ)
    assert left == {"SLURM_JOB_ID"}  # submitit queues a preempted job again by it
