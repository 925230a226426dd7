"""The arms of several sweeps in one table, and values of two protocols in none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from repa_lab.cli import main
from repa_lab.report.leaderboard import COLUMNS, leaderboards
from repa_lab.report.results import ResultsError
from repa_lab.report.summary import goal_of
from repa_lab.runs import RunsRoot, RunWriter, State

from .conftest import METRIC, STEPS, Build, FakeArm, FakeRun, constant_runs

FID = "fid:inception@50k/sde250"
SIT = {"model": {"family": "sit", "size": "B/2"}, "regularizer": {"type": "none", "encoder": {"name": "dinov2_vitb14"}}}
REPA = {
    "model": {"family": "sit", "size": "B/2"},
    "regularizer": {"type": "repa", "encoder": {"name": "dinov2_vitb14"}},
}
TWO = {"regularizer": {"type": "urepa", "encoder": [{"name": "dinov2_vitb14"}, {"name": "clip_vitl14"}]}}

SEVERAL = {"regularizer": [REPA["regularizer"], {"type": "none"}, {"type": "dispersive"}]}
NAMED = {"regularizer": [{"type": "layersync", "name": name} for name in ("early", "late")]}


def only(path, **wanted):
    (board,) = leaderboards(path, **wanted)
    return board


def test_arms_of_all_sweeps_stand_best_first_with_their_intervals(build: Build, root: RunsRoot):
    build([FakeArm("base", constant_runs([30.0, 32.0, 34.0]), config=SIT)], name="one")
    build(
        [
            FakeArm("aligned", constant_runs([20.0, 22.0, 27.0]), config=REPA),
            FakeArm("both", constant_runs([25.0]), config=TWO),
            FakeArm("several", constant_runs([31.0]), config=SEVERAL),
            FakeArm("named", constant_runs([31.5]), config=NAMED),
        ],
        name="two",
    )
    board = only(root.path)
    assert (board.metric, board.goal, dict(board.protocol)) == (METRIC, "min", {})
    frame = board.frame
    assert list(frame.columns) == COLUMNS
    assert frame[["arm", "sweeps"]].to_numpy().tolist() == [
        ["aligned", "two"],
        ["both", "two"],
        ["several", "two"],
        ["named", "two"],
        ["base", "one"],
    ]
    first = frame.iloc[0]
    assert (first["mean"], first["n"], first["seeds"], first["step"], first["images"], first["state"]) == (
        23.0,
        3,
        3,
        600,
        38400,
        "done",
    )
    # Student's t for two degrees of freedom is 4.302653; the standard deviation of 20, 22, 27 is sqrt(13).
    assert first["high"] - first["mean"] == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)
    assert math.isnan(frame.iloc[1]["low"])
    assert frame[["family", "size", "regularizer", "encoder"]].to_numpy().tolist() == [
        ["sit", "B/2", "repa", "dinov2_vitb14"],
        ["sit", "", "urepa", "dinov2_vitb14 + clip_vitl14"],
        ["sit", "", "repa + dispersive", "dinov2_vitb14"],
        ["sit", "", "early (layersync) + late (layersync)", ""],
        ["sit", "B/2", "none", ""],
    ]


def test_runs_that_two_sweeps_share_stand_once_with_both_named(build: Build, root: RunsRoot):
    shared = [FakeRun(seed, dict.fromkeys(STEPS, 10.0 + seed), run_id=f"shared{seed}") for seed in range(3)]
    build([FakeArm("none", shared[:2])], name="first")
    build([FakeArm("baseline", shared), FakeArm("other", constant_runs([5.0]))], name="second")
    frame = only(root.path).frame
    assert frame[["arm", "sweeps", "seeds", "n", "mean"]].to_numpy().tolist() == [
        ["other", "second", 1, 1, 5.0],
        ["none / baseline", "first, second", 3, 3, 11.0],
    ]


def test_arms_with_one_label_and_other_runs_stand_apart(build: Build, root: RunsRoot):
    build([FakeArm("base", [FakeRun(0, {600: 3.0}, run_id="a")])], name="one")
    build([FakeArm("base", [FakeRun(0, {600: 2.0}, run_id="b")])], name="two")
    assert only(root.path).frame[["arm", "sweeps", "mean"]].to_numpy().tolist() == [
        ["base", "two", 2.0],
        ["base", "one", 3.0],
    ]


def test_seeds_are_compared_at_equal_progress(build: Build, root: RunsRoot):
    ahead = FakeRun(0, {100: 9.0, 200: 4.0, 300: 6.0, 400: 1.0})
    behind = FakeRun(1, {100: 8.0, 200: 7.0, 300: 5.0}, State.RUNNING)
    build([FakeArm("arm", [ahead, behind, 2])])
    row = only(root.path).frame.iloc[0]
    assert (row["step"], row["images"], row["mean"], row["n"], row["seeds"]) == (300, 19200, 5.5, 2, 3)
    assert row["best"] == 4.5  # of 4 at step 200 and 5 at step 300; what came later does not count
    assert set(row["state"].split(", ")) == {
        "done",
        "resumable",
        "new",
    }  # nobody holds the lock of the one that says it runs


def test_what_is_not_finite_is_last_and_counted_out(build: Build, root: RunsRoot):
    build([FakeArm("diverged", [FakeRun(0, {300: 1.0, 600: math.nan})]), FakeArm("fine", constant_runs([50.0]))])
    frame = only(root.path).frame
    assert frame["arm"].tolist() == ["fine", "diverged"]
    assert (frame.iloc[1]["n"], frame.iloc[1]["best"]) == (0, 1.0)


def test_every_protocol_has_its_own_board(build: Build, root: RunsRoot):
    build([FakeArm("a", constant_runs([10.0], metric=FID)), FakeArm("b", constant_runs([20.0]))], name="one")
    build([FakeArm("c", constant_runs([9.0], metric="precision:inception@50k/sde250"))], name="two")
    arms = {board.metric: board.frame["arm"].tolist() for board in leaderboards(root.path)}
    assert arms == {FID: ["a"], METRIC: ["b"], "precision:inception@50k/sde250": ["c"]}
    assert [board.metric for board in leaderboards(root.path, metric="fid")] == [FID, METRIC]
    assert [board.metric for board in leaderboards(root.path, metric="frechet", protocol="@50k")] == [FID]
    assert only(root.path, metric=METRIC).metric == METRIC
    assert [board.metric for board in leaderboards(root.path, protocol="sde250")] == [
        FID,
        "precision:inception@50k/sde250",
    ]


def test_large_values_stand_first_where_they_are_good(build: Build, root: RunsRoot):
    metric = "is:inception@50k/sde250"
    build([FakeArm("low", constant_runs([10.0], metric=metric)), FakeArm("high", constant_runs([20.0], metric=metric))])
    board = only(root.path)
    assert (board.goal, board.frame["arm"].tolist()) == ("max", ["high", "low"])
    assert [
        goal_of(name)
        for name in ("recall:dinov2_vitl14@10k/ode50", "kid:inception@10k/ode50", "sfid:inception@1k/ode2")
    ] == ["max", "min", "min"]


def recorded(root: RunsRoot, run_id: str, **protocol):
    with RunWriter(root.run(run_id)) as writer:
        writer.protocols({METRIC: protocol})


def test_runs_whose_recorded_protocols_differ_never_meet_and_the_fields_are_named(build: Build, root: RunsRoot):
    runs = {name: FakeRun(0, {600: value}, run_id=name) for name, value in (("a", 3.0), ("b", 2.0), ("c", 1.0))}
    build([FakeArm(name, [run]) for name, run in runs.items()])
    recorded(root, "a", reference="digits", vae=None, seed=0, versions={"torch": "2.9"})
    recorded(root, "b", reference="digits", vae=None, seed=1, versions={"torch": "2.10"})
    recorded(root, "c", reference="digits", vae="ema", seed=0, versions={"torch": "2.9"})
    first, second = leaderboards(root.path)
    assert (first.frame["arm"].tolist(), dict(first.protocol)) == (["b", "a"], {"vae": None})
    assert (second.frame["arm"].tolist(), dict(second.protocol)) == (["c"], {"vae": "ema"})


def test_seeds_of_an_arm_that_were_measured_differently_stand_apart(build: Build, root: RunsRoot):
    build([FakeArm("arm", [FakeRun(seed, {600: float(seed)}, run_id=f"run{seed}") for seed in range(3)])])
    for seed, extractor in enumerate(("old", "new", "new")):
        recorded(root, f"run{seed}", extractor=extractor)
    old, new = leaderboards(root.path)
    assert (old.frame.iloc[0]["mean"], old.frame.iloc[0]["n"], dict(old.protocol)) == (0.0, 1, {"extractor": "old"})
    assert (new.frame.iloc[0]["mean"], new.frame.iloc[0]["n"], dict(new.protocol)) == (1.5, 2, {"extractor": "new"})


def test_runs_without_recorded_protocols_meet_on_the_same_data_only(build: Build, root: RunsRoot):
    arms = [
        FakeArm(name, constant_runs([1.0]), config={"data": {"source": "imagefolder", "path": path}})
        for name, path in (("a", "x"), ("b", "x"), ("c", "y"))
    ]
    build(arms)
    boards = leaderboards(root.path)
    assert [(board.frame["arm"].tolist(), dict(board.protocol)) for board in boards] == [
        (["a", "b"], {"data.path": "x"}),
        (["c"], {"data.path": "y"}),
    ]


def test_alignment_is_shown_only_where_its_protocol_was_recorded(build: Build, root: RunsRoot):
    aligned = FakeRun(0, dict.fromkeys(STEPS, 1.0), cka=0.4, run_id="aligned")
    build([FakeArm("arm", [aligned]), FakeArm("other", constant_runs([2.0], cka=0.2))])
    with pytest.raises(ResultsError, match=rf"no such metric .*measured: {METRIC}"):
        leaderboards(root.path, metric="heldout/cka")
    with RunWriter(root.run("aligned")) as writer:
        writer.protocols({"heldout/cka": {"encoder": "dinov2_vitb14"}})
    board = only(root.path, metric="heldout/cka")
    assert (board.goal, board.frame["arm"].tolist()) == ("max", ["arm"])
    assert [board.metric for board in leaderboards(root.path)] == [METRIC]


@pytest.fixture
def cli(monkeypatch, capsys):
    """`repa-lab leaderboard` in this process, where starting costs nothing."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["repa-lab", "leaderboard", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code or 0, stdout=printed.out, stderr=printed.err)

    return call


