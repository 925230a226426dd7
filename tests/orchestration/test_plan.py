"""Identity, baselines, and what a plan says of runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from repa_lab import sweep
from repa_lab.align.settings import REGULARIZERS, Schedule, ScheduleSettings
from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.display import (
    arm_rows,
    as_json,
    baseline_lines,
    blocked_lines,
    orphan_rows,
    run_rows,
    sentences,
)
from repa_lab.orchestration.plan import Match, arm_record, identify_run, make_plan, match_baselines
from repa_lab.runs import RunsRoot, RunWriter, State, checkpoints
from repa_lab.runs.directory import RunBusyError
from repa_lab.runs.root import SearchRecord
from repa_lab.settings import Settings, UsedIf, marks_of
from repa_lab.spec import RunConfig, SpecError, load_spec
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
    return identify_run(load_spec({**BASE, **fields}, overrides).arms[0].config, seed).run_id


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
    both = {"include": [{"label": "urepa", "set": {"regularizer.type": "urepa"}}]}
    assert run_id({"regularizer.manifold_weight": 0.0}, **both) == run_id()
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
    tables = [file for file in EXPERIMENTS.glob("paper/*/*.yaml") if file.parent.name != "presets"]
    for file in sorted([*EXPERIMENTS.glob("*.yaml"), *tables]):
        planned = make_plan(load_spec(file), RunsRoot(Path("nowhere")))
        found[file.relative_to(EXPERIMENTS).with_suffix("").as_posix()] = {
            f"{p.arm.label}, seed {p.run.seed}": p.run.run_id for p in planned.runs
        }
    assert found == golden


def baselines(experiment):
    """The label of every arm's matched baseline."""
    return {label: match.baseline for label, match in match_baselines(experiment).items()}


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


def test_an_arm_without_a_single_nearest_baseline_has_none(tmp_path):
    axes = {"regularizer.type": ["none", "repa"], "train.lr": [0.1, 0.2]}
    spec = load_spec({**BASE, "axes": axes, "include": [{"label": "odd", "set": {"train.lr": 0.3}}]})
    reason = "'type=none, lr=0.1', 'type=none, lr=0.2' are equally near: they share none of its levels"
    assert match_baselines(spec)["odd"] == Match(None, reason)
    assert baseline_lines(make_plan(spec, RunsRoot(tmp_path))) == [
        "baseline: 'type=none, lr=0.1' for 'type=repa, lr=0.1'",
        "baseline: 'type=none, lr=0.2' for 'type=repa, lr=0.2'",
        f"no baseline for 'odd': {reason}",
    ]


def arms_of(**arms):
    """The arms of BASE with REPA, each with settings of its own."""
    encoder = {"name": "efficientnet_lite0", "image_size": 64}
    return {**BASE, "regularizer": {"type": "repa", "encoder": encoder}, "axes": {"arm": arms}}


@pytest.mark.parametrize("baseline, arms", [
    ({"regularizer.weight": 0.5}, {"none": {"regularizer.type": "none"}, "half": {}, "one": {"regularizer.weight": 1.0}}),
    ({"regularizer.loss": "cosine"}, {"off": {"regularizer.weight": 0}, "half": {}, "other": {"regularizer.loss": "nt_xent"}}),
    ({"regularizer.temperature": 0.1}, {"off": {}, "half": {"regularizer.loss": "nt_xent"}}),
    ({"evaluate.sampler.solver": "euler"}, {"sde": {"evaluate.sampler.type": "sde"}, "half": {}}),
    ({"regularizer.schedule.end": 0}, {"constant": {}, "half": {"regularizer.schedule": {"type": "linear"}}}),
    ({"regularizer.schedule": {"threshold_mode": "permanent"}}, {"a": {}, "half": {"regularizer.schedule.similarity_threshold": 0.9}}),
])  # fmt: skip
def test_a_setting_that_an_arm_does_not_use_does_not_make_it_a_baseline(baseline, arms):
    found = match_baselines(load_spec({**arms_of(**arms), "compare": {"baseline": baseline}}))
    assert found == {label: Match() if label == "half" else Match("half") for label in arms}


