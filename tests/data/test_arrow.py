from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from repa_lab.data import DataError, folders
from repa_lab.data.crop import Buckets
from repa_lab.data.folders import fingerprint_saved
from repa_lab.data.huggingface import read_columns
from repa_lab.data.settings import BucketsConfig, SavedSettings
from repa_lab.data.sources import TableImages, open_saved
from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot
from repa_lab.spec import SpecError, load_spec
from tests.data.conftest import image_folder, noise_image

SHAPES = [(16, 16), (50, 30), (33, 61), (24, 22)]  # width, height
BUCKETS = Buckets(16, 4, 2.0)
TEXTS = ["a cat", None, "", "ß 🐈"]
COLUMNS = {"text": Value("string"), "picture": datasets.Image(), "kind": ClassLabel(names=["b", "a", "never"])}


@pytest.fixture(autouse=True)
def silent():
    datasets.disable_progress_bars()


def pictures(first: int = 0) -> list[Image.Image]:
    return [noise_image(first + i, shape) for i, shape in enumerate(SHAPES)]


def make(first: int = 0, features: dict | None = None, **columns) -> Dataset:
    """Four pictures with captions and classes; ``columns`` replace those and add others."""
    held = {"text": TEXTS, "picture": pictures(first), "kind": [1, 0, 1, 1], **columns}
    return Dataset.from_dict(held, features=Features({**COLUMNS, **(features or {})}))


def open_dataset(root: Path, side: int, buckets: Buckets | None = None, captions: str | None = None) -> TableImages:
    """Open a saved data set as a spec does."""
    sizes = buckets and BucketsConfig(step=buckets.step, max_aspect=buckets.max_aspect)
    return open_saved(SavedSettings(path=str(root), resolution=side, buckets=sizes, caption_column=captions))


def planned(root: Path) -> str:
    """What `plan` refuses a spec for that names the data set in a folder."""
    file = root / "spec.yaml"
    file.write_text(
        f"name: saved\nmodel: {{family: sit, size: nano/4}}\ndata: {{source: datasets, path: {root / 'data'}, resolution: 16}}\n"
        "train: {steps: 8}\nevaluate: {every: 4, samples: 16, extractor: {name: efficientnet_lite0}}\n"
    )
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec(file), RunsRoot(root / "runs"))
    return str(caught.value)


@pytest.fixture
def save(tmp_path):
    def save(data: Dataset | DatasetDict, name: str = "data"):
        data.save_to_disk(tmp_path / name)
        return tmp_path / name

    return save


