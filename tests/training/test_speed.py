"""The price of a step: what its numbers count, by their definitions, and that no number is of anything else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from repa_lab.training.checkpoint import Progress
from repa_lab.training.costs import cost_of
from repa_lab.training.speed import GIB, SpeedMeter, matmul_ceiling, peak_memory
from tests.training.conftest import MEASURED_SPEED, OFF, make_options, make_run, run_steps

CPU = torch.device("cpu")
SPEED = {*MEASURED_SPEED, "cost/data_seconds", "cost/encoder_seconds"}


def meter(progress: Progress, processes: int = 1, options: dict | None = None, **settings) -> SpeedMeter:
    return SpeedMeter(make_run(**settings).config, make_options(**options or {}), progress, CPU, processes)


def slow(count: int, seconds: float):
    for number in range(count):
        time.sleep(seconds)
        yield number


class TestSpeedMeter:
    def test_waiting_is_part_of_the_seconds_and_work_between_is_not_waiting(self):
        progress = Progress()
        found = meter(progress)
        assert list(found.waiting_for(slow(3, 0.02))) == [0, 1, 2]
        time.sleep(0.05)
        progress.step += 3
        row = found.row()
        assert 0.06 <= progress.data_seconds <= progress.seconds - 0.05
        assert row["cost/data_seconds"] == round(progress.data_seconds, 3)

    def test_what_lies_before_the_start_does_not_count(self):
        progress = Progress(step=100, seconds=7.0, data_seconds=3.0)
        found = meter(progress)
        list(found.waiting_for(slow(1, 0.05)))
        began = time.perf_counter()
        found.start()
        progress.step += 1
        row = found.row()
        assert 7.0 < progress.seconds <= 7.0 + (time.perf_counter() - began)
        assert (row["cost/data_seconds"], progress.data_seconds) == (3.0, 3.0)

    @pytest.mark.parametrize("processes", [1, 4])
    @pytest.mark.parametrize("settings", [OFF, {}, {"regularizer.weight": 0.0}], ids=["none", "repa", "weight 0"])
    def test_utilisation_is_the_models_flops_over_those_of_matrix_products(self, settings, processes):
        progress = Progress(step=2)
        found = meter(progress, processes, **settings)
        progress.step += 3
        time.sleep(0.001)
        row, cost = found.row(), cost_of(make_run(**settings).config, make_options())
        projector = 0.0 if "regularizer.weight" in settings else sum(one.projector_flops for one in cost.regularizers)
        reached = row["cost/images_per_second"] * (cost.denoiser_flops + projector)
        expected = reached / processes / matmul_ceiling(CPU, torch.float32)
        assert row["cost/flops_utilisation"] == pytest.approx(expected, rel=2e-3)

    def test_activations_computed_again_are_not_the_models_flops(self):
        ratios = []
        for checkpointing in (False, True):
            progress = Progress()
            found = meter(progress, options={"gradient_checkpointing": checkpointing}, **OFF)
            progress.step += 1
            time.sleep(0.001)
            row = found.row()
            ratios.append(row["cost/flops_utilisation"] / row["cost/images_per_second"])
        assert ratios[1] == pytest.approx(ratios[0], rel=2e-3)

    def test_projectors_count_in_the_steps_that_use_them(self):
        """With a cutoff after step 2, two of these four steps have the projector."""
        settings = {"regularizer.schedule": {"cutoff_step": 2}}
        progress = Progress()
        found = meter(progress, **settings)
        progress.step += 4
        time.sleep(0.001)
        row, cost = found.row(), cost_of(make_run(**settings).config, make_options())
        reached = row["cost/images_per_second"] * (cost.denoiser_flops + cost.regularizers[0].projector_flops / 2)
        expected = reached / matmul_ceiling(CPU, torch.float32)
        assert row["cost/flops_utilisation"] == pytest.approx(expected, rel=2e-3)


def test_the_ceiling_is_measured_once_in_a_process():
    assert matmul_ceiling(CPU, torch.float32) == matmul_ceiling(torch.device("cpu"), torch.float32) > 1e8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of the process")
def test_the_peak_on_a_cpu_is_that_of_the_process():
    torch.ones(1 << 24).sum()  # 64 MiB, freed at once
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory(CPU) / GIB == pytest.approx(int(lines["VmHWM"].split()[0]) * 1024 / GIB, abs=0.02)


def test_every_row_of_the_loss_has_them_and_totals_go_on_after_an_interruption(cache, fresh):
    run, directory = make_run(), fresh()
    run_steps(run, directory, cache, steps=2)
    run_steps(run, directory, cache, steps=2)
    losses = [row for row in directory.rows() if "loss/total" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    assert all(row.keys() >= SPEED for row in losses)
    for name in ("cost/data_seconds", "cost/encoder_seconds"):
        totals = [row[name] for row in losses]
        assert totals == sorted(totals) and totals[0] <= losses[0]["seconds"]
