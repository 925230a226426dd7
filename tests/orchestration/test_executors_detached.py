"""Jobs that a cluster has, asked to stop by a file."""

import pytest

from repa_lab.orchestration.executors.detached import Shared, carry_out
from repa_lab.orchestration.jobs import Report, TrainJob
from repa_lab.runs import RunsRoot, State
from tests.training.conftest import OFF, make_options, make_run


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_was_stopped_while_it_waited_for_a_place_is_not_begun(tmp_path, audited, processes):
    root, run = RunsRoot(tmp_path), make_run(**OFF)
    shared = Shared.open(root, "group")
    shared.ask(run.run_id, State.PRUNED)
    with audited("subprocess.Popen") as started:
        job = TrainJob(run, "waiting", "group", make_options(gpus_per_run=processes), root)
        report = Report.from_json(carry_out(shared, shared.job(job)))
    assert (report.kind, report.run_id, report.state) == ("finished", run.run_id, State.PRUNED)
    assert started == [] and root.runs() == []
