from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from repa_lab.runs import RunDirectory, RunWriter, checkpoints
from repa_lab.runs.files import DamagedFileError, append_row


def content(step: int) -> dict[str, bytes]:
    draw = random.Random(step)
    return {"weights.safetensors": draw.randbytes(300), "progress.json": json.dumps({"step": step}).encode()}


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        for name, data in content(step).items():
            (folder / name).write_bytes(data)

    return write


def commit(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoints.commit(folder, step, writer(step), keep)


def read(folder: Path) -> dict[str, bytes]:
    ours = ("manifest.json", "run.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ours}


def assert_latest(folder: Path, step: int) -> None:
    found = checkpoints.latest(folder)
    assert found is not None
    assert found[0] == step
    assert read(found[1]) == content(step)


class TestCommit:
    def test_a_checkpoint_is_what_was_written(self, tmp_path):
        folder = tmp_path / "run" / "checkpoints"
        path = checkpoints.commit(folder, 600, writer(600))
        assert path == folder / "step-00000600"
        assert read(path) == content(600)
        assert_latest(folder, 600)

    def test_none_yet(self, tmp_path):
        assert checkpoints.latest(tmp_path / "none") is None
        assert checkpoints.steps(tmp_path / "none") == []

    @pytest.mark.parametrize("keep, left", [(1, [40]), (2, [30, 40]), (10, [10, 20, 30, 40])])
    def test_the_newest_stay(self, tmp_path, keep, left):
        commit(tmp_path, 10, 20, 30, 40, keep=keep)
        assert checkpoints.steps(tmp_path) == left
        assert_latest(tmp_path, 40)

    def test_steps_are_ordered_as_numbers(self, tmp_path):
        commit(tmp_path, 9, 100, 123_456_789, keep=5)
        assert checkpoints.steps(tmp_path) == [9, 100, 123_456_789]
        assert_latest(tmp_path, 123_456_789)

    def test_a_step_written_again_replaces_the_first(self, tmp_path):
        commit(tmp_path, 10)
        checkpoints.commit(tmp_path, 10, lambda folder: (folder / "other").write_bytes(b"new") and None)
        assert read(tmp_path / "step-00000010") == {"other": b"new"}
        assert checkpoints.latest(tmp_path) == (10, tmp_path / "step-00000010")

    def test_a_write_that_raises_leaves_the_last_one_in_force(self, tmp_path):
        commit(tmp_path, 10)

        def write(folder: Path) -> None:
            (folder / "weights.safetensors").write_bytes(b"half")
            raise MemoryError

        for step in (20, 10):
            with pytest.raises(MemoryError):
                checkpoints.commit(tmp_path, step, write)
        assert_latest(tmp_path, 10)

    def test_what_a_kill_left_is_swept_away_by_the_next(self, tmp_path):
        commit(tmp_path, 10)
        (tmp_path / ".tmp-abc").mkdir()
        (tmp_path / ".tmp-abc" / "weights.safetensors").write_bytes(b"half")
        assert_latest(tmp_path, 10)
        commit(tmp_path, 20)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8 % len(data)] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit of the weights": lambda folder: flip_bit(folder / "weights.safetensors", 1001),
    "a bit of the progress": lambda folder: flip_bit(folder / "progress.json", 3),
    "truncated weights": lambda folder: truncate(folder / "weights.safetensors"),
    "grown weights": lambda folder: (folder / "weights.safetensors").open("ab").write(b"\0") and None,
    "missing weights": lambda folder: (folder / "weights.safetensors").unlink(),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "truncated manifest": lambda folder: (folder / "manifest.json").write_bytes(b'{"weights'),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "a manifest of something else": lambda folder: (folder / "manifest.json").write_bytes(b"[1, 2]"),
    "a manifest of zeros": lambda folder: (folder / "manifest.json").write_bytes(b"\0" * 100),
}


def save(run: Path, step: int) -> None:
    checkpoints.commit(run / "checkpoints", step, writer(step))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