def test_a_level_of_an_axis_counts_though_it_has_no_effect():
    axes = {"regularizer.weight": [0, 0.5], "regularizer.loss": ["cosine", "nt_xent"]}
    condition = {"regularizer.weight": 0, "regularizer.loss": "cosine"}
    found = match_baselines(load_spec({**arms_of(), "axes": axes, "compare": {"baseline": condition}}))
    assert {match.baseline for match in found.values()} == {None, "weight=0, loss=cosine"}
    assert [label for label, match in found.items() if match == Match()] == ["weight=0, loss=cosine"]


def test_baselines_with_the_same_settings_are_one():
    off = {"regularizer.type": "none"}
    assert match_baselines(load_spec(arms_of(a=off, b=off, c={})))["c"] == Match("a")


def test_plan_says_why_no_arm_is_a_baseline(tmp_path):
    spec = {**arms_of(a={}, b={"train.lr": 1e-3}), "compare": {"baseline": {"regularizer.temperature": 0.1}}}
    planned = make_plan(load_spec(spec), RunsRoot(tmp_path))
    reason = """no arm has compare.baseline {"regularizer.temperature": 0.1} (in 'a', 'b' it has no effect)"""
    assert baseline_lines(planned) == [f"no baseline for 'a', 'b': {reason}"]
    assert [(arm["baseline"], arm["unmatched"]) for arm in as_json(estimate(planned))["arms"]] == [(None, reason)] * 2
    assert [(arm.baseline, arm.unmatched) for arm in planned.manifest().arms] == [(None, reason)] * 2


def test_one_baseline_of_all_arms_is_said_in_a_few_words(tmp_path):
    planned = make_plan(load_spec(EXPERIMENTS / "sdxl_manifold.yaml"), RunsRoot(tmp_path))
    assert baseline_lines(planned) == ["baseline: 'baseline' for every other arm"]


def test_fields_are_used_by_fields_that_there_are():
    """What is marked exists, and the weight over steps does not depend on what the schedule leaves unused."""
    for cls in settings_classes():
        for name, mark in marks_of(cls, UsedIf):
            others = TypeAdapter(cls.model_fields[mark.field].annotation)
            assert all(others.validate_python(value) == value for value in mark.values + mark.but), (cls, name)
    varied = {"decay_steps": 7, "end": 0.3, "power": 2.0, "similarity_ema_decay": 0.5, "probe_every": 3}
    for kind in ("constant", "linear", "cosine", "polynomial"):
        plain = ScheduleSettings(type=kind)
        unused = {name: value for name, value in varied.items() if name in plain.unused_fields()}
        other = plain.model_copy(update=unused)
        assert [Schedule(0.5, 10, plain)(step) for step in range(12)] == [
            Schedule(0.5, 10, other)(step) for step in range(12)
        ]
        assert ("power" in unused, "end" in unused) == (kind != "polynomial", kind == "constant")


def settings_classes():
    found, left = set(), [RunConfig, *(REGULARIZERS[name].settings for name in REGULARIZERS)]
    while left:
        cls = left.pop()
        if cls not in found:
            found.add(cls)
            left += [inner for field in cls.model_fields.values() for inner in classes_in(field.annotation)]
    return found


def classes_in(annotation):
    inner = [cls for member in getattr(annotation, "__args__", ()) for cls in classes_in(member)]
    return inner + [annotation] * (isinstance(annotation, type) and issubclass(annotation, Settings))


def test_sdxl_is_planned_and_says_what_is_missing(tmp_path):
    file = EXPERIMENTS / "sdxl_manifold.yaml"
    default = make_plan(load_spec(file), RunsRoot(Path("nowhere")))
    assert (len(default.pending), default.blocked) == (27, None)  # a commit of the hub, for which nobody is asked
    planned = make_plan(load_spec(file, {"data.source": "imagefolder"}), RunsRoot(Path("nowhere")))
    assert len(planned.runs) == 27
    assert planned.blocked and planned.blocked.path == "data.path"
    assert planned.blocked.message == "not set; give a folder of images with --set data.path=FOLDER"
    for number in range(1, 41):
        noise_image(0).save(tmp_path / f"{number}.png")
    (tmp_path / "1.txt").write_text("a cat")
    given = make_plan(
        load_spec(file, {"data.source": "imagefolder", "data.path": str(tmp_path)}), RunsRoot(Path("nowhere"))
    )
    assert (len(given.pending), given.blocked) == (27, None)
    assert not {run.run_id for run in given.pending} & {entry.run.run_id for entry in planned.runs}