class TestContent:
    def test_labels_captions_and_sizes_are_those_of_the_columns(self, save):
        source = open_dataset(save(make()), 16)
        assert (len(source), source.side, source.channels) == (4, 16, 3)
        assert (source.labels.tolist(), source.labels.dtype, source.num_classes) == ([1, 0, 1, 1], torch.int64, 3)
        assert source.captions == ["a cat", "", "", "ß 🐈"]
        assert source.sizes.tolist() == [[16, 16]] * 4

    @pytest.mark.parametrize("buckets", [None, BUCKETS], ids=["square", "buckets"])
    def test_pixels_and_frames_equal_those_of_a_folder_of_the_same_images(self, save, folder, buckets):
        saved = open_dataset(save(make()), 16, buckets)
        files = image_folder(folder({f"{i}.png": image for i, image in enumerate(pictures())}), 16, buckets)
        assert torch.equal(saved.sizes, files.sizes)
        assert torch.equal(saved.frames(range(4)), files.frames(range(4)))
        for i in (3, 0, 2, 1):
            assert torch.equal(saved.read([i]), files.read([i]))
        if buckets:
            assert len(saved.sizes.unique(dim=0)) == 3

    def test_images_of_every_mode_are_read_as_a_folders(self, save, folder):
        images = [
            Image.new("L", (16, 16), 77), Image.new("RGBA", (16, 16), (0, 0, 0, 128)), Image.new("LA", (16, 16), (0, 0)),
            Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)),
        ]  # fmt: skip
        saved = open_dataset(save(make(picture=images)), 16)
        colours = [saved.read([i])[0, :, 0, 0].tolist() for i in range(4)]
        assert colours == [[77] * 3, [127] * 3, [255] * 3, [128] * 3]
        files = image_folder(folder({f"{i}.png": image for i, image in enumerate(images)}), 16)
        assert torch.equal(saved.read(range(4)), files.read(range(4)))

    def test_the_train_split_is_taken(self, save):
        splits = DatasetDict({"test": make(50), "train": make(), "validation": make(90)})
        source, alone = open_dataset(save(splits), 16), open_dataset(save(make(), "alone"), 16)
        assert torch.equal(source.read(range(4)), alone.read(range(4)))

    def test_without_classes_all_are_one(self, save):
        source = open_dataset(save(make().remove_columns("kind")), 16)
        assert (source.labels.tolist(), source.num_classes) == ([0] * 4, 1)

    def test_the_first_of_several_columns_of_images_and_classes_counts(self, save):
        more = {"mask": [noise_image(9)] * 4, "other": [0] * 4}
        data = make(features={"mask": datasets.Image(), "other": ClassLabel(names=["x"])}, **more)
        source = open_dataset(save(data), 16)
        assert source.labels.tolist() == [1, 0, 1, 1]
        assert torch.equal(source.read([0]), open_dataset(save(make(), "plain"), 16).read([0]))

    def test_rows_that_were_picked_before_saving_are_the_images(self, save):
        source = open_dataset(save(make().select([2, 0])), 16)
        assert source.captions == ["", "a cat"]
        assert torch.equal(source.read([1, 0]), open_dataset(save(make(), "all"), 16).read([0, 2]))

    @pytest.mark.parametrize("changed", [
        lambda data: data.with_format("torch"), lambda data: data.with_format("numpy"), lambda data: data.with_format("pandas"),
        lambda data: data.with_format("numpy", columns=["kind"]),
        lambda data: data.cast_column("picture", datasets.Image(decode=False)),
        lambda data: data.cast_column("picture", datasets.Image(decode=False)).with_format("torch"),
    ], ids=["torch", "numpy", "pandas", "one column", "not decoded", "neither"])  # fmt: skip
    def test_formats_and_decoding_that_were_set_before_saving_change_nothing(self, save, changed):
        plain, saved = save(make(), "plain"), save(changed(make()))
        expected, source = open_dataset(plain, 16), open_dataset(saved, 16)
        assert torch.equal(source.read(range(4)), expected.read(range(4)))
        assert (source.captions, source.labels.tolist()) == (expected.captions, expected.labels.tolist())
        assert SavedSettings(path=str(saved), resolution=16).describe().images == 4

    def test_a_label_that_is_no_class_is_told(self, save):
        numbers = make().cast_column("kind", Value("int64")).rename_column("kind", "label")
        settings = SavedSettings(path=str(save(numbers)), resolution=16)
        (note,) = settings.describe().notes
        assert note.startswith(
            f"column 'label' of '{settings.path}' holds int64 and no ClassLabel, so all images are one class"
        )
        assert note in open_saved(settings).notes and open_saved(settings).num_classes == 1


class TestCaptions:
    @pytest.mark.parametrize("name", ["text", "caption", "prompt"])
    def test_are_found_by_the_names_that_are_common(self, save, name):
        data = make() if name == "text" else make().rename_column("text", name)
        assert open_dataset(save(data), 16).captions == ["a cat", "", "", "ß 🐈"]

    def test_the_first_name_counts_and_another_may_be_asked_for(self, save):
        more = {"prompt": list("pqrs"), "caption": list("cdef"), "note": ["n"] * 4}
        root = save(make(features={name: Value("string") for name in more}, **more))
        assert open_dataset(root, 16).captions == ["a cat", "", "", "ß 🐈"]
        assert open_dataset(root, 16, captions="caption").captions == list("cdef")
        assert open_dataset(root, 16, captions="note").captions == ["n"] * 4

    def test_without_such_a_column_there_are_none(self, save):
        assert list(open_dataset(save(make().rename_column("text", "sentence")), 16).captions) == []

    def test_a_column_that_is_not_there_is_refused(self, save):
        with pytest.raises(DataError) as caught:
            open_dataset(save(make()), 16, captions="words")
        assert str(caught.value) == "no column 'words'; there are: text, picture, kind"
        assert caught.value.field == "caption_column"

    @pytest.mark.parametrize("name", ["kind", "lists", "picture"])
    def test_a_column_of_something_else_is_no_captions(self, save, name):
        root = save(make(features={"lists": List(Value("string"))}, lists=[["one", "two"]] * 4))
        with pytest.raises(DataError, match=f"column '{name}' holds no texts; of texts there are: text") as caught:
            open_dataset(root, 16, captions=name)
        assert caught.value.field == "caption_column"

    def test_a_list_of_captions_is_not_taken_for_one(self, save):
        data = make(features={"caption": List(Value("string"))}, caption=[["one", "two"]] * 4).remove_columns("text")
        assert list(open_dataset(save(data), 16).captions) == []