class TestDamage:
    @pytest.fixture
    def run(self, tmp_path) -> Path:
        for step in (10, 20):
            save(tmp_path, step)
        return tmp_path

    def test_a_reader_takes_the_one_before_and_moves_nothing(self, run, damage):
        folder = run / "checkpoints"
        damage(folder / "step-00000020")
        assert checkpoints.latest(folder) == (10, folder / "step-00000010")
        assert checkpoints.steps(folder) == [10, 20]

    def test_training_falls_back_to_the_one_before_and_keeps_the_evidence(self, run, damage):
        folder = run / "checkpoints"
        damage(folder / "step-00000020")
        for _ in range(2):
            assert checkpoints.resumable(run) == (10, folder / "step-00000010")
        assert checkpoints.steps(folder) == [10]
        (quarantined,) = folder.glob("corrupt-step-00000020-*")
        assert quarantined.is_dir()
        save(run, 20)
        assert checkpoints.resumable(run) == (20, folder / "step-00000020")
        assert quarantined.is_dir()

    def test_with_nothing_to_fall_back_to_there_is_none(self, run, damage):
        folder = run / "checkpoints"
        damage(folder / "step-00000010")
        damage(folder / "step-00000020")
        assert checkpoints.latest(folder) is None
        assert checkpoints.resumable(run) is None
        assert len(list(folder.glob("corrupt-*"))) == 2


def test_no_flipped_bit_anywhere_goes_unseen(tmp_path):
    """Every 23rd bit of every file, the manifest included."""
    commit(tmp_path, 10)
    original = tmp_path / "step-00000010"
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    for name, data in files.items():
        for position in range(0, len(data) * 8, 23):
            flip_bit(original / name, position)
            assert checkpoints.latest(tmp_path) is None, (name, position)
            (original / name).write_bytes(data)
    assert_latest(tmp_path, 10)


class TestSignature:
    """A checkpoint knows its run and the metric rows that were written before it."""

    @pytest.fixture
    def run(self, tmp_path) -> Path:
        """A run with two rows before each of its checkpoints at steps 10 and 20, and one row after them."""
        run = tmp_path / "abc"
        run.mkdir()
        for step in (10, 20):
            for kind in ("train", "measured"):
                append_row(run / "metrics.jsonl", {"step": step, "kind": kind, "loss": 0.1 * step})
            save(run, step)
        append_row(run / "metrics.jsonl", {"step": 25})
        return run

    def lines(self, run: Path) -> list[str]:
        return (run / "metrics.jsonl").read_text().splitlines(keepends=True)

    def test_names_the_run_and_the_rows(self, run):
        signature = json.loads((run / "checkpoints" / "step-00000020" / "run.json").read_text())
        rows = "".join(self.lines(run)[1:5]).rstrip("\n")
        digest = hashlib.sha256(rows.encode()).hexdigest()
        assert signature == {"format": 1, "run_id": "abc", "rows": 4, "rows_sha256": digest}
        assert checkpoints.resumable(run) == (20, run / "checkpoints" / "step-00000020")

    def test_rows_after_it_may_be_dropped_and_written_again(self, run):
        writer = RunWriter(RunDirectory(run))
        with writer:
            writer.rewind(20)
        assert len(self.lines(run)) == 5
        assert checkpoints.resumable(run)[0] == 20

    def test_where_rows_are_lost_an_older_one_is_taken_and_newer_ones_stay_out_of_the_way(self, run):
        (run / "metrics.jsonl").write_text("".join(self.lines(run)[:4]))
        assert checkpoints.resumable(run)[0] == 10
        assert checkpoints.steps(run / "checkpoints") == [10]
        assert len(list((run / "checkpoints").glob("corrupt-step-00000020-*"))) == 1

    @pytest.mark.parametrize("edited", ["0.5", "missing"])
    def test_rows_that_fit_none_are_an_error_and_everything_stays(self, run, edited):
        if edited == "missing":
            (run / "metrics.jsonl").unlink()
        else:
            (run / "metrics.jsonl").write_text("".join(self.lines(run)).replace('"loss": 1.0', f'"loss": {edited}'))
        match = r"metrics.jsonl' lacks rows that were written before 'step-00000020'; restore it, or delete '.*abc' to"
        with pytest.raises(DamagedFileError, match=match):
            checkpoints.resumable(run)
        assert checkpoints.steps(run / "checkpoints") == [10, 20]

    def test_those_of_another_run_or_version_are_an_error(self, run):
        other = run.with_name("def")
        shutil.copytree(run, other)
        with pytest.raises(DamagedFileError, match="step-00000020' belongs to run abc; "):
            checkpoints.resumable(other)
        commit(run / "checkpoints", 30, 40)
        for step in (30, 40):
            unsigned = run / "checkpoints" / f"step-{step:08d}"
            (unsigned / "run.json").unlink()
            manifest = json.loads((unsigned / "manifest.json").read_text())
            del manifest["files"]["run.json"]
            (unsigned / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DamagedFileError, match="step-00000040' is of another version of repa-lab; "):
            checkpoints.resumable(run)

    def test_without_any_there_is_nothing_to_resume(self, tmp_path):
        assert checkpoints.resumable(tmp_path) is None


