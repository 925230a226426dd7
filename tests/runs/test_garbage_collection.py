"""What is deleted when disk is short, from real run directories."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from repa_lab.runs import RunsRoot, RunWriter, State, SweepManifest, checkpoints, files
from repa_lab.runs.garbage_collection import collect, find_garbage, size_of

SIZE = 1000
_NAMES = ("a", "b", "c", "busy", "done", "failed", "interrupted", "left", "new", "pinned", "pruned", "running")
NAMES = {hashlib.sha256(name.encode()).hexdigest()[:12]: name for name in _NAMES}
IDS = {name: run_id for run_id, name in NAMES.items()}


@pytest.fixture
def root(tmp_path):
    return RunsRoot(tmp_path / "runs")


def make(root, name: str, state: State, steps=(100, 200)):
    run = root.run(IDS[name])
    with RunWriter(run) as writer:
        writer.describe({"name": name}, {})
        for step in steps:
            checkpoints.commit(
                run.checkpoints, step, lambda folder: (folder / "weights").write_bytes(b"x" * SIZE) and None
            )
        writer.state(state, max(steps, default=0))
    return run


def paths(found) -> set[str]:
    return {"/".join(NAMES.get(part, part) for part in one.path.parts[-3:]) for one in found}


def test_the_last_good_checkpoint_of_a_run_that_can_go_on_stays(root):
    for state in (State.INTERRUPTED, State.FAILED, State.RUNNING, State.NEW):
        make(root, state.value, state)
    make(root, "done", State.DONE)
    assert collect(root) == ([], [])
    assert paths(collect(root, disk_bytes=0)[0]) == {"done/checkpoints/step-00000100"}
    assert checkpoints.steps(root.run(IDS["done"]).checkpoints) == [200]


def test_a_damaged_newest_checkpoint_is_not_the_last_good_one(root):
    run = make(root, "done", State.DONE)
    (run.checkpoints / "step-00000200" / "weights").write_bytes(b"y")
    assert paths(collect(root, disk_bytes=0)[0]) == {"done/checkpoints/step-00000200"}
    assert checkpoints.latest(run.checkpoints)[0] == 100


def test_what_is_of_no_use_goes_at_once(root):
    pruned = make(root, "pruned", State.PRUNED)
    left = make(root, "left", State.INTERRUPTED)
    (left.checkpoints / ".tmp-1").mkdir()
    (left.checkpoints / ".tmp-1" / "half").write_bytes(b"z" * 5)
    (left.checkpoints / "corrupt-step-00000050").mkdir()
    gone, skipped = collect(root)
    assert not skipped
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
    assert collect(root) == ([], [])


def test_a_pinned_run_and_one_in_training_are_left_alone(root):
    make(root, "pinned", State.PRUNED)
    root.run(IDS["pinned"]).pin.touch()
    busy = make(root, "busy", State.PRUNED)
    with RunWriter(busy):
        assert find_garbage(root) == []
    assert [item.kind for item in find_garbage(root)] == ["useless"] * 2


def test_what_runs_may_begin_from_stays_while_a_sweep_is_carried_out(root):
    run = make(root, "done", State.DONE)
    checkpoints.commit(run.forks, 100, lambda folder: (folder / "weights").write_bytes(b"x") and None)
    root.sweep("s").path.mkdir()
    root.sweep("s").record(SweepManifest(name="s", compare={"metric": "m"}, arms=()))
    with FileLock(root.sweep("s").lock):
        assert paths(find_garbage(root)) == {"done/checkpoints/step-00000100"}
    assert paths(find_garbage(root)) == {"done/checkpoints/step-00000100", "done/forks/step-00000100"}


def test_a_limit_takes_no_more_than_it_needs(root):
    for name in ("a", "b", "c"):
        make(root, name, State.DONE)
    before = size_of(root.path)
    gone, _ = collect(root, disk_bytes=before - 1)
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


def test_a_dry_run_writes_nothing_for_the_root_may_be_read_only(root, audited):
    for name, state in (("done", State.DONE), ("pruned", State.PRUNED), ("left", State.INTERRUPTED)):
        make(root, name, state)
    root.sweep("s").path.mkdir()
    root.sweep("s").record(SweepManifest(name="s", compare={"metric": "m"}, arms=()))
    root.sweep("s").lock.touch()
    with audited("open") as opened:
        assert len(collect(root, disk_bytes=0, dry_run=True)[0]) == 3
    paths = [(path, flags) for path, _, flags in opened if str(path).startswith(str(root.path))]
    assert any(str(path).endswith("s/.lock") for path, _ in paths)
    assert [path for path, flags in paths if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)] == []


def test_what_cannot_be_deleted_is_named_and_the_rest_goes(root, monkeypatch):
    for name in ("a", "b"):
        make(root, name, State.PRUNED)
    kept, delete = root.run(IDS["a"]).checkpoints / "step-00000100", files.delete

    def refuse(path: Path) -> None:
        """Delete as on a disk where a folder is another user's."""
        if path == kept:
            raise PermissionError(13, "Permission denied", str(path))
        delete(path)

    monkeypatch.setattr(files, "delete", refuse)
    gone, skipped = collect(root)
    assert (len(gone), reasons(skipped)) == (
        3,
        {"a/checkpoints/step-00000100": "checkpoint of a pruned run: Permission denied"},
    )
    assert skipped[0].kind == "failed" and kept.is_dir()


def test_a_file_of_two_names_counts_once(tmp_path):
    (tmp_path / "one").write_bytes(b"x" * 7)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert size_of(tmp_path) == 7
    assert size_of(tmp_path / "missing") == 0


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return everything below a folder: the content of files, and where links lead."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
    return found


