"""The encoders' seconds: what is counted, what is not, and that they outlive interruptions."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from repa_lab.encoders.encoder import Encoder
from repa_lab.runs import State, checkpoints
from repa_lab.runs.checkpoints import Fork
from repa_lab.training.device import Stopwatch
from repa_lab.training.loop import train
from repa_lab.training.trainer import Trainer
from tests.training.conftest import OFF, make_options, make_run, run_steps, run_to_end, stop_after
from tests.training.pretrained import make_pretrained_run, open_pretrained, write_images, write_pipeline

CPU = torch.device("cpu")
LARGE = {"regularizer.encoder": {"name": "efficientnet_lite0", "image_size": 128, "cache": False}}
ONLINE = {"regularizer.encoder": {"name": "efficientnet_lite0", "image_size": 32, "cache": False}}
SECONDS = "cost/encoder_seconds"


def steps(trainer: Trainer, count: int, folder: Path) -> float:
    """The encoders' seconds up to a checkpoint after so many steps more."""
    for batch in islice(trainer.batches(), count):
        trainer.step(batch)
    return saved(trainer, folder)


def saved(trainer: Trainer, folder: Path) -> float:
    folder.mkdir(exist_ok=True)
    trainer.save(folder)
    return state(folder)["encoder_seconds"]


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())["progress"]


@pytest.fixture
def inside(monkeypatch) -> list[tuple[int, float]]:
    """Of each pass of an encoder the images, and the seconds that it takes by itself."""
    found: list[tuple[int, float]] = []
    forward = Encoder.forward

    def timed(self, pixels):
        began = time.perf_counter()
        tokens = forward(self, pixels)
        found.append((len(pixels), time.perf_counter() - began))
        return tokens

    monkeypatch.setattr(Encoder, "forward", timed)
    return found


class TestStopwatch:
    def test_what_happens_within_counts_and_nothing_else(self):
        stopwatch, began = Stopwatch(CPU), time.perf_counter()
        for _ in range(3):
            with stopwatch.running():
                time.sleep(0.02)
        within = time.perf_counter() - began
        time.sleep(0.1)
        found = stopwatch.take()
        assert 0.06 <= found <= within
        assert stopwatch.take() == 0.0

    def test_a_passage_that_fails_took_its_time(self):
        stopwatch = Stopwatch(CPU)
        with pytest.raises(torch.OutOfMemoryError), stopwatch.running():
            time.sleep(0.02)
            raise torch.OutOfMemoryError
        assert stopwatch.take() >= 0.02

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_gpu_is_timed_by_its_own_clock_and_not_waited_for(self):
        device, cycles = torch.device("cuda"), 200_000_000
        stopwatch = Stopwatch(device)
        torch.cuda._sleep(cycles)  # work of others, which is still in the queue when the passage begins
        began = time.perf_counter()
        with stopwatch.running():
            torch.cuda._sleep(cycles)
        with stopwatch.running():
            pass
        asked = time.perf_counter() - began
        torch.cuda.synchronize()
        both, found = time.perf_counter() - began, stopwatch.take()
        assert asked < both / 4
        assert both / 4 < found < 3 * both / 4