def test_seed_zero_of_all_arms_comes_first():
    planned = make_plan(load_spec(EXPERIMENTS / "quickstart.yaml"), RunsRoot(Path("nowhere")))
    assert [entry.run.seed for entry in planned.runs] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("state", "checkpoint", "word", "left"),
    [
        (State.DONE, 6, "done", 0),
        (State.PRUNED, 6, "pruned", 0),
        (State.FAILED, 6, "failed", 4),
        (State.FAILED, None, "failed", 10),
        (State.INTERRUPTED, 6, "resumable", 4),
        (State.INTERRUPTED, None, "resumable", 10),
        (State.RUNNING, 6, "resumable", 4),  # of a process that is no more
    ],
)
def test_what_is_left_is_counted_from_the_last_checkpoint(tmp_path, state, checkpoint, word, left):
    spec, root = load_spec(BASE), RunsRoot(tmp_path)
    directory = root.run(make_plan(spec, root).runs[0].run.run_id)
    if checkpoint:
        checkpoints.commit(directory.checkpoints, checkpoint, lambda folder: None)
    with RunWriter(directory) as writer:
        writer.state(state, 7, "CudaError: gone" if state is State.FAILED else None)
    planned = make_plan(spec, root)
    (entry,) = planned.runs
    assert (entry.word, entry.steps_left, len(planned.pending)) == (word, left, bool(left))
    assert entry.error == ("CudaError: gone" if state is State.FAILED else None)


def test_a_run_in_another_process_is_running_and_a_plan_does_not_disturb_it(tmp_path):
    spec, root = load_spec(BASE), RunsRoot(tmp_path)
    directory = root.run(make_plan(spec, root).runs[0].run.run_id)
    with RunWriter(directory) as writer:
        writer.state(State.RUNNING, 4)
        before = sorted(tmp_path.rglob("*"))
        (entry,) = make_plan(spec, root).runs
        assert (entry.word, entry.step, entry.steps_left) == ("running", 4, 6)
        assert sorted(tmp_path.rglob("*")) == before
        with pytest.raises(RunBusyError), RunWriter(directory, patience_s=0.0):
            pass


def test_what_is_blocked_says_why_unless_it_is_done(tmp_path):
    spec, root = load_spec(BASE, {"data": {"source": "imagefolder"}}), RunsRoot(tmp_path)
    (entry,) = make_plan(spec, root).runs
    assert (entry.word, entry.blocked.message) == (
        "blocked",
        "not set; give a folder of images with --set data.path=FOLDER",
    )
    with RunWriter(root.run(entry.run.run_id)) as writer:
        writer.state(State.DONE, 10)
    assert make_plan(spec, root).runs[0].word == "done"


def test_runs_of_an_earlier_version_of_the_spec_are_orphans_and_stay_so(tmp_path):
    root, weights = RunsRoot(tmp_path), {"regularizer.weight": [0.1, 0.2, 0.3]}
    first = make_plan(load_spec({**BASE, "axes": weights}), root)
    for entry in first.runs[:2]:
        with RunWriter(root.run(entry.run.run_id)) as writer:
            writer.state(State.DONE, 10)
    assert first.orphans == ()
    root.sweep("x").path.mkdir()
    root.sweep("x").record(first.manifest())
    for _ in range(2):  # the second time, the manifest knows no arm of the first version
        second = make_plan(load_spec({**BASE, "axes": {"regularizer.weight": [0.2, 0.9]}}), root)
        (orphan,) = second.orphans  # what was never begun is missed by nobody
        assert (orphan.label, orphan.seed, orphan.run_id) == ("weight=0.1", 0, first.runs[0].run.run_id)
        assert orphan_rows(second)[0]["state"] == "done"
        root.sweep("x").record(second.manifest())
    again = make_plan(load_spec({**BASE, "axes": weights}), root)
    assert again.orphans == () and again.manifest().orphaned == ()


