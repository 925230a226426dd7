from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from repa_lab.runs import RunsRoot, RunWriter, SweepManifest
from repa_lab.runs.files import DamagedFileError
from repa_lab.runs.root import UnknownRunError


@pytest.fixture
def root(tmp_path) -> RunsRoot:
    return RunsRoot(tmp_path / "runs")


def manifest(*arms: tuple[str, list[tuple[int, str]]]) -> SweepManifest:
    records = [{"label": label, "runs": [{"seed": s, "run_id": i} for s, i in runs]} for label, runs in arms]
    return SweepManifest(name="s", compare={"metric": "m"}, arms=records)


def links(root: RunsRoot) -> dict[str, str]:
    folder = root.sweep("s").path / "runs"
    return {link.name: str(link.readlink()) for link in folder.iterdir()}


def test_where_things_are(root):
    assert root.run("abc").path == root.path / "by-id" / "abc"
    assert root.sweep("s").path == root.path / "s"
    assert root.cache == root.path / "cache"
    assert root.sweep("s").root.path == root.path
    assert (root.runs(), root.sweeps()) == ([], [])
    assert not root.path.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "a/..", ".hidden", "a\0b", "x/"])
def test_no_name_leads_out_of_the_root(root, name):
    for made in (root.run, root.sweep):
        with pytest.raises(ValueError, match="cannot be the name of a run or a sweep"):
            made(name)


def test_runs_that_were_described(root):
    for run_id in ("b", "a"):
        with RunWriter(root.run(run_id)) as writer:
            writer.describe({"seed": 0}, {})
    root.run("never").path.mkdir()
    assert [run.run_id for run in root.runs()] == ["a", "b"]


class TestSweeps:
    def test_what_is_recorded_is_read(self, root):
        given = manifest(("baseline", [(0, "aaa"), (1, "bbb")]), ("w=0.5", [(0, "ccc")]))
        root.sweep("s").record(given)
        assert root.sweep("s").manifest == given
        assert [sweep.path for sweep in root.sweeps()] == [root.path / "s"]

    def test_links_lead_to_the_runs_wherever_the_root_is_moved(self, root, tmp_path):
        with RunWriter(root.run("aaa")) as writer:
            writer.describe({"seed": 0}, {})
        root.sweep("s").record(manifest(("weight=0.5, lr=1e-05", [(0, "aaa"), (1, "bbb")])))
        assert links(root) == {
            "weight=0.5__lr=1e-05-seed0": "../../by-id/aaa",
            "weight=0.5__lr=1e-05-seed1": "../../by-id/bbb",
        }
        moved = Path(root.path.rename(tmp_path / "moved"))
        assert (moved / "s" / "runs" / "weight=0.5__lr=1e-05-seed0" / "spec.json").is_file()

    def test_recording_again_replaces_the_links(self, root):
        root.sweep("s").record(manifest(("a", [(0, "aaa")]), ("b", [(0, "bbb")])))
        root.sweep("s").record(manifest(("b", [(0, "ccc")])))
        assert links(root) == {"b-seed0": "../../by-id/ccc"}

    def test_labels_that_read_alike_get_links_of_their_own(self, root):
        root.sweep("s").record(manifest(("a b", [(0, "aaa")]), ("a/b", [(0, "bbb")]), ("a_b", [(0, "ccc")])))
        assert sorted(links(root).values()) == ["../../by-id/aaa", "../../by-id/bbb", "../../by-id/ccc"]

    def test_one_run_under_labels_that_read_alike_has_one_link(self, root):
        root.sweep("s").record(
            manifest(*((label, [(0, "aaa")]) for label in ("a b", "a+b", "a*b")), ("a/b", [(0, "bbb")]))
        )
        assert links(root) == {"a_b-seed0": "../../by-id/aaa", "a_b-seed0-bbb": "../../by-id/bbb"}

    def test_labels_of_any_length_and_any_letters(self, root):
        arms = [(f"{'é' * 400} {i}", [(0, f"{i}{'f' * 11}")]) for i in range(3)]
        arms.append(("\U00020000" * 300, [(0, "ddd")]))
        root.sweep("s").record(manifest(*arms))
        assert len(links(root)) == 4

    def test_a_label_cannot_lead_a_link_astray(self, root):
        root.sweep("s").record(manifest(("../../../etc", [(0, "aaa")]), ("..", [(0, "bbb")])))
        assert set(links(root).values()) == {"../../by-id/aaa", "../../by-id/bbb"}
        assert all("/" not in name for name in links(root))