class TestForeign:
    """Links and odd names among checkpoints are not ours."""

    ODD = (
        "step-2.bak",
        "step-00000002-hf",
        "step-2",
        "step-000000020",
        "step-00000020 (1)",
        "step-²",
        "notes",
        "step-",
    )

    @pytest.fixture
    def run(self, tmp_path) -> Path:
        run = tmp_path / "abc"
        for step in (10, 20):
            save(run, step)
        for name in self.ODD:
            (run / "checkpoints" / name).mkdir()
            (run / "checkpoints" / name / "mine").write_text(name)
        return run

    @pytest.fixture
    def moved(self, run, tmp_path) -> Path:
        """The checkpoint of step 20, moved to another disk, with a link in its place."""
        moved = tmp_path / "disk"
        (run / "checkpoints" / "step-00000020").rename(moved)
        (run / "checkpoints" / "step-00000020").symlink_to(moved)
        return moved

    def assert_kept(self, folder: Path) -> None:
        assert [(folder / name / "mine").read_text() for name in self.ODD] == list(self.ODD)

    def test_odd_names_are_no_checkpoints(self, run):
        folder = run / "checkpoints"
        assert checkpoints.steps(folder) == [10, 20]
        assert checkpoints.resumable(run) == (20, folder / "step-00000020")
        save(run, 30)
        assert checkpoints.steps(folder) == [20, 30]
        self.assert_kept(folder)

    def test_a_link_is_read_and_what_it_leads_to_is_never_deleted(self, run, moved):
        folder, before = run / "checkpoints", read(moved)
        assert checkpoints.resumable(run) == (20, folder / "step-00000020")
        for step in (30, 40, 50):
            save(run, step)
        assert checkpoints.steps(folder) == [20, 40, 50]
        save(run, 20)
        assert not (folder / "step-00000020").is_symlink()
        (aside,) = folder.glob("corrupt-step-00000020-*")
        assert aside.is_symlink()
        assert read(moved) == before

    def test_a_link_to_a_disk_that_is_not_there_waits_for_it(self, run, moved):
        moved.rename(moved.with_name("elsewhere"))
        assert checkpoints.resumable(run)[0] == 10
        moved.with_name("elsewhere").rename(moved)
        assert checkpoints.resumable(run)[0] == 20

    def test_a_run_that_starts_over_sees_no_earlier_checkpoint(self, run, moved):
        before = read(moved)
        with RunWriter(RunDirectory(run)) as writer:
            left = {path.name for path in writer.start_over()}
        assert left > set(self.ODD) and {name[:21] for name in left - set(self.ODD)} == {"corrupt-step-00000020"}
        assert checkpoints.resumable(run) is None
        assert checkpoints.steps(run / "checkpoints") == []
        assert read(moved) == before
        self.assert_kept(run / "checkpoints")

    def test_a_file_with_the_name_of_a_checkpoint_makes_way(self, run):
        (run / "checkpoints" / "step-00000030").write_text("a note")
        assert checkpoints.resumable(run)[0] == 20
        save(run, 30)
        assert checkpoints.resumable(run)[0] == 30
        assert [path.read_text() for path in (run / "checkpoints").glob("corrupt-step-00000030-*")] == ["a note"]
