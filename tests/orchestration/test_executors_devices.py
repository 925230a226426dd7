"""Which GPUs there are and which a worker sees: what a machine would say is given as files, the workers are real."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from repa_lab.orchestration.executors import launcher_variables
from repa_lab.orchestration.executors.local import (
    LocalExecutor,
    assign,
    local_slots,
    visible_gpus,
)
from repa_lab.orchestration.scheduler import ExecutorError, Task, TrainJob
from repa_lab.registry import drop_plugins, load_plugins
from repa_lab.runs import RunsRoot
from repa_lab.spec import RunOptions, SpecError
from tests.faults.processes import wait_until
from tests.training.conftest import make_options, make_run

LISTED = "GPU 0: NVIDIA A100 (UUID: GPU-aa)\nGPU 1: NVIDIA A100 (UUID: GPU-bb)\n"
SPLIT = (
    "GPU 0: NVIDIA A100 (UUID: GPU-aa)\n  MIG 3g.20gb     Device  0: (UUID: MIG-11)\n  MIG 3g.20gb     Device  1: (UUID: MIG-22)\n"
    "GPU 1: NVIDIA A100 (UUID: GPU-bb)\n"
)


@pytest.fixture
def machine(tmp_path):
    """An environment whose driver's tool answers so, or has none; and a /dev of two GPUs."""

    def make(answer: str | None = None, status: int = 0, **environment: str) -> tuple[dict[str, str], Path]:
        tools, dev = tmp_path / "bin", tmp_path / "dev"
        tools.mkdir(), dev.mkdir()
        for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
            (dev / name).touch()
        if answer is not None:
            tool = tools / "nvidia-smi"
            tool.write_text(
                f"#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ['-L']\nprint({answer!r}, end='')\nsys.exit({status})\n"
            )
            tool.chmod(0o755)
        return {"PATH": str(tools), **environment}, dev

    return make


class TestWhatThereIs:
    def test_the_environment_limits_it(self, machine):
        assert visible_gpus(*machine(LISTED, CUDA_VISIBLE_DEVICES="3, GPU-cc")) == ("3", "GPU-cc")

    @pytest.mark.parametrize("none", ["", "-1"])
    def test_the_environment_may_leave_none(self, machine, none):
        assert visible_gpus(*machine(LISTED, CUDA_VISIBLE_DEVICES=none)) == ()

    def test_the_driver_lists_it(self, machine):
        assert visible_gpus(*machine(LISTED)) == ("0", "1")

    def test_of_a_split_gpu_the_parts_are_listed(self, machine):
        assert visible_gpus(*machine(SPLIT)) == ("MIG-11", "MIG-22", "1")

    def test_a_driver_without_gpus_is_believed(self, machine):
        assert visible_gpus(*machine("No devices found.\n")) == ()

    @pytest.mark.parametrize("driver", [(None, 0), ("", 9)], ids=["absent", "broken"])
    def test_without_a_driver_that_answers_devices_are_counted(self, machine, driver):
        assert visible_gpus(*machine(*driver)) == ("0", "1", "10")