class TestCopies:
    """A root, or a sweep's folder, that was copied with its links followed."""

    @pytest.fixture
    def copied(self, root, tmp_path) -> RunsRoot:
        for run_id in ("aaa", "bbb"):
            with RunWriter(root.run(run_id)) as writer:
                writer.describe({"seed": 0}, {})
        root.sweep("s").record(manifest(("a b", [(0, "aaa")]), ("a_b", [(0, "bbb")])))
        return RunsRoot(Path(shutil.copytree(root.path, tmp_path / "copy", symlinks=False)))

    def places(self, root: RunsRoot) -> dict[str, str]:
        return {run.run_id: str(run.path.relative_to(root.path)) for run in root.runs()}

    def test_a_run_is_where_it_is_trained(self, copied):
        assert self.places(copied) == {"aaa": "by-id/aaa", "bbb": "by-id/bbb"}
        copied.adopt_copies()
        assert self.places(copied) == {"aaa": "by-id/aaa", "bbb": "by-id/bbb"}
        assert len(list(copied.sweep("s").links.iterdir())) == 2

    def test_or_in_the_place_of_its_link_until_it_is_moved(self, copied):
        shutil.rmtree(copied.path / "by-id" / "bbb")
        root = RunsRoot(copied.path)
        assert self.places(root) == {"aaa": "by-id/aaa", "bbb": "s/runs/a_b-seed0-bbb"}
        assert root.run("bbb").spec == {"seed": 0}
        root.adopt_copies()
        assert self.places(RunsRoot(root.path)) == {"aaa": "by-id/aaa", "bbb": "by-id/bbb"}
        assert root.run("bbb").path == root.path / "by-id" / "bbb"
        root.sweep("s").record(root.sweep("s").manifest)
        assert str((root.sweep("s").links / "a_b-seed0-bbb").readlink()) == "../../by-id/bbb"

    def test_an_unreadable_manifest_hides_its_own_copies_alone(self, copied):
        shutil.copytree(copied.path / "s", copied.path / "damaged")  # before "s"
        (copied.path / "damaged" / "sweep.json").write_text("{")
        shutil.rmtree(copied.path / "by-id")
        assert self.places(RunsRoot(copied.path)) == {"aaa": "s/runs/a_b-seed0", "bbb": "s/runs/a_b-seed0-bbb"}

    def test_a_backup_of_a_sweep_is_read_by_its_name_alone(self, copied):
        (copied.path / "s").rename(copied.path / "backup")
        shutil.rmtree(copied.path / "by-id")
        root = RunsRoot(copied.path)
        assert root.runs() == []  # a run that was deleted is trained again
        root.adopt_copies()
        backup = root.find_sweep(Path("backup"))
        assert backup.run("bbb").spec == root.find_run(backup.links / "a_b-seed0-bbb").spec == {"seed": 0}

    def test_nothing_is_moved_out_of_a_linked_sweep(self, copied, tmp_path):
        shutil.rmtree(copied.path / "by-id")
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "s").symlink_to(copied.path / "s")
        ours = RunsRoot(tmp_path / "ours")
        ours.adopt_copies()
        assert len(list((copied.path / "s" / "runs").iterdir())) == 2
        assert ours.runs() == []
        assert ours.sweep("s").run("aaa").spec == {"seed": 0}

    def test_what_is_not_a_run_stays_where_it_is(self, copied):
        links = copied.sweep("s").links
        (links / "notes").mkdir()
        (links / "plot.png").touch()
        copied.sweep("s").record(manifest())
        assert {path.name for path in links.iterdir()} == {"a_b-seed0", "a_b-seed0-bbb", "notes", "plot.png"}


class TestFindingARun:
    @pytest.fixture
    def run(self, root):
        with RunWriter(root.run("aaa")) as writer:
            writer.describe({"seed": 0}, {})
        root.sweep("s").record(manifest(("a", [(0, "aaa")])))
        return root.run("aaa")

    def test_by_its_id_its_folder_or_a_link_to_it(self, root, run, tmp_path, monkeypatch):
        (tmp_path / "mine").symlink_to(run.path)
        monkeypatch.chdir(run.path)
        for name in ("aaa", run.path, root.sweep("s").links / "a-seed0", tmp_path / "mine", "."):
            assert (root.find_run(Path(name)).path, root.find_run(Path(name)).run_id) == (run.path, "aaa")

    @pytest.mark.parametrize("name", ["bbb", "../aaa", "s/aaa", ".", ""])
    def test_what_is_none_is_refused(self, root, run, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnknownRunError, match=r"no run '.*' in .*; `repa-lab status` lists them"):
            root.find_run(Path(name))

    def test_a_link_in_the_place_of_a_run_is_not_followed(self, root, run, tmp_path):
        run.path.rename(tmp_path / "elsewhere")
        run.path.symlink_to(tmp_path / "elsewhere")
        for name in (Path("aaa"), run.path, root.sweep("s").links / "a-seed0"):
            assert root.find_run(name).path == run.path

    def test_a_copy_in_the_place_of_a_link_is_the_run(self, root, run):
        link = root.sweep("s").links / "a-seed0"
        link.unlink()
        shutil.copytree(run.path, link)
        assert root.find_run(link).path == run.path


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[]", "/s/sweep.json' is damaged: no JSON object"),
        ("null", "/s/sweep.json' is damaged: no JSON object"),
        ('{"arms": []}', "/s/sweep.json' has no format number: this version of repa-lab reads format 1; use the"),
        ('{"format": 2, "arms": []}', "/s/sweep.json' has format 2: this version of repa-lab reads format 1; use the"),
        ('{"format": 1, "name": "s", "compare": {"metric": "m"}}', "/s/sweep.json' is damaged: arms: Field required"),
        (
            '{"format": 1, "name": "s", "compare": {"metric": "m", "goal": "up"}, "arms": []}',
            "/s/sweep.json' is damaged: compare.goal: Input should be 'min' or 'max'",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_in_one_line(root, content, what):
    directory = root.sweep("s")
    directory.path.mkdir(parents=True)
    (directory.path / "sweep.json").write_text(content)
    with pytest.raises(DamagedFileError) as caught:
        _ = directory.manifest
    assert what in str(caught.value) and "\n" not in str(caught.value)