def test_the_command_line_prints_tables_and_json(build: Build, root: RunsRoot, cli):
    build(
        [
            FakeArm("base", constant_runs([30.0, 32.0, 34.0]), config=SIT),
            FakeArm("aligned", constant_runs([20.0]), config=REPA),
        ],
        name="mine",
    )
    shown = cli(root.path).stdout
    assert f"{METRIC} (lower is better)" in shown
    assert shown.index("aligned") < shown.index("base")
    assert "32.00 [27.03, 36.97]" in shown and "3 of 3" in shown and "38400" in shown
    assert cli("--root", root.path).stdout == shown
    (board,) = json.loads(cli(root.path, "--metric", "fid", "--json").stdout)
    assert (board["metric"], board["goal"], board["protocol"]) == (METRIC, "min", {})
    first = board["arms"][0]
    assert (first["arm"], first["mean"], first["low"]) == ("aligned", 20.0, None)


def test_what_is_not_there_is_said_in_one_line(build: Build, root: RunsRoot, tmp_path, cli):
    nowhere = cli(tmp_path / "nowhere")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1) and "no such folder" in nowhere.stderr
    build([FakeArm("base", constant_runs([1.0]))])
    done = cli(root.path, "--protocol", "@50k")
    assert (done.returncode, done.stderr) == (
        2,
        f"no such metric with a protocol in '{root.path}'; measured: {METRIC}\n",
    )