class TestRefusals:
    def test_a_folder_that_is_missing_or_of_something_else(self, folder, tmp_path):
        images = folder({"1.png": noise_image(0)})
        for root in (tmp_path / "nowhere", images):
            with pytest.raises(DataError, match=f"'{root}' is not what Dataset.save_to_disk writes: ") as caught:
                open_dataset(root, 16)
            assert caught.value.field == "path"
            assert "\n" not in str(caught.value)

    def test_no_images(self, save):
        with pytest.raises(DataError, match=r"no column of images in '.*data'; there are: text, kind") as caught:
            open_dataset(save(make().remove_columns("picture")), 16)
        assert caught.value.field == "path"

    def test_no_split_to_train_on(self, save):
        with pytest.raises(DataError, match=r"^no split 'train' in '.*data'; there are: test, validation") as caught:
            open_dataset(save(DatasetDict({"test": make(), "validation": make()})), 16)
        assert caught.value.field == "path"

    @pytest.mark.parametrize("buckets", [None, BUCKETS], ids=["square", "buckets"])
    def test_an_image_that_cannot_be_decoded_is_named_by_its_row_and_column(self, save, buckets):
        images = pictures()
        root = save(make(picture=[*images[:2], {"bytes": b"hello", "path": None}, images[3]]))
        with pytest.raises(DataError) as caught:
            open_dataset(root, 16, buckets).read([0, 2] if buckets is None else [2])
        assert (caught.value.field, str(caught.value)) == (
            "path",
            "cannot read row 2, column 'picture': cannot identify image file",
        )

    NO_CLASS = (
        "is none of the 3 classes, which are numbered from 0: leave such rows out, "
        "or remove the column to train without classes"
    )

    @pytest.mark.parametrize("columns, message", [
        ({"picture": [0, None, 2, None]}, "row 1, column 'picture': no image (2 such rows)"),
        ({"picture": [0, 1, {"bytes": b"", "path": "3.png"}, 3]}, "row 2, column 'picture': no image"),
        ({"kind": [0, 1, 2, None]}, f"row 3, column 'kind': null {NO_CLASS}"),
        ({"kind": [-1, 1, -1, -1]}, f"row 0, column 'kind': -1 {NO_CLASS} (3 such rows)"),
    ], ids=["null image", "empty image", "null label", "hidden labels"])  # fmt: skip
    @pytest.mark.parametrize("shards", [1, 3])
    def test_a_row_that_cannot_be_trained_on_is_one_line_of_plan_too(self, tmp_path, columns, message, shards):
        images = pictures()
        columns = {name: [images[value] if name == "picture" and type(value) is int else value for value in values]
                   for name, values in columns.items()}  # fmt: skip
        make(**columns).save_to_disk(tmp_path / "data", num_shards=shards)
        with pytest.raises(DataError) as caught:
            open_dataset(tmp_path / "data", 16)
        assert (caught.value.field, str(caught.value)) == ("path", f"'{tmp_path / 'data'}', {message}")
        assert planned(tmp_path) == f"{tmp_path / 'spec.yaml'}:3:26: data.path: '{tmp_path / 'data'}', {message}"

    def test_no_rows(self, tmp_path):
        make().select([]).save_to_disk(tmp_path / "data")
        with pytest.raises(DataError, match=r"^'.*data' has no rows$"):
            open_dataset(tmp_path / "data", 16)
        assert planned(tmp_path).endswith(f":3:26: data.path: '{tmp_path / 'data'}' has no rows")

    def test_rows_of_a_table_that_lies_elsewhere(self):
        """Images by their paths, and the name of a data set of the hub."""
        gone = make(picture=[*pictures()[:3], {"bytes": None, "path": "/nowhere/4.png"}])
        for rows, message in (
            (gone, "'owner/name', row 3, column 'picture': no file '/nowhere/4.png'"),
            (gone.select([2, 3, 3]), "'owner/name', row 1, column 'picture': no file '/nowhere/4.png' (2 such rows)"),
            (gone.select([]), "'owner/name' has no rows"),
        ):
            with pytest.raises(DataError) as caught:
                read_columns(rows.features.to_dict(), rows.with_format("arrow")[:], "owner/name", None, field="name")
            assert (caught.value.field, str(caught.value)) == ("name", message)

    def test_a_damaged_table(self, save):
        root = save(make())
        (table,) = root.glob("data-*.arrow")
        table.write_bytes(b"hello")
        with pytest.raises(DataError, match=r"is not what Dataset\.save_to_disk writes"):
            open_dataset(root, 16)