class TestSlots:
    @pytest.mark.parametrize(
        ("gpus", "per_run", "per_gpu", "workers", "slots"),
        [
            ("0123", 1, 1, None, ["0", "1", "2", "3"]),
            ("01", 1, 2, None, ["0", "1", "0", "1"]),
            ("0123", 2, 1, None, ["0,1", "2,3"]),
            ("01234", 2, 2, None, ["0,1", "2,3", "0,1", "2,3"]),
            ("0123", 1, 1, 2, ["0", "1"]),
            ("01", 1, 1, 3, ["0", "1", "0"]),
        ],
    )
    def test_are_spread_over_the_gpus(self, gpus, per_run, per_gpu, workers, slots):
        assert assign(tuple(gpus), per_run, per_gpu, workers) == slots

    def test_a_run_cannot_have_more_gpus_than_there_are(self):
        with pytest.raises(ExecutorError, match="a run shall have 4 GPUs, and this machine has 2"):
            assign(("0", "1"), 4, 1, None)

    def test_options_decide(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        assert local_slots(RunOptions(), None, None) == ["4", "7"]
        assert local_slots(RunOptions(slots_per_gpu=2), 3, None) == ["4", "7", "4"]
        assert local_slots(RunOptions(slots_per_gpu=2), None, 1) == ["4"]
        assert local_slots(RunOptions(device="cpu"), 1, None) == [None]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert local_slots(RunOptions(), None, 3) == [None] * 3


PLUGIN = """
import json, os, time
from pathlib import Path
from repa_lab.plugins import Loss, Needs, Regularizer, regularizer

if os.getpid() != TEST:
    mine = Path(__file__).with_name(f"{os.getpid()}.new")
    mine.write_text(json.dumps(dict(os.environ)))
    mine.rename(mine.with_suffix(".json"))
    time.sleep(3600)  # until it is killed

@regularizer("telling")
class Telling(Regularizer):
    needs = classmethod(lambda cls, settings: Needs())
    forward = lambda self, signals, step: Loss(0.0, {})
"""


@pytest.fixture
def environments(tmp_path):
    """The environments of an executor's workers, slot by slot, as a plugin of their job sees them."""
    plugin = tmp_path / "telling.py"
    plugin.write_text(PLUGIN.replace("TEST", str(os.getpid())))
    load_plugins([plugin])
    yield lambda executor: seen_by_workers(executor, tmp_path)
    drop_plugins([plugin])


def seen_by_workers(executor: LocalExecutor, folder: Path) -> list[list[dict[str, str]]]:
    run = make_run(**{"train.steps": 1, "regularizer": {"type": "telling"}})
    for index in range(executor.slots):
        task = Task(replace(run, run_id=f"telling{index}"), "telling")
        executor.submit(TrainJob(task, "group", make_options(), RunsRoot(folder / "runs")))
    pids: list[list[int]] = []

    def have_told() -> bool:
        executor.poll(0.1)
        if not any(pids):
            pids[:] = [[process.pid for process in slot.processes] for slot in executor._slots]
        return all(pids) and all((folder / f"{pid}.json").exists() for slot in pids for pid in slot)

    wait_until(have_told)
    for slot in executor._slots:
        for process in slot.processes:
            process.kill()
    return [[json.loads((folder / f"{pid}.json").read_text()) for pid in slot] for slot in pids]


def test_every_worker_sees_the_gpus_of_its_slot(tmp_path, environments):
    executor = LocalExecutor(["0,1", "2,3"], tmp_path / "log", processes=2)
    try:
        found = environments(executor)
        assert [[one["CUDA_VISIBLE_DEVICES"] for one in slot] for slot in found] == [["0,1"] * 2, ["2,3"] * 2]
        assert {one["CUDA_DEVICE_ORDER"] for slot in found for one in slot} == {"PCI_BUS_ID"}
        assert [[one["LOCAL_RANK"] for one in slot] for slot in found] == [["0", "1"]] * 2
        assert {one["WORLD_SIZE"] for slot in found for one in slot} == {"2"}
        ports = [{one["MASTER_PORT"] for one in slot} for slot in found]
        assert [len(one) for one in ports] == [1, 1] and ports[0] != ports[1]
    finally:
        executor.close()


def test_workers_hear_of_no_launcher_and_the_rest_of_the_environment_stays_as_it_is(
    tmp_path, monkeypatch, environments
):
    before = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "TORCHELASTIC_RUN_ID": "x"}
    launched |= {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "4"}
    for name, value in {**launched, "ACCELERATE_USE_FSDP": "true", "MV2_COMM_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    executor = LocalExecutor([None], tmp_path / "log")
    try:
        ((found,),) = environments(executor)
        assert {name: found[name] for name in before} == before
        assert not launcher_variables(found)
    finally:
        executor.close()


def test_a_batch_that_processes_cannot_share_is_refused_at_its_place(tiny, tmp_path):
    from repa_lab import sweep

    spec = tiny(run={**tiny()["run"], "gpus_per_run": 3})
    with pytest.raises(
        SpecError, match=r"train\.batch_size: 3 processes \(run\.gpus_per_run\) cannot share a batch equally"
    ):
        sweep(spec, tmp_path)
