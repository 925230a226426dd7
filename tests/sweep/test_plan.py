"""Identity, baselines, and what a plan says of runs."""

import json
from pathlib import Path

import pytest

from repa_lab.runs import RunsRoot, RunWriter, State
from repa_lab.spec import load_spec
from repa_lab.sweep.plan import baselines, identify_arm, make_plan
from tests.data.conftest import noise_image

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASE = {
    "name": "x",
    "model": {"family": "sit", "size": "nano/2"},
    "regularizer": {"type": "repa", "encoder": {"name": "efficientnet_lite0", "image_size": 64}},
    "data": {"source": "digits"},
    "train": {"steps": 10},
    "evaluate": {"extractor": {"name": "efficientnet_lite0"}},
}


def run_id(overrides=None, seed=0, **fields):
    return identify_arm(load_spec({**BASE, **fields}, overrides).arms[0], seed).run_id


def test_identity_is_scientific_content_alone():
    same = run_id()
    assert run_id(name="y", question="?", run={"precision": "bf16", "workers": 7}) == same
    assert run_id({"train.steps": 11}) != same
    assert run_id({"evaluate.samples": 16}) != same
    assert run_id(seed=1) != same


def test_an_unregularised_run_is_one_run_whatever_its_unused_settings():
    off = run_id({"regularizer.type": "none"})
    assert run_id({"regularizer.type": "none", "regularizer.weight": 3.0, "regularizer.encoder.image_size": 32}) == off
    assert off != run_id({"regularizer.weight": 0.0})


def test_manifold_weight_is_part_of_urepa_only():
    assert run_id({"regularizer.manifold_weight": 0.0}) == run_id()
    unet = {"model.family": "unet", "model.size": "nano", "regularizer.type": "urepa"}
    assert run_id({**unet, "regularizer.manifold_weight": 0.0}) != run_id(unet)


def test_weights_are_identified_by_their_bytes_and_data_by_its_files(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    ids = [run_id({"regularizer.encoder.weights": str(tmp_path / name)}) for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


def test_golden_ids_of_the_shipped_experiments():
    """A change here orphans every run that users have: raise PROTOCOL_VERSION on purpose, never by accident."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "run_ids.json").read_text())
    found = {}
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        planned = make_plan(load_spec(file), RunsRoot(Path("nowhere")))
        found[file.stem] = {f"{p.arm.label}, seed {p.run.seed}": p.run.run_id for p in planned.runs}
    assert found == golden


def test_every_arm_is_compared_with_the_baseline_that_shares_its_other_levels():
    assert baselines(load_spec(EXPERIMENTS / "quickstart.yaml")) == {
        "sit, baseline": None,
        "sit, aligned": "sit, baseline",
        "unet, baseline": None,
        "unet, aligned": "unet, baseline",
    }


def test_an_included_baseline_serves_every_arm():
    matched = baselines(load_spec(EXPERIMENTS / "sdxl_manifold.yaml"))
    assert matched.pop("baseline") is None
    assert set(matched.values()) == {"baseline"} and len(matched) == 8


def test_an_arm_without_a_single_nearest_baseline_has_none():
    axes = {"regularizer.type": ["none", "repa"], "train.lr": [0.1, 0.2]}
    spec = load_spec({**BASE, "axes": axes, "include": [{"label": "odd", "set": {"train.lr": 0.3}}]})
    assert baselines(spec)["odd"] is None


def test_sdxl_is_planned_and_says_what_is_missing(tmp_path):
    file = EXPERIMENTS / "sdxl_manifold.yaml"
    planned = make_plan(load_spec(file), RunsRoot(Path("nowhere")))
    assert len(planned.runs) == 27
    assert planned.blocked and planned.blocked.path == "data.path"
    assert planned.blocked.message == "not set; give a folder of images with --set data.path=FOLDER"
    noise_image(0).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a cat")
    given = make_plan(load_spec(file, {"data.path": str(tmp_path)}), RunsRoot(Path("nowhere")))
    assert (len(given.pending), given.blocked) == (27, None)
    assert not {run.run_id for run in given.pending} & {entry.run.run_id for entry in planned.runs}


def test_seed_zero_of_all_arms_comes_first():
    planned = make_plan(load_spec(EXPERIMENTS / "quickstart.yaml"), RunsRoot(Path("nowhere")))
    assert [entry.run.seed for entry in planned.runs] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(("state", "left"), [(State.DONE, 0), (State.PRUNED, 0), (State.FAILED, 3), (State.INTERRUPTED, 3)])
def test_finished_runs_are_not_planned_again(tmp_path, state, left):
    spec, root = load_spec(BASE), RunsRoot(tmp_path)
    run = make_plan(spec, root).runs[0].run
    with RunWriter(root.run(run.run_id)) as writer:
        writer.state(state, 7)
    planned = make_plan(spec, root)
    assert (planned.runs[0].steps_left, len(planned.pending)) == (left, bool(left))


def test_arms_of_equal_content_are_trained_once():
    arms = {"axes": {"regularizer.weight": [0.1, 0.2]}, "include": [{"label": "again", "set": {"regularizer.weight": 0.1}}]}
    planned = make_plan(load_spec({**BASE, **arms}), RunsRoot(Path("nowhere")))
    assert len(planned.runs) == 3 and len(planned.pending) == 2