def test_a_damaged_record_of_protocols_sets_its_run_apart_and_ends_nothing(build: Build, root: RunsRoot, cli):
    config = {**SIT, "data": {"source": "digits", "flip": True}}
    build(
        [
            FakeArm(name, [FakeRun(0, {600: value}, run_id=name)], config=config)
            for name, value in (("a", 3.0), ("b", 2.0))
        ]
    )
    recorded(root, "a", reference="digits")
    (root.run("b").path / "protocols.json").write_text('{"x": ')
    shown = cli(root.path)
    assert (shown.returncode, shown.stderr) == (
        0,
        "b, seed 0 (run b): protocols.json: cannot be read (DamagedFileError).\n",
    )
    boards = json.loads(cli(root.path, "--json").stdout)
    assert {(board["arms"][0]["arm"], len(board["arms"]), board["protocol"].get("data.flip")) for board in boards} == {
        ("a", 1, None),
        ("b", 1, True),
    }


def test_what_could_not_be_read_is_said_once_a_run_beside_the_tables(build: Build, root: RunsRoot, cli):
    build([FakeArm("whole", constant_runs([1.0]))], name="one")
    assert cli(root.path).stderr == ""
    shared = FakeRun(0, {100: 3.0, 200: 2.0}, run_id="shared")
    for name in ("two", "three"):
        build([FakeArm("cut", [shared])], name=name)
    rows = root.run("shared").path / "metrics.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"step": 3\n')
    number = len(rows.read_bytes().splitlines())
    line = f"cut, seed 0 (run shared): metrics.jsonl:{number}: not JSON; the line is left out.\n"
    table, found = cli(root.path), cli(root.path, "--json")
    assert (table.stderr, found.stderr) == (line, line)
    (board,) = json.loads(found.stdout)
    assert {arm["arm"]: arm["mean"] for arm in board["arms"]} == {"whole": 1.0, "cut": 2.0}
    nothing = cli(root.path, "--protocol", "@50k")
    assert nothing.stderr == f"{line}no such metric with a protocol in '{root.path}'; measured: {METRIC}\n"


def test_a_leaderboard_waits_neither_for_pandas_nor_for_the_settings_of_specs(build: Build, root: RunsRoot):
    build([FakeArm("base", constant_runs([30.0, 32.0]), config=SIT)])
    code = """
import sys
from repa_lab.report import leaderboards
print([row["mean"] for row in leaderboards(sys.argv[1])[0].rows], sys.modules.keys() & {"pandas", "repa_lab.spec"})
"""
    command = [sys.executable, "-c", code, str(root.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[31.0] set()\n"