FIRST = {**BASE, "question": "Which weight?", "axes": {"regularizer.weight": [0.1, 0.2]}, "seeds": 3}


class TestTwoSpecsOfOneName:
    """What stands under a sweep's name is an earlier version of it, or another sweep."""

    @pytest.fixture
    def root(self, tmp_path) -> RunsRoot:
        root = RunsRoot(tmp_path)
        root.sweep("x").path.mkdir()
        root.sweep("x").record(make_plan(load_spec(FIRST), root).manifest())
        return root

    @pytest.mark.parametrize(
        "edit",
        [
            {"seeds": 5},
            {"axes": {"regularizer.weight": [0.2, 0.9]}},
            {"axes": {"weight": {"low": {"regularizer.weight": 0.1}}}, "question": "Renamed?"},
            {"train": {"steps": 20}},
            {"seeds": [7, 8], "model": {"family": "sit", "size": "nano/4"}},
        ],
        ids=["seeds", "an arm added and one taken away", "an arm renamed", "length", "seeds and model"],
    )
    def test_an_edited_spec_is_the_same_sweep(self, root, edit):
        planned = make_plan(load_spec({**FIRST, **edit}), root)
        assert planned.other_sweep is None
        note = "no run of the sweep's earlier version is asked for any more; its runs stay"
        assert (note in planned.warnings) == (not {run.run.run_id for run in planned.runs} & self.recorded(root))

    def recorded(self, root) -> set[str]:
        return set(root.sweep("x").manifest.run_ids)

    @pytest.mark.parametrize(
        "other",
        [
            {"axes": {"train.lr": [1e-3, 1e-4]}, "train": {"steps": 20}},
            {"question": "Does size matter?", "train": {"steps": 20}},
            {"question": "", "search": {"space": {"train.lr": {"log": [1e-5, 1e-3]}}}, "axes": {}},
        ],
        ids=["other arms", "another question", "a search"],
    )
    def test_another_sweep_says_so_and_changes_nothing(self, root, other):
        spec, before = {**FIRST, **other}, root.sweep("x").manifest
        planned = make_plan(load_spec(spec), root)
        text = (
            f"name: '{root.path}/x' holds another sweep, of which this one has no run (its arms: 'weight=0.1; weight=0.2'"
            "): give another name, or --replace (in Python, replace=True) to take its place; its runs stay"
        )
        assert blocked_lines(planned) == [f"blocked: {text}"]
        assert as_json(estimate(planned))["blocked"] == [f"blocked: {text}"]
        with pytest.raises(SpecError) as caught:
            sweep(spec, root.path)
        assert str(caught.value) == f"<given>: {text}"
        assert root.sweep("x").manifest == before
        assert make_plan(load_spec({**spec, "name": "y"}), root).other_sweep is None

    def test_a_search_is_known_by_its_trials(self, root):
        space = {"regularizer.weight": {"choice": [0.1, 0.2]}}
        spec = {**BASE, "question": "Where?", "search": {"space": space}, "name": "s"}
        first = make_plan(load_spec(spec), root)
        (arm,) = first.experiment.arms
        runs = [identify_run(arm.with_settings({"regularizer.weight": 0.2}).config, 0)]
        trial = {"arm": "weight=0.2", "state": "complete", "params": {"regularizer.weight": 0.2}}
        record = SearchRecord(metric="m", trials=[trial], objectives=[{"metric": "m"}])
        root.sweep("s").path.mkdir()
        root.sweep("s").record(first.manifest([arm_record(arm, runs)], record))
        same = ({"question": "Edited?"}, {"train": {"steps": 20}}, {"search": {"space": space, "trials": 9}})
        other = {"question": "Other?", "train": {"steps": 20}}
        planned = [make_plan(load_spec({**spec, **edit}), root).other_sweep for edit in (*same, other)]
        assert [problem is None for problem in planned] == [True, True, True, False]


