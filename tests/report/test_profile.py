"""A stored profile as a frame, and the frame as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from repa_lab.report import load_profile, load_results, profile_figure
from repa_lab.report.figure_data import (
    profile_difference,
    profile_matrix,
    shown_metrics,
    shown_profiles,
    why_not_comparable,
)
from repa_lab.report.figures import save
from repa_lab.report.results import ResultsError
from repa_lab.runs import RunDirectory, files

from .conftest import Build, FakeArm, FakeRun

PROTOCOL: dict[str, Any] = {
    "step": 600,
    "encoder": {"name": "dinov2_vitb14"},
    "weights": "ema",
    "timesteps": [0.1, 0.5],
    "data": "abc",
    "packages": {"torch": "2"},
}
BLOCKS = [0, 1, 2]


def store(
    run: RunDirectory,
    values: Any = None,
    aligned: Any = 1,
    blocks: Any = BLOCKS,
    metrics: Any = ("cka", "lds"),
    **changed: Any,
) -> RunDirectory:
    """A profile whose value is by default 0.1 of the block, 0.01 at t 0.5, and 0.001 for the second metric."""
    made = values or (lambda block, t, metric: 0.1 * blocks.index(block) + 0.02 * t + 0.001 * metrics.index(metric))
    rows = [
        {"block": block, "timestep": t, "metric": metric, "value": made(block, t, metric)}
        for t in (0.1, 0.5)
        for block in blocks
        for metric in metrics
    ]
    run.path.mkdir(parents=True, exist_ok=True)
    profile = {
        "run_id": run.run_id,
        "measured_block": 1,
        "aligned_block": aligned,
        "protocol": {**PROTOCOL, **changed},
        "values": rows,
    }
    files.write_record(run.profile_file, profile)
    return run


def named(folder: Path, name: str) -> RunDirectory:
    return RunDirectory(folder / name)


def test_the_frame_is_tidy(tmp_path):
    run = store(named(tmp_path, "one"))
    frame = load_profile(run.path)
    assert list(frame.columns) == ["run_id", "block", "timestep", "metric", "value"]
    assert len(frame) == 3 * 2 * 2
    assert set(frame["run_id"]) == {"one"}
    assert frame.query("block == 2 and timestep == 0.5 and metric == 'lds'")["value"].item() == pytest.approx(0.211)
    assert (frame.attrs["aligned_block"], frame.attrs["protocol"]["step"]) == (1, 600)
    assert load_profile(str(run.path)).equals(frame) and load_profile(run).equals(frame)


def test_the_matrix_keeps_the_order_of_the_pass(tmp_path):
    names = ["down_blocks.0", "mid", "up_blocks.0", "up_blocks.1"]
    frame = load_profile(store(named(tmp_path, "unet"), blocks=names, aligned="mid"))
    matrix = profile_matrix(frame, "cka")
    assert list(matrix.index) == names and list(matrix.columns) == [0.1, 0.5]
    many = load_profile(store(named(tmp_path, "sit"), blocks=list(range(12))))
    assert list(profile_matrix(many, "cka").index) == list(range(12))
    with pytest.raises(ResultsError, match="the profile of sit has no cknna; it has cka, lds"):
        profile_matrix(many, "cknna")


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def test_what_is_drawn_is_the_frame(tmp_path):
    run = store(named(tmp_path, "one"))
    (axes,) = panels(profile_figure([run]))
    assert np.array_equal(axes.images[0].get_array(), profile_matrix(load_profile(run), "cka").to_numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1 aligned", "2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.5"]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.01", "0.10", "0.11", "0.20", "0.21"]
    assert axes.get_title(loc="left") == "one, ema of step 600"
    both = panels(profile_figure([run], ["lds", "cka"]))
    assert [axes.get_ylabel().splitlines()[0] for axes in both] == ["LDS: near less far cosine", "CKA with the encoder"]
    assert np.array_equal(both[0].images[0].get_array(), profile_matrix(load_profile(run), "lds").to_numpy())


def test_the_aligned_block_is_marked_and_no_other(tmp_path):
    frames = [("aligned", 2), ("baseline", None)]
    for name, aligned in frames:
        (axes,) = panels(profile_figure([store(named(tmp_path, name), aligned=aligned)]))
        marks = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [(mark.get_y(), mark.get_height(), mark.get_width()) for mark in marks] == (
            [(1.5, 1, 2)] if aligned else []
        )


def test_the_third_panel_is_the_difference_centred_at_zero(tmp_path):
    base = store(named(tmp_path, "base"), aligned=None)
    other = store(named(tmp_path, "other"), lambda block, t, metric: 0.3 if block == 1 else -0.1)
    one, two, difference = panels(profile_figure([base, other]))
    expected = profile_matrix(load_profile(other), "cka") - profile_matrix(load_profile(base), "cka")
    assert np.array_equal(difference.images[0].get_array(), expected.to_numpy())
    low, high = difference.images[0].get_clim()
    assert low == -high == -np.abs(expected.to_numpy()).max()
    assert one.images[0].get_clim() == two.images[0].get_clim() == (-0.1, 0.3)
    assert (one.images[0].get_cmap().name, difference.images[0].get_cmap().name) == ("viridis", "RdBu")
    assert difference.texts[2].get_text() == "+0.20"
    assert len([patch for patch in difference.patches if isinstance(patch, Rectangle)]) == 1
    assert not one.patches


@pytest.mark.parametrize("changed, said", [
    ({"data": "xyz"}, "data is abc and xyz"),
    ({"encoder": {"name": "clip"}}, "encoder.name is dinov2_vitb14 and clip"),
    ({"weights": "last"}, "weights is ema and last"),
])  # fmt: skip
def test_what_was_measured_otherwise_is_not_compared(tmp_path, changed, said):
    base, other = store(named(tmp_path, "base")), store(named(tmp_path, "other"), **changed)
    message = f"the profiles of base and other cannot be compared: {said}"
    with pytest.raises(ResultsError, match=message):
        profile_figure([base, other])
    assert why_not_comparable(load_profile(base), load_profile(other)) == message


def test_a_later_step_and_other_versions_are_compared(tmp_path):
    base, other = store(named(tmp_path, "base")), store(named(tmp_path, "other"), step=900, packages={})
    assert why_not_comparable(load_profile(base), load_profile(other)) is None
    assert (profile_difference(load_profile(base), load_profile(other), "cka") == 0).all(axis=None)


def test_other_blocks_are_not_compared(tmp_path):
    base, other = store(named(tmp_path, "base")), store(named(tmp_path, "other"), blocks=[0, 1])
    reason = why_not_comparable(load_profile(base), load_profile(other))
    assert reason == "the profiles of base and other have different blocks"


def test_the_agreement_with_the_encoder_is_shown_or_else_all(tmp_path):
    frames = [load_profile(store(named(tmp_path, "one"), metrics=("cka", "mutual_knn", "rmsc")))]
    assert shown_metrics(frames) == ["cka", "mutual_knn"]
    frames.append(load_profile(store(named(tmp_path, "two"), metrics=("cka", "rmsc"))))
    assert shown_metrics(frames) == ["cka"]
    assert shown_metrics([load_profile(store(named(tmp_path, "three"), metrics=("lds", "rmsc")))]) == ["lds", "rmsc"]


def test_what_is_no_profile_is_said(tmp_path):
    with pytest.raises(ResultsError, match="run none has no profile; make one with `repa-lab profile none`"):
        load_profile(tmp_path / "none")
    run = store(named(tmp_path, "torn"))
    text = run.profile_file.read_text()
    for broken in (text[:100], json.dumps({"run_id": "torn"}), "[]"):
        run.profile_file.write_text(broken)
        with pytest.raises(ResultsError, match="cannot be read as a profile"):
            load_profile(run)


def test_a_sweep_shows_each_arm_that_has_one_beside_its_baseline(build: Build):
    arms = [FakeArm("base", [FakeRun(seed, {100: 9.0}) for seed in (0, 1)])]
    arms += [FakeArm(name, [FakeRun(seed, {100: 8.0}) for seed in (0, 1)], "base") for name in ("near", "far", "none")]
    sweep = build(arms)
    results = load_results(sweep.path)
    ids = {(row.arm, row.seed): row.run_id for row in results.runs.itertuples()}

    def at(arm: str, seed: int, **changed: Any) -> None:
        store(sweep.root.run(ids[arm, seed]), **changed)

    assert list(shown_profiles(results)) == []
    at("base", 1, aligned=None)
    at("near", 0)
    at("near", 1)
    at("far", 1, weights="last")
    found = {
        title: len(panels(profile_figure(frames, names=names))) for title, frames, names in shown_profiles(results)
    }
    assert found == {"near, seed 1, and its baseline": 3, "far, seed 1": 1}
    sweep.root.run(ids["near", 1]).profile_file.unlink()
    assert [title for title, *_ in shown_profiles(results)] == [
        "base, seed 1",
        "near, seed 0",
        "far, seed 1",
    ]


def test_a_picture_is_small_and_leaves_the_style_alone(tmp_path):
    before = dict(mpl.rcParams)
    runs = [store(named(tmp_path, name), blocks=list(range(28))) for name in ("base", "other")]
    path = save(profile_figure(runs), runs[1].profile_picture(runs[0]))
    assert dict(mpl.rcParams) == before
    assert path == tmp_path / "other" / "profile-minus-base.png"
    with Image.open(path) as image:
        assert min(image.size) > 300
    assert path.stat().st_size < 300_000
