"""Data sets of the hub, from a real server on this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import huggingface_hub.constants
import numpy as np
import pytest

from repa_lab.data import DataError
from repa_lab.data import huggingface as module
from repa_lab.data.huggingface import count_rows, resolve_commit
from repa_lab.data.settings import BucketsConfig, HubSettings
from repa_lab.data.sources import TableImages, open_hub
from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.display import sentences
from repa_lab.orchestration.plan import identify_run, make_plan
from repa_lab.runs import RunsRoot
from repa_lab.spec import load_spec
from repa_lab.spec.identity import Run
from repa_lab.training.batches import open_images
from tests.data.conftest import noise_image
from tests.data.hub_server import Hub, Repository, serve

NAME, OLD, NEW = "owner/Few-Images", "a" * 40, "b" * 40
SPEC = {
    "name": "hubs", "model": {"family": "sit", "size": "nano/4"}, "train": {"steps": 8},
    "data": {"source": "hub", "name": NAME, "resolution": 16, "holdout": 1},
    "evaluate": {"every": 4, "samples": 16, "extractor": {"name": "efficientnet_lite0"}},
}  # fmt: skip


def parquet(first: int) -> bytes:
    """Five captioned images of two classes."""
    features = {"words": "string", "image": None, "caption": "string", "label": None}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    columns = {
        "words": list("vwxyz"),
        "image": [noise_image(first + i, (16, 16)) for i in range(5)],
        "caption": [f"number {first + i}" for i in range(4)] + [None],
        "label": [0, 1, 0, 1, 0],
    }
    schema = datasets.Features({name: kinds.get(name) or datasets.Value(kind) for name, kind in features.items()})
    stream = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=schema).to_parquet(stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def commits() -> dict[str, dict[str, bytes]]:
    datasets.disable_progress_bars()
    card, file = b"---\nlicense: cc0-1.0\n---\n", "data/train-00000-of-00001.parquet"
    return {OLD: {"README.md": card, file: parquet(0)}, NEW: {"README.md": card, file: parquet(10)}}


def forget() -> None:
    """As a new process would begin."""
    module._hub_facts.cache_clear()
    module._ask_hub.cache_clear()
    fsspec.AbstractFileSystem.clear_instance_cache()
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def hub(monkeypatch, tmp_path, commits) -> Iterator[Hub]:
    """A hub with a data set of two commits, and empty caches."""
    counts = [{"name": "train", "num_examples": 5}, {"name": "test", "num_examples": 2}]
    repository = Repository(commits, {"main": OLD}, {"dataset_info": {"splits": counts}})
    with serve({NAME: repository}) as running:
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for holder in (huggingface_hub.constants, datasets.config):
            monkeypatch.setattr(holder, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", running.endpoint)
        for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
            monkeypatch.setattr(datasets.config, name, tmp_path / "datasets" / name)
        forget()
        yield running
        forget()


def opened(split: str = "train", commit: str = OLD, captions: str | None = None) -> TableImages:
    settings = HubSettings(name=NAME, split=split, revision=commit, resolution=16, caption_column=captions)
    return open_hub(settings)


def refusal(*args, **options) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        opened(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value.field, str(caught.value)


class TestImages:
    def test_are_those_of_the_split_at_the_commit(self, hub):
        source = opened()
        assert (len(source), source.num_classes, source.labels.tolist()) == (5, 2, [0, 1, 0, 1, 0])
        assert source.captions == ["number 0", "number 1", "number 2", "number 3", ""]
        assert source.notes == ("1 of 5 images have no caption: they are trained with the empty one",)
        for number, pixels in enumerate(source.read(range(5))):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(noise_image(number, (16, 16))))
        assert opened(commit=NEW, captions="words").captions == list("vwxyz")
        assert np.array_equal(
            opened(commit=NEW).read([1])[0].permute(1, 2, 0).numpy(), np.asarray(noise_image(11, (16, 16)))
        )

    def test_a_copy_of_the_commit_is_taken_without_asking_the_hub(self, hub):
        first = opened()
        hub.asked.clear()
        assert opened("train[1:3]").captions == first.captions[1:3]
        assert hub.asked == []

    def test_another_commit_never_stands_in_for_the_one_that_is_wanted(self, hub, monkeypatch):
        opened()
        for holder in (huggingface_hub.constants, datasets.config):
            monkeypatch.setattr(holder, "HF_HUB_OFFLINE", True)
        assert len(opened()) == 5
        forget()
        field, message = refusal(commit=NEW)
        assert field == "name" and message.startswith(f"the hub cannot be reached for '{NAME}' (")

    def test_what_is_not_there_is_refused(self, hub):
        assert refusal("test") == (
            "split",
            f"cannot take 'test' of '{NAME}': Unknown split \"test\". Should be one of ['train'].",
        )
        assert refusal(captions="text") == (
            "caption_column",
            "no column 'text'; there are: words, image, caption, label",
        )
        assert refusal(commit="c" * 40) == ("revision", f"'{NAME}' has no revision '{'c' * 40}'")


class TestCommit:
    def test_a_branch_is_resolved_and_stays_for_the_process(self, hub):
        assert [resolve_commit(NAME, None), resolve_commit(NAME, "main")] == [OLD, OLD]
        hub.repositories[NAME].branches["main"] = NEW
        assert resolve_commit(NAME, "main") == OLD
        forget()
        assert resolve_commit(NAME, "main") == NEW
        asked = len(hub.asked)
        assert resolve_commit("whatever/else", "d" * 40) == "d" * 40
        assert len(hub.asked) == asked

    @pytest.mark.parametrize("name, revision, field, message", [
        (NAME, "gone", "revision", f"'{NAME}' has no revision 'gone'"),
        ("owner/none", None, "name", "the hub has no data set 'owner/none'; if it is private, run `hf auth login`"),
        ("a/b/c", None, "name", "'a/b/c' is no id of a data set: "),
    ])  # fmt: skip
    def test_what_the_hub_does_not_have_is_refused(self, hub, name, revision, field, message):
        with pytest.raises(DataError) as caught:
            resolve_commit(name, revision)
        assert caught.value.field == field and str(caught.value).startswith(message)

    def test_a_hub_that_is_not_there_is_asked_once(self, hub, monkeypatch, audited):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with audited("socket.connect") as connections:
            for _ in range(3):
                with pytest.raises(
                    DataError, match=f"^the hub cannot be reached for '{NAME}' .*: go online, or give as data.re"
                ):
                    resolve_commit(NAME, None)
        assert [address for _, address in connections] == [("127.0.0.1", 9)]

    def test_every_part_shows_in_the_fingerprint(self):
        parts = [
            {}, {"name": "x/y"}, {"config": "c"}, {"split": "test"}, {"revision": NEW}, {"resolution": 32},
            {"buckets": BucketsConfig(step=4)},
        ]  # fmt: skip
        settings = [HubSettings(**{"name": NAME, "revision": OLD, "resolution": 16, **part}) for part in parts]
        assert len({one.fingerprint for one in settings}) == 7

    def test_the_number_of_rows_is_that_of_the_card(self, hub):
        splits = ("train", "test", "other", "train[:3]", "train[1:]")
        counts = {split: count_rows(NAME, None, split, OLD) for split in splits}
        assert counts == {"train": 5, "test": 2, "other": None, "train[:3]": 3, "train[1:]": None}


class TestRuns:
    def test_a_moved_branch_is_a_new_run_and_a_run_records_the_commit(self, hub, tmp_path):
        def planned() -> Run:
            forget()
            return make_plan(load_spec(SPEC), RunsRoot(tmp_path / "runs")).runs[0].run

        first = planned()
        assert first.config.data.revision == OLD
        hub.repositories[NAME].branches["main"] = NEW
        moved = planned()
        assert (moved.config.data.revision, moved.run_id == first.run_id) == (NEW, False)
        again = Run.from_json(first.run_id, json.loads(json.dumps(first.to_json())))
        assert identify_run(again.config, again.seed) == first
        assert open_images(again.config.data, tmp_path / "cache").source.captions[0] == "number 0"

    def test_plan_downloads_no_images_and_says_how_many_there_are(self, hub, tmp_path):
        spec = {**SPEC, "data": {**SPEC["data"], "vae": "some/vae"}}
        found = estimate(make_plan(load_spec(spec), RunsRoot(tmp_path / "runs")))
        assert found.caches[0].images == 5
        assert any("5 images" in line for line in sentences(found))
        assert [line for line in hub.asked if "datasets" in line and "/api/datasets/" not in line] == []
        assert not (tmp_path / "datasets").exists() and not (tmp_path / "hub").exists()

    def test_offline_is_one_line_in_plan_and_sweep(self, tmp_path):
        file = tmp_path / "hubs.yaml"
        file.write_text(json.dumps(SPEC))
        environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
        words = [sys.executable, "-m", "repa_lab", "sweep", str(file), "--root", str(tmp_path / "runs")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and f": data.name: the hub cannot be reached for '{NAME}' (" in line
        assert not Path(tmp_path / "runs").exists()


class TestSpec:
    @pytest.mark.parametrize("data, message", [
        ({"source": "hub"}, "data.name: this field is required"),
        ({"source": "hub", "name": NAME, "path": "x"}, "data.path: unknown field 'path'; allowed: buckets, caption_column, config"),
        ({"source": "imagefolder", "name": NAME}, "data.name: unknown field 'name'; allowed: buckets, caption_column, flip"),
        ({"source": "datasets", "split": "test"}, "data.split: unknown field 'split'; allowed: "),
        ({"source": "repa", "revision": "main"}, "data.revision: unknown field 'revision'; allowed: "),
        ({"source": "digits", "config": "c"}, "data.config: unknown field 'config'; allowed: "),
        ({"source": "repa", "caption_column": "text"}, "data.caption_column: unknown field 'caption_column'; allowed: "),
    ])  # fmt: skip
    def test_fields_of_another_source_are_refused(self, data, message):
        with pytest.raises(ValueError) as caught:
            load_spec({**SPEC, "data": data})
        (line,) = str(caught.value).splitlines()
        assert message in line

    def test_another_source_laid_over_a_spec_takes_the_fields_of_the_former_away(self, tmp_path):
        for order in (("data.source", "data.path"), ("data.path", "data.source")):
            given = {"data.source": "imagefolder", "data.path": str(tmp_path)}
            data = load_spec(SPEC, {path: given[path] for path in order}).arms[0].config.data
            assert (data.source, data.path, data.resolution, data.caption_column) == (
                "imagefolder",
                str(tmp_path),
                16,
                None,
            )
        with pytest.raises(ValueError, match="unknown field 'path'"):
            load_spec(SPEC, {"data.path": str(tmp_path)})
        with pytest.raises(ValueError, match="unknown field 'name'"):
            load_spec(SPEC, {"data": {"name": "x/y", "source": "imagefolder"}})