def reasons(skipped) -> dict[str, str]:
    return {path: item.why for item in skipped for path in paths([item])}


def test_nothing_behind_a_link_is_deleted_and_the_rest_is(root, tmp_path):
    other = RunsRoot(tmp_path / "other")
    for name in ("pruned", "left", "done"):
        make(other, name, State.PRUNED)
    before = tree(other.path)
    make(root, "a", State.PRUNED)
    places = {name: other.run(IDS[name]).path for name in ("pruned", "left", "done")}
    (root.path / "by-id" / IDS["pruned"]).symlink_to(places["pruned"])  # a run of another root
    inner = make(root, "left", State.PRUNED).checkpoints  # a folder of checkpoints there
    shutil.rmtree(inner)
    inner.symlink_to(places["left"] / "checkpoints")
    moved = make(root, "done", State.PRUNED).checkpoints / "step-00000100"  # a checkpoint there
    shutil.rmtree(moved)
    moved.symlink_to(places["done"] / "checkpoints" / "step-00000100")
    gone, skipped = collect(root, disk_bytes=0)
    assert paths(gone) == {*(f"a/checkpoints/step-00000{n}00" for n in (1, 2)), "done/checkpoints/step-00000200"}
    assert reasons(skipped) == {
        "runs/by-id/pruned": f"a link to {places['pruned']}",
        "by-id/left/checkpoints": f"a link to {places['left'] / 'checkpoints'}",
        "done/checkpoints/step-00000100": f"a link to {places['done'] / 'checkpoints' / 'step-00000100'}",
    }
    assert tree(other.path) == before


def test_a_root_may_be_a_link_and_its_runs_may_not(root, tmp_path):
    make(root, "pruned", State.PRUNED)
    (tmp_path / "link").symlink_to(root.path)
    assert len(find_garbage(RunsRoot(tmp_path / "link"))) == 2
    other = RunsRoot(tmp_path / "other")
    other.path.mkdir()
    (other.path / "by-id").symlink_to(root.path / "by-id")
    found = find_garbage(other)
    assert ({item.kind for item in found}, paths(found)) == ({"kept"}, {f"{tmp_path.name}/other/by-id"})


def test_names_that_are_not_ours_are_left_and_named(root):
    run = make(root, "pruned", State.PRUNED)
    shutil.copytree(run.path, run.path.with_name(f"{run.run_id}.bak"))
    for name in ("step-2.bak", "step-00000002-hf"):
        (run.checkpoints / name).mkdir()
    (run.forks / "mine").mkdir(parents=True)
    gone, skipped = collect(root, disk_bytes=0)
    assert paths(gone) == {"pruned/checkpoints/step-00000100", "pruned/checkpoints/step-00000200"}
    assert reasons(skipped) == {
        f"runs/by-id/{run.run_id}.bak": "not the name of a run",
        "pruned/checkpoints/step-00000002-hf": "not the name of a checkpoint",
        "pruned/checkpoints/step-2.bak": "not the name of a checkpoint",
        "pruned/forks/mine": "not the name of a checkpoint",
    }


def test_a_damaged_run_does_not_end_the_collection(root):
    make(root, "pruned", State.PRUNED)
    (make(root, "a", State.PRUNED).path / "state.json").write_text("{")
    gone, skipped = collect(root)
    assert len(gone) == 2
    assert "state.json' is damaged" in reasons(skipped)["runs/by-id/a"]


@pytest.fixture
def copied(root, tmp_path) -> RunsRoot:
    """A root copied with its links followed."""
    make(root, "done", State.DONE)
    make(root, "left", State.INTERRUPTED)
    root.sweep("s").path.mkdir()
    arms = [{"label": name, "runs": [{"seed": 0, "run_id": IDS[name]}]} for name in ("done", "left", "new")]
    root.sweep("s").record(SweepManifest(name="s", compare={"metric": "m"}, arms=arms))
    (root.sweep("s").links / "new-seed0").unlink()  # leads nowhere, and such links are not copied
    return RunsRoot(Path(shutil.copytree(root.path, tmp_path / "copy", symlinks=False)))


def test_copies_in_the_place_of_links_are_collected_if_they_are_equal(copied):
    with RunWriter(copied.run(IDS["left"])) as writer:
        writer.state(State.INTERRUPTED, 300)  # the run went on since
    before = size_of(copied.path)
    gone, skipped = collect(copied)
    assert (paths(gone), reasons(skipped)) == (
        {"s/runs/done-seed0"},
        {"s/runs/left-seed0": f"a copy of run {IDS['left']}, from which it differs"},
    )
    assert gone[0].size == before - size_of(copied.path) > 2 * SIZE
    copied.sweep("s").record(copied.sweep("s").manifest)
    links = copied.sweep("s").links
    assert str((links / "done-seed0").readlink()) == f"../../by-id/{IDS['done']}"
    assert not (links / "left-seed0").is_symlink() and (links / "left-seed0" / "spec.json").is_file()


def test_a_backup_of_a_sweep_is_left_whole(copied):
    (copied.path / "s").rename(copied.path / "backup")
    gone, skipped = collect(copied, disk_bytes=0)
    assert paths(gone) == {"done/checkpoints/step-00000100"}
    assert [(item.path.name, item.why) for item in skipped] == [
        ("backup", "a copy of sweep s, with copies of its runs")
    ]


def test_the_only_copy_of_a_run_is_the_run(copied):
    shutil.rmtree(copied.path / "by-id")
    copy = RunsRoot(copied.path)
    assert {run.run_id for run in copy.runs()} == {IDS["done"], IDS["left"]}
    assert paths(find_garbage(copy)) == {"done-seed0/checkpoints/step-00000100"}
