from __future__ import annotations

import json
import random
import shutil

import pytest

from repa_lab.data import DataError, folders
from repa_lab.data.folders import IMAGES, LATENTS, read_listing
from tests.data.conftest import noise_image
from tests.data.repa_folders import write_repa_folder
from tests.data.test_space import save_vae

SIDE, COUNT = 16, 5
LABELS = [2, 0, 1, 0, 2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("repa")
    images = [noise_image(i, (SIDE, SIDE)) for i in range(COUNT)]
    return write_repa_folder(root / "data", images, LABELS, save_vae(root / "vae"))


@pytest.fixture
def data(written, tmp_path):
    return shutil.copytree(written, tmp_path / "data")


def fingerprint_prepared(folder, side: int) -> str:
    return read_listing(folder).fingerprint(side)


def refusal(action, *given) -> str:
    with pytest.raises(DataError) as caught:
        action(*given)
    return f"{caught.value.field}: {caught.value}"


def relabel(data, tree, change) -> None:
    file = data / tree / "dataset.json"
    held = json.loads(file.read_text())
    change(held["labels"])
    file.write_text(json.dumps(held))


def test_names_are_those_of_edm2s_tool():
    assert IMAGES.name(0) == "00000/img00000000.png"
    assert LATENTS.name(1_281_166) == "01281/img-mean-std-01281166.npy"


def test_what_is_there(data):
    listing = read_listing(data)
    assert (list(listing.numbers), list(listing.labels)) == ([0, 1, 2, 3, 4], LABELS)
    assert listing.path(LATENTS, 3) == data / "vae-sd/00000/img-mean-std-00000003.npy"


def test_numbers_order_images_wherever_they_begin_and_whatever_is_left_out(data):
    for tree, kind in (("images", IMAGES), ("vae-sd", LATENTS)):
        for old, new in ((4, 1_000), (1, 99_999_999), (0, 100_000_000)):
            place = data / tree / kind.name(new)
            place.parent.mkdir(exist_ok=True)
            (data / tree / kind.name(old)).rename(place)
        names = {kind.name(n): label for n, label in ((1_000, 7), (99_999_999, 8), (100_000_000, 9), (2, 5), (3, 6))}
        (data / tree / "dataset.json").write_text(
            json.dumps({"labels": random.Random(0).sample(list(names.items()), 5)})
        )
    listing = read_listing(data)
    # As text, 10000/img100000000.png would come before 99999/img99999999.png.
    assert (list(listing.numbers), list(listing.labels)) == ([2, 3, 1_000, 99_999_999, 100_000_000], [5, 6, 7, 8, 9])


def test_other_files_are_left_alone(data):
    for name in (
        "images/00000/.img00000009.png.tmp",
        "images/img.png",
        "vae-sd/00000/notes.npy",
        "images/readme/a.txt",
    ):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("")
    assert len(read_listing(data)) == COUNT


@pytest.mark.parametrize("tree", ["images", "vae-sd"])
def test_labels_of_one_tree_are_enough(data, tree):
    (data / tree / "dataset.json").unlink()
    assert list(read_listing(data).labels) == LABELS


def test_without_labels_all_are_of_one_class(data):
    for tree in ("images", "vae-sd"):
        (data / tree / "dataset.json").write_text('{"labels": null}')
    assert list(read_listing(data).labels) == [0] * COUNT


class TestRefused:
    def test_a_folder_that_is_none_or_empty(self, tmp_path):
        assert refusal(read_listing, tmp_path / "nowhere") == f"path: no folder '{tmp_path / 'nowhere'}'"
        assert refusal(read_listing, tmp_path) == (
            f"path: nothing prepared in '{tmp_path}'; expected images/00000/img00000000.png and "
            "vae-sd/00000/img-mean-std-00000000.npy, ..."
        )

    def test_an_image_without_latents_is_named(self, data):
        for number in (3, 1):
            LATENTS.path(data, number).unlink()
        assert refusal(read_listing, data) == (
            f"path: '{data}/images/00000/img00000001.png' has no partner 'vae-sd/00000/img-mean-std-00000001.npy' (2 such); "
            "was the preparation interrupted?"
        )

    def test_latents_without_an_image_are_named(self, data):
        IMAGES.path(data, 4).unlink()
        assert refusal(read_listing, data) == (
            f"path: '{data}/vae-sd/00000/img-mean-std-00000004.npy' has no partner 'images/00000/img00000004.png' (1 such); "
            "was the preparation interrupted?"
        )

    def test_as_many_files_of_each_are_not_enough(self, data):
        """REPA's own loader counts them and pairs two sorted lists: each image would have got the next one's latents."""
        IMAGES.path(data, 0).unlink()
        LATENTS.path(data, 4).unlink()
        assert "img00000004.png' has no partner" in refusal(read_listing, data)

    def test_an_image_and_latents_that_both_are_missing(self, data):
        IMAGES.path(data, 2).unlink()
        LATENTS.path(data, 2).unlink()
        assert refusal(read_listing, data) == (
            f"path: '{data}/images/dataset.json' names '00000/img00000002.png', which is not there (1 such); "
            "was the preparation interrupted?"
        )

    def test_a_file_in_another_thousand(self, data):
        (data / "images/00001").mkdir()
        IMAGES.path(data, 2).rename(data / "images/00001/img00000002.png")
        assert refusal(read_listing, data) == (
            f"path: '{data}/images/00001/img00000002.png' should be '{data}/images/00000/img00000002.png'"
        )

    def test_an_image_without_a_class(self, data):
        relabel(data, "vae-sd", lambda rows: rows.pop(1))
        assert refusal(read_listing, data) == (
            f"path: '{data}/vae-sd/dataset.json' has no class for '00000/img-mean-std-00000001.npy' (1 such)"
        )

    def test_two_files_of_labels_that_differ(self, data):
        relabel(data, "vae-sd", lambda rows: rows[3].__setitem__(1, 5))
        assert refusal(read_listing, data) == (
            f"path: '{data}/images/00000/img00000003.png' and '{data}/vae-sd/00000/img-mean-std-00000003.npy' have different "
            "classes in dataset.json (1 such)"
        )

    def test_no_labels_at_all(self, data):
        for tree in ("images", "vae-sd"):
            (data / tree / "dataset.json").unlink()
        expected = "expected images/dataset.json or vae-sd/dataset.json"
        assert refusal(read_listing, data) == f"path: no labels in '{data}'; {expected}"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"labels": 3}', '{"labels": [["a", 0, 1]]}', '{"labels": [["a", -1]]}',
                                      '{"labels": [["a", 0.5]]}', '{"labels": [["a", true]]}', '{"labels": [["a", [0, 1]]]}'])  # fmt: skip
    def test_labels_of_another_form(self, data, text):
        (data / "images/dataset.json").write_text(text)
        assert refusal(read_listing, data) == (
            f"path: '{data}/images/dataset.json' is not of the form "
            '{"labels": [["00000/img00000000.png", 0], ...]} with classes from 0'
        )

    def test_another_resolution(self, data):
        assert refusal(fingerprint_prepared, data, 32) == (
            f"resolution: '{data}/images/00000/img00000000.png' measures 16x16, not 32x32: "
            "set the resolution that the folder was prepared for"
        )