class TestFingerprint:
    def test_is_the_contents_wherever_they_lie(self, save, tmp_path):
        first, again = save(make(), "first"), save(make(), "again")
        shutil.copytree(first, tmp_path / "else" / "where")
        assert (
            fingerprint_saved(first, 16)
            == fingerprint_saved(again, 16)
            == fingerprint_saved(tmp_path / "else" / "where", 16)
        )
        assert open_dataset(first, 16).fingerprint == fingerprint_saved(first, 16)
        assert open_dataset(first, 16, BUCKETS).fingerprint == fingerprint_saved(first, 16, BUCKETS)

    def test_every_change_shows(self, save):
        one_pixel = pictures()
        one_pixel[3].putpixel((5, 5), (0, 0, 0))
        changed = [
            make(), make(1), make(picture=one_pixel), make(text=["a dog", *TEXTS[1:]]), make(kind=[0, 0, 1, 1]),
            make().select([1, 0, 2, 3]), make().rename_column("text", "caption"), DatasetDict({"train": make()}),
        ]  # fmt: skip
        prints = [fingerprint_saved(save(data, f"{number}"), 16) for number, data in enumerate(changed)]
        assert len(set(prints)) == len(prints)

    def test_resolution_and_buckets_are_part_of_it(self, save):
        root = save(make())
        asked = [(16, None), (32, None), (16, BUCKETS), (16, Buckets(16, 8, 2.0)), (16, Buckets(16, 4, 3.0))]
        assert len({fingerprint_saved(root, *one) for one in asked}) == 5

    def test_what_datasets_caches_beside_the_data_is_no_part_of_it(self, save):
        root = save(make())
        before = fingerprint_saved(root, 16)
        datasets.load_from_disk(str(root)).map(lambda row: {"length": len(row["text"] or "")})
        assert list(root.glob("cache-*.arrow"))
        assert fingerprint_saved(root, 16) == before

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"no folder '.*nowhere'") as caught:
            fingerprint_saved(tmp_path / "nowhere", 16)
        assert caught.value.field == "path"

    def test_of_a_large_file_the_ends_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "_END_BYTES", 4)
        (tmp_path / "data").mkdir()

        def of(content: bytes) -> str:
            (tmp_path / "data" / "x.arrow").write_bytes(content)
            return fingerprint_saved(tmp_path / "data", 16)

        whole = of(b"abcdefghijkl")
        assert of(b"abcd????ijkl") == whole
        assert len({whole, of(b"abc?efghijkl"), of(b"abcdefgh?jkl"), of(b"abcdefghijkl?"), of(b"abcdefghijk")}) == 5
        assert len({of(b"abcdef"), of(b"abcdeg"), of(b"abc"), of(b"abd"), of(b"")}) == 5