def test_arms_of_equal_content_are_trained_once():
    arms = {
        "axes": {"regularizer.weight": [0.1, 0.2]},
        "include": [{"label": "again", "set": {"regularizer.weight": 0.1}}],
    }
    planned = make_plan(load_spec({**BASE, **arms}), RunsRoot(Path("nowhere")))
    assert len(planned.runs) == 3 and len(planned.pending) == 2


def test_the_table_has_a_line_an_arm_and_on_demand_a_line_a_run(tmp_path):
    root, axes = RunsRoot(tmp_path), {"regularizer.weight": [0.1, 0.2]}
    spec = load_spec({**BASE, "axes": axes, "seeds": 3})
    for entry in make_plan(spec, root).runs[:3:2]:  # two seeds of the first arm
        with RunWriter(root.run(entry.run.run_id)) as writer:
            writer.state(State.DONE, 10)
    found = estimate(make_plan(spec, root))
    assert [(line["arm"], line["runs"], line["steps left"]) for line in arm_rows(found)] == [
        ("weight=0.1", "2 done, 1 new", "10"),
        ("weight=0.2", "3 new", "30"),
    ]
    assert [line["state"] for line in run_rows(found)] == ["done", "new", "done", "new", "new", "new"]
    assert sentences(found)[0].startswith("4 runs to train: 40 steps, 10.2 K images, ")


def test_averages_that_still_hold_initial_weights_are_told_once_each():
    steps = {"train.steps": [10, 5000]}
    planned = make_plan(
        load_spec({**BASE, "axes": {**steps, "train.ema": [0.9, {"decay": 0.9999, "warmup": True}, 0.9999]}}),
        RunsRoot(Path("nowhere")),
    )
    told = [
        f"train.ema: at decay {decay} the measured average still holds {share} % of the initial weights after {steps} steps;"
        " set train.ema.warmup, or lower the decay"
        for decay, share, steps in (("0.9", 35, "10"), ("0.9999", 100, "10"), ("0.9999", 61, "5,000"))
    ]
    assert planned.warnings == told
    assert [line for line in sentences(estimate(planned)) if line.startswith("train.ema")] == told


def test_a_whole_plan_loads_no_torch():
    code = (
        "import sys, json; sys.argv = ['repa-lab', 'plan', 'experiments/sdxl_manifold.yaml', '--json'];"
        "from repa_lab.cli import main\ntry: main()\nexcept SystemExit: pass\nsys.exit(bool({'torch', 'diffusers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXPERIMENTS.parent, capture_output=True, text=True, check=False
    )
    assert (done.returncode, json.loads(done.stdout)["total"]["runs"]) == (0, 27), done.stderr


def test_targets_of_a_metric_that_is_called_by_two_names_are_all_kept(tiny, tmp_path):
    targets = {"frechet": [30.0, 20.0], "frechet:efficientnet_lite0@16/ode2": [20.0, 10.0]}
    manifest = make_plan(load_spec(tiny(compare={"targets": targets})), RunsRoot(tmp_path)).manifest()
    assert manifest.compare.targets == {"frechet:efficientnet_lite0@16/ode2": [30.0, 20.0, 10.0]}


def test_several_values_of_a_field_can_be_baselines(tiny):
    axes = {"train.lr": [1e-3, 2e-3, 3e-3], "alignment": {"off": {"regularizer.type": "none"}, "on": {}}}
    found = baselines(load_spec(tiny(axes=axes, compare={"baseline": {"train.lr": [1e-3, 2e-3], "alignment": "off"}})))
    assert {label for label, baseline in found.items() if baseline is None} >= {"lr=0.001, off", "lr=0.002, off"}
    assert (found["lr=0.001, on"], found["lr=0.002, on"]) == ("lr=0.001, off", "lr=0.002, off")


def test_a_baseline_can_be_named_by_a_mapping_as_its_axis_is(tiny):
    axes = {"regularizer.schedule": [{"cutoff_step": 2}, {"cutoff_step": None}]}
    found = baselines(load_spec(tiny(axes=axes, compare={"baseline": {"regularizer.schedule": {"cutoff_step": None}}})))
    without = "schedule={'cutoff_step': None}"
    assert found == {"schedule={'cutoff_step': 2}": without, without: None}