class TestFingerprint:
    def test_the_place_is_no_part_of_it(self, written, data):
        assert fingerprint_prepared(data, SIDE) == fingerprint_prepared(written, SIDE)

    def test_latents_and_labels_in_either_tree_are_one_data_set(self, written, data):
        (data / "images/dataset.json").unlink()
        assert fingerprint_prepared(data, SIDE) == fingerprint_prepared(written, SIDE)

    @pytest.mark.parametrize("change", [
        lambda data: noise_image(9, (SIDE, SIDE)).save(IMAGES.path(data, 3), compress_level=0),
        lambda data: shutil.copy(LATENTS.path(data, 1), LATENTS.path(data, 4)),
        lambda data: [relabel(data, tree, lambda rows: rows[3].__setitem__(1, 1)) for tree in ("images", "vae-sd")],
        lambda data: [(kind.path(data, 4).unlink(), relabel(data, kind.tree, lambda rows: rows.pop())) for kind in folders.KINDS],
    ], ids=["image", "latents", "label", "count"])  # fmt: skip
    def test_every_change_shows(self, written, data, change):
        change(data)
        assert fingerprint_prepared(data, SIDE) != fingerprint_prepared(written, SIDE)

    def test_of_many_images_some_from_all_over_are_read(self, written, data, monkeypatch):
        monkeypatch.setattr(folders, "SAMPLE", 3)
        before, seen = fingerprint_prepared(data, SIDE), []
        for number in range(COUNT):
            shutil.copy(LATENTS.path(written, (number + 1) % COUNT), LATENTS.path(data, number))
            if fingerprint_prepared(data, SIDE) != before:
                seen.append(number)
            shutil.copy(LATENTS.path(written, number), LATENTS.path(data, number))
        assert seen == [0, 2, 4]