class TestSteps:
    @pytest.mark.parametrize(
        "options, passes", [({}, [6, 6]), ({"micro_batch": 4}, [4, 2] * 2)], ids=["whole", "in parts"]
    )
    def test_an_encoder_in_the_steps_takes_what_its_passes_take(self, cache, tmp_path, inside, options, passes):
        trainer = Trainer(make_run(**LARGE), make_options(**options), cache)
        inside.clear()
        began = time.perf_counter()
        found = steps(trainer, 2, tmp_path / "saved")
        sizes, seconds = zip(*inside, strict=True)
        assert 0 < sum(seconds) <= found <= time.perf_counter() - began
        assert list(sizes) == passes

    def test_cached_features_take_the_time_of_reading_them(self, cache, tmp_path):
        assert steps(Trainer(make_run(), make_options(), cache), 3, tmp_path / "cached") > 0

    @pytest.mark.parametrize("workers", [0, 1])
    def test_what_this_process_reads_counts_and_what_others_read_ahead_does_not(self, cache, workers):
        trainer = Trainer(make_run(), make_options(data_workers=workers), cache)
        batches = trainer.batches()
        batch, stopwatch = next(batches), trainer.aligner.stopwatch
        assert (stopwatch.take() > 0) == (workers == 0)
        trainer.step(batch)
        assert stopwatch.take() > 0

    def test_steps_at_which_no_encoder_is_asked_add_nothing(self, cache, tmp_path):
        trainer = Trainer(make_run(**ONLINE, **{"regularizer.schedule": {"cutoff_step": 2}}), make_options(), cache)
        asked = steps(trainer, 2, tmp_path / "asked")
        assert steps(trainer, 2, tmp_path / "not asked") == asked > 0

    @pytest.mark.parametrize("arm", [OFF, {"regularizer.weight": 0.0}], ids=["none", "weight 0"])
    def test_without_a_regularizer_there_are_none(self, cache, tmp_path, arm):
        assert steps(Trainer(make_run(**arm), make_options(), cache), 2, tmp_path / "saved") == 0.0

    def test_measuring_is_not_among_them(self, cache, tmp_path, inside):
        trainer = Trainer(make_run(**ONLINE), make_options(), cache)
        inside.clear()
        (row, *_), _ = trainer.measure()
        assert inside
        assert (row[SECONDS], saved(trainer, tmp_path / "saved")) == (0.0, 0.0)
        assert row["cost/evaluation_seconds"] > 0

    def test_what_is_read_to_find_out_a_width_is_no_steps(self, tmp_path):
        write_images(tmp_path / "images")
        run = make_pretrained_run("sd15", write_pipeline("sd15", tmp_path / "sd15"), tmp_path / "images")
        open_pretrained(run, tmp_path / "cache")
        trainer = Trainer(run, make_options(), tmp_path / "cache")
        assert trainer.aligner.terms
        assert saved(trainer, tmp_path / "saved") == 0.0

    def test_rows_have_them_within_the_seconds_of_the_steps(self, cache, fresh):
        directory = run_to_end(make_run(**ONLINE, **{"evaluate.every": 3}), fresh(), cache, log_every=2)
        first, last = (row for row in directory.rows() if "cost/evaluation_seconds" in row)
        assert 0 < first[SECONDS] < last[SECONDS]
        for row in (first, last):
            assert row[SECONDS] <= row["seconds"]


class TestGoingOn:
    def test_a_run_that_is_taken_up_again_goes_on_counting(self, cache, fresh):
        run, directory = make_run(**ONLINE), fresh()
        run_steps(run, directory, cache, steps=2)
        _, folder = checkpoints.latest(directory.checkpoints)
        before = state(folder)["encoder_seconds"]
        run_steps(run, directory, cache, steps=1)
        _, folder = checkpoints.latest(directory.checkpoints)
        after = state(folder)
        assert after["step"] == 3
        assert 0 < before < after["encoder_seconds"] <= after["seconds"]

    def test_a_run_that_begins_from_another_has_the_others_seconds(self, cache, fresh):
        run = make_run(**ONLINE)
        parent = fresh("parent")
        ends = {"options": make_options(), "cache": cache}
        assert train(run, parent, **ends, kept=frozenset({2}), should_stop=stop_after(3)) is State.INTERRUPTED
        at_fork = state(parent.forks / "step-00000002")["encoder_seconds"]
        child = fresh("child")
        assert train(run, child, **ends, fork=Fork("parent", 2), should_stop=stop_after(1)) is State.INTERRUPTED
        _, folder = checkpoints.latest(child.checkpoints)
        assert state(folder)["step"] == 3
        assert 0 < at_fork < state(folder)["encoder_seconds"]
