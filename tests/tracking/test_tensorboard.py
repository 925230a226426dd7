"""With accelerate's tracker and TensorBoard's own reader."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repa_lab.runs import RunDirectory, RunWriter, State
from repa_lab.runs.files import Row
from repa_lab.tracking import Listeners
from repa_lab.tracking.tensorboard import TensorBoardListener

METRIC = "fid:inception@16/ode2"
ROWS: list[Row] = [
    {"step": 1, "images": 8, "loss/total": 0.5},
    {"step": 2, "images": 16, "loss/total": None},
    {"step": 2, "images": 16, METRIC: 30.0},
    {"step": 3, "images": 24, "loss/total": 0.125},
]


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "abc")


def tell(
    run: RunDirectory, rows: list[Row], listener: TensorBoardListener | None = None, grid: int | None = None
) -> None:
    listener = listener or TensorBoardListener(run, {"train": {"lr": 0.1}})
    with RunWriter(run) as writer:
        listeners = Listeners(writer, [listener])
        for row in rows:
            writer.row(row)
            listeners.row(row)
        if grid is not None:
            listeners.image(grid, draw(run, grid))
        listeners.finish(State.INTERRUPTED)
    assert [event for event in run.events() if event["event"] == "listener-failed"] == []


def draw(run: RunDirectory, step: int) -> object:
    run.samples.mkdir(parents=True, exist_ok=True)
    path = run.samples / f"step-{step:08d}.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * step).save(path)
    return path


def read(run: RunDirectory) -> EventAccumulator:
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def curve(run: RunDirectory, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run).Scalars(name)]


def test_curves_stand_under_their_names_at_their_steps(run):
    tell(run, ROWS)
    assert set(read(run).Tags()["scalars"]) == {"images", "loss/total", METRIC}
    assert curve(run, "loss/total") == [(1, 0.5), (3, 0.125)]  # what was not finite is left out
    assert curve(run, METRIC) == [(2, 30.0)]
    assert curve(run, "images") == [(1, 8), (2, 16), (2, 16), (3, 24)]


def test_the_settings_are_shown_as_they_are(run):
    tell(run, ROWS[:1])
    (spec,) = read(run).Tensors("spec/text_summary")
    assert b'"lr": 0.1' in spec.tensor_proto.string_val[0]


def test_a_sample_grid_is_shown_pixel_by_pixel(run):
    tell(run, ROWS, grid=3)
    (shown,) = read(run).Images("samples")
    pixels = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    assert shown.step == 3
    assert np.array_equal(pixels, np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 3)


def test_after_a_kill_every_row_and_grid_is_there_once(run):
    draw(run, 1)
    tell(run, ROWS, grid=3)
    with RunWriter(run) as writer:
        writer.rewind(1)  # as on resuming from a checkpoint of step 1
    again = [{"step": step, "images": 8 * step, "loss/total": 0.25} for step in (2, 3)]
    tell(run, again[:1])
    assert [shown.step for shown in read(run).Images("samples")] == [1]
    tell(run, again[1:], grid=3)
    assert curve(run, "loss/total") == [(1, 0.5), (2, 0.25), (3, 0.25)]
    assert [shown.step for shown in read(run).Images("samples")] == [1, 3]


def test_what_a_run_has_from_another_run_is_there_too(run):
    with RunWriter(run) as writer:
        writer.replace_rows(ROWS[:1])
    tell(run, ROWS[3:])
    assert curve(run, "loss/total") == [(1, 0.5), (3, 0.125)]


def test_a_run_without_rows_leaves_no_files(run):
    with RunWriter(run) as writer:
        Listeners(writer, [TensorBoardListener(run, {})]).finish(State.FAILED)
    assert not (run.path / "tensorboard").exists()
