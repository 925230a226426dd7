from __future__ import annotations

import shutil

import pytest

from repa_lab.data import DataError, folders
from repa_lab.data.folders import read_image_folder
from repa_lab.data.settings import DigitsSettings
from repa_lab.files import digest, file_digest
from tests.data.conftest import content_of, listing_of, noise_image

IMAGES = {"b/1.png": noise_image(1), "a/2.png": noise_image(2), "0.png": noise_image(3)}


@pytest.fixture
def images(folder):
    root = folder(IMAGES)
    (root / "0.txt").write_text("a dog")
    return root


def test_digits_are_pinned():
    # A run's identity hangs on it: if this changes, every digits run that was ever trained is trained again.
    assert DigitsSettings().describe().fingerprint == "fa07793dcaa1e4ab025521e617f65503244025da5486c0fe19166486db2fa6f0"


def test_digest_is_that_of_canonical_json():
    # sha256 of '{"a":[1,2],"b":null}'
    assert digest({"b": None, "a": (1, 2)}) == "f25109c4111335e4a32d49373585e7a788ff5b10e70023f7004b170e7f84716a"


def test_images_are_found_below_the_folder_in_order(images):
    (images / ".hidden").mkdir()
    shutil.copy(images / "0.png", images / ".hidden" / "x.png")
    shutil.copy(images / "0.png", images / ".y.png")
    shutil.copy(images / "0.png", images / "c.PNG")
    (images / "notes.txt").write_text("no image")
    assert [path.relative_to(images).as_posix() for path in read_image_folder(images).files] == [
        "0.png",
        "a/2.png",
        "b/1.png",
        "c.PNG",
    ]


def test_a_missing_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere") as caught:
        read_image_folder(tmp_path / "nowhere")
    assert caught.value.field == "path"
    with pytest.raises(DataError, match=r"no images in .*expected \.png, \.jpg"):
        read_image_folder(tmp_path)


def test_the_place_of_the_folder_is_no_part_of_it(images, tmp_path):
    shutil.copytree(images, tmp_path / "elsewhere" / "copy")
    for kind in (listing_of, content_of):
        assert kind(tmp_path / "elsewhere" / "copy", 8) == kind(images, 8)


def rename(images):
    (images / "0.png").rename(images / "4.png")


def other_class(images):
    (images / "b" / "1.png").rename(images / "a" / "1.png")


def replaced(images):
    noise_image(7, (21, 20)).save(images / "0.png")


def removed(images):
    (images / "a" / "2.png").unlink()


def added(images):
    noise_image(8).save(images / "a" / "3.png")


def recaptioned(images):
    (images / "0.txt").write_text("a cat")


def uncaptioned(images):
    (images / "0.txt").unlink()


@pytest.mark.parametrize("change", [rename, other_class, replaced, removed, added, recaptioned, uncaptioned])
def test_every_change_of_the_data_shows(images, change):
    before = listing_of(images, 8), content_of(images, 8)
    change(images)
    assert listing_of(images, 8) != before[0]
    assert content_of(images, 8) != before[1]


def test_an_image_of_the_same_size_in_bytes_shows_in_its_content(folder):
    noise = folder({"1.bmp": noise_image(1), "2.bmp": noise_image(2)})
    other = folder({"1.bmp": noise_image(1), "2.bmp": noise_image(3)}, name="other")
    assert listing_of(noise, 8) == listing_of(other, 8)
    assert content_of(noise, 8) != content_of(other, 8)


def test_of_many_images_some_from_all_over_are_read(folder, monkeypatch):
    monkeypatch.setattr(folders, "_CONTENT_SAMPLE", 3)
    images = {f"{i}.bmp": noise_image(i) for i in range(7)}
    before = content_of(folder(images), 8)
    seen = [i for i in range(7) if content_of(folder({**images, f"{i}.bmp": noise_image(9)}), 8) != before]
    assert seen == [0, 3, 6]


def test_the_resolution_is_part_of_it(images):
    for kind in (listing_of, content_of):
        assert kind(images, 8) != kind(images, 16)


def test_file_digest_is_the_files_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
