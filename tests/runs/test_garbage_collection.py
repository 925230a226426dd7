"""What is deleted when disk is short, from real run directories."""

from __future__ import annotations

import pytest
from filelock import FileLock

from repa_lab.runs import RunsRoot, RunWriter, State, SweepManifest, checkpoints
from repa_lab.runs.garbage_collection import collect, find_garbage, size_of

SIZE = 1000


@pytest.fixture
def root(tmp_path):
    return RunsRoot(tmp_path / "runs")


def make(root, name: str, state: State, steps=(100, 200)):
    run = root.run(name)
    with RunWriter(run) as writer:
        writer.describe({"name": name}, {})
        for step in steps:
            checkpoints.commit(
                run.checkpoints, step, lambda folder: (folder / "weights").write_bytes(b"x" * SIZE) and None
            )
        writer.state(state, max(steps, default=0))
    return run


def paths(found) -> set[str]:
    return {"/".join(one.path.parts[-3:]) for one in found}


def test_the_last_good_checkpoint_of_a_run_that_can_go_on_stays(root):
    for state in (State.INTERRUPTED, State.FAILED, State.RUNNING, State.NEW):
        make(root, state.value, state)
    make(root, "done", State.DONE)
    assert collect(root) == []
    assert paths(collect(root, disk_bytes=0)) == {"done/checkpoints/step-00000100"}
    assert checkpoints.steps(root.run("done").checkpoints) == [200]


def test_a_damaged_newest_checkpoint_is_not_the_last_good_one(root):
    run = make(root, "done", State.DONE)
    (run.checkpoints / "step-00000200" / "weights").write_bytes(b"y")
    assert paths(collect(root, disk_bytes=0)) == {"done/checkpoints/step-00000200"}
    assert checkpoints.latest(run.checkpoints)[0] == 100


def test_what_is_of_no_use_goes_at_once(root):
    pruned = make(root, "pruned", State.PRUNED)
    left = make(root, "left", State.INTERRUPTED)
    (left.checkpoints / ".tmp-1").mkdir()
    (left.checkpoints / ".tmp-1" / "half").write_bytes(b"z" * 5)
    (left.checkpoints / "corrupt-step-00000050").mkdir()
    gone = collect(root)
    assert paths(gone) == {
        "pruned/checkpoints/step-00000100",
        "pruned/checkpoints/step-00000200",
        "left/checkpoints/.tmp-1",
        "left/checkpoints/corrupt-step-00000050",
    }
    assert not any(one.path.exists() for one in gone)
    assert {one.size for one in gone if one.path.name == ".tmp-1"} == {5}
    assert checkpoints.steps(left.checkpoints) == [100, 200]
    assert checkpoints.steps(pruned.checkpoints) == []
    assert collect(root) == []


def test_a_pinned_run_and_one_in_training_are_left_alone(root):
    make(root, "pinned", State.PRUNED)
    root.run("pinned").pin.touch()
    busy = make(root, "busy", State.PRUNED)
    with RunWriter(busy):
        assert find_garbage(root) == []
    assert len(find_garbage(root)) == 2


def test_what_runs_may_begin_from_stays_while_a_sweep_is_carried_out(root):
    run = make(root, "done", State.DONE)
    checkpoints.commit(run.forks, 100, lambda folder: (folder / "weights").write_bytes(b"x") and None)
    root.sweep("s").path.mkdir()
    root.sweep("s").record(SweepManifest(name="s", compare={"metric": "m"}, arms=()))
    with FileLock(root.sweep("s").lock):
        assert paths(find_garbage(root)) == {"done/checkpoints/step-00000100"}
    assert paths(find_garbage(root)) == {"done/checkpoints/step-00000100", "by-id/done/forks"}


def test_a_limit_takes_no_more_than_it_needs(root):
    for name in ("a", "b", "c"):
        make(root, name, State.DONE)
    before = size_of(root.path)
    gone = collect(root, disk_bytes=before - 1)
    assert len(gone) == 1
    assert size_of(root.path) == before - gone[0].size
    assert gone[0].size > SIZE


def test_a_dry_run_deletes_nothing_and_says_the_same(root):
    make(root, "a", State.DONE)
    make(root, "b", State.PRUNED)
    before = size_of(root.path)
    would = collect(root, disk_bytes=0, dry_run=True)
    assert size_of(root.path) == before
    assert collect(root, disk_bytes=0) == would


def test_a_file_of_two_names_counts_once(tmp_path):
    (tmp_path / "one").write_bytes(b"x" * 7)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert size_of(tmp_path) == 7
    assert size_of(tmp_path / "missing") == 0
