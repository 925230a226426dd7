"""A process that variables of a launcher make one of several, whether or not a launcher started it."""

import os
import subprocess
import sys

import pytest

from repa_lab.orchestration.executors import launcher_variables
from repa_lab.orchestration.executors.local import _free_port

JOIN = (
    "from repa_lab.orchestration.executors import LauncherError, join_processes; from repa_lab.spec import RunOptions\n"
    "try: join_processes(RunOptions(device='cpu'))\n"
    "except LauncherError as error: raise SystemExit(str(error))\n"
    "print('joined')"
)


def start(**variables):
    environment = {name: value for name, value in os.environ.items() if name not in launcher_variables(os.environ)}
    command, pipes = [sys.executable, "-c", JOIN], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**environment, **variables}, **pipes)


def test_a_process_that_waits_for_others_says_why_and_goes_on_when_they_come():
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    first = start(**shared, RANK="0", LOCAL_RANK="0")
    try:
        names = "WORLD_SIZE, MASTER_ADDR, RANK, LOCAL_RANK"
        assert first.stderr.readline() == f"{names} make this process 0 of 2; unset them to train in one process\n"
        assert first.stderr.readline() == f"process 0 of 2 waits for the others ({names})\n"
        second = start(**shared, RANK="1", LOCAL_RANK="1")
        assert [process.communicate()[0] for process in (second, first)] == ["joined\n", "joined\n"]
    finally:
        first.kill()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            "Tried to launch on distributed with multinode, but `MASTER_ADDR` env was not set, please try exporting rank "
            "0's hostname as `MASTER_ADDR`; unset OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK to train in one process\n",
        ),
        (
            {"WORLD_SIZE": "two"},
            "invalid literal for int() with base 10: 'two'; unset WORLD_SIZE to train in one process\n",
        ),
    ],
    ids=["MPI", "no number"],
)
def test_variables_that_lead_nowhere_are_one_line(variables, reason):
    process = start(**variables)
    assert (process.communicate()[1], process.returncode) == (reason, 1)
