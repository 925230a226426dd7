"""Which images and captions a folder has: metadata as Hugging Face's image folders have it, and links."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import datasets
import pandas
import pytest
from PIL import Image

from repa_lab.data import DataError
from repa_lab.data.folders import FileList, fingerprint_files, fingerprint_saved, read_image_folder, read_listing
from tests.data.conftest import image_folder, listing_of, noise_image
from tests.data.test_arrow import open_dataset

NAMES = ("1.png", "a/2.png", "a/b/3.png")


@pytest.fixture
def root(folder) -> Path:
    return folder({name: noise_image(number) for number, name in enumerate(NAMES)})


def write(file: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines, CSV or Parquet, by the file's name."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return file


def captions(images: FileList) -> dict[str, str]:
    names = [path.relative_to(images.folder).as_posix() for path in images.files]
    return dict(zip(names, images.captions, strict=True))


def refusal(root: Path, column: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_image_folder(root, column)
    assert caught.value.field == ("caption_column" if column else "path")
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{root}/", "")


ROWS = [{"file_name": name, "text": f"caption, {number}"} for number, name in enumerate(NAMES)]
FORMATS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class TestMetadata:
    @pytest.mark.parametrize("name", FORMATS)
    def test_every_format_of_hugging_face_is_read_as_its_library_reads_it(self, root, name, tmp_path, monkeypatch):
        write(root / name, ROWS[::-1])
        read = datasets.load_dataset(
            "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache")
        )
        paths = [row["image"]["path"] for row in read.cast_column("image", datasets.Image(decode=False))]
        theirs = {Path(path).relative_to(root).as_posix(): text for path, text in zip(paths, read["text"], strict=True)}
        assert captions(read_image_folder(root)) == theirs == {row["file_name"]: row["text"] for row in ROWS}

    def test_images_without_a_row_are_left_out_and_counted(self, root):
        write(root / "metadata.jsonl", ROWS[1:2])
        images = read_image_folder(root)
        assert captions(images) == {"a/2.png": "caption, 1"}
        assert images.notes == ("2 of 3 images have no row in metadata.jsonl and are left out",)

    @pytest.mark.parametrize("name", FORMATS)
    def test_metadata_of_a_subfolder_is_of_the_files_below_it(self, root, name):
        write(root / name, ROWS[:1])
        write(root / "a" / name, [{"file_name": "b/3.png", "text": "three"}, {"file_name": "./2.png", "text": "two"}])
        assert captions(read_image_folder(root)) == {"1.png": "caption, 0", "a/2.png": "two", "a/b/3.png": "three"}

    def test_two_formats_are_refused(self, root):
        write(root / "metadata.csv", ROWS)
        write(root / "a" / "metadata.jsonl", [])
        assert refusal(root) == (
            f"'{root}/a/metadata.jsonl' and '{root}/metadata.csv' are of two formats: keep the metadata of a folder in one"
        ).replace(f"{root}/", "")

    @pytest.mark.parametrize("path", ["./1.png", "a/../1.png", "a//..\\1.png", ".//1.png"])
    def test_a_path_may_be_written_in_several_ways(self, root, path):
        write(root / "metadata.jsonl", [{"file_name": path, "text": "x"}])
        assert captions(read_image_folder(root)) == {"1.png": "x"}

    @pytest.mark.parametrize("path", ["/etc/1.png", "../1.png", "a/../../1.png", "file://1.png", "..", ".", ""])
    def test_a_path_that_leads_out_is_refused(self, root, path):
        write(root / "a" / "metadata.jsonl", [{"file_name": path, "text": "x"}])
        assert refusal(root) == f"a/metadata.jsonl:1: '{path}' must be the path of an image below '{root}/a'".replace(
            f"{root}/", ""
        )

    def test_other_columns_of_paths_are_taken_where_there_is_no_file_name(self, root):
        write(root / "metadata.jsonl", [{"image_file_name": "1.png", "text": "x"}])
        assert captions(read_image_folder(root)) == {"1.png": "x"}
        write(root / "metadata.jsonl", [{"file_name": "1.png", "depth_file_name": "a/2.png", "text": "x"}])
        assert captions(read_image_folder(root)) == {"1.png": "x"}
        write(root / "metadata.jsonl", [{"a_file_name": "1.png", "b_file_name": "a/2.png", "text": "x"}])
        assert refusal(root).endswith("no column 'file_name', and several others of paths: a_file_name, b_file_name")

    def test_two_rows_for_one_file_are_refused(self, root):
        write(root / "metadata.jsonl", [*ROWS, {"file_name": "./1.png", "text": "again"}])
        assert (
            refusal(root) == "metadata.jsonl:4: './1.png' has a row already (metadata.jsonl:1): give each image one row"
        )
        write(root / "metadata.jsonl", ROWS)
        write(root / "a" / "metadata.jsonl", [{"file_name": "2.png", "text": "again"}])
        assert refusal(root).startswith("metadata.jsonl:2: 'a/2.png' has a row already (a/metadata.jsonl:1)")

    def test_a_row_for_no_image_is_refused(self, root):
        write(
            root / "metadata.jsonl", [*ROWS, {"file_name": "4.png", "text": "x"}, {"file_name": "5.png", "text": "y"}]
        )
        assert refusal(root) == "metadata.jsonl:4: '4.png' is not in the folder (2 such)"
        (root / "4.gif").write_bytes(b"")
        write(root / "metadata.jsonl", [{"file_name": "4.gif", "text": "x"}])
        assert refusal(root).startswith("metadata.jsonl:1: '4.gif' is not read as an image (.png, .jpg, ")

    def test_no_rows_are_refused(self, root):
        write(root / "metadata.jsonl", [])
        assert refusal(root) == f"'{root}/metadata.jsonl' has no rows; list images in it, or remove it".replace(
            f"{root}/", ""
        )


class TestValues:
    @pytest.mark.parametrize("value, shown", [
        ("null", "null"), ("3", "3"), ("0.5", "0.5"), ("NaN", "NaN"), ("true", "true"),
        ('["a", "b"]', '["a", "b"]'), ('{"en": "a"}', '{"en": "a"}'),
    ])  # fmt: skip
    def test_a_caption_that_is_no_text_is_refused_with_file_and_line(self, root, value, shown):
        rows = ['{"file_name": "1.png", "text": "x"}', "", f'{{"file_name": "a/2.png", "text": {value}}}']
        (root / "metadata.jsonl").write_text("\n".join(rows))
        assert refusal(root) == f"metadata.jsonl:3: 'text' must be text, got {shown}"

    @pytest.mark.parametrize("row, shown", [({"file_name": "a/2.png"}, "'text'"), ({"text": "x"}, "'file_name'")])
    def test_a_row_that_lacks_a_column_is_refused(self, root, row, shown):
        write(root / "metadata.jsonl", [ROWS[0], row])
        assert refusal(root) == f"metadata.jsonl:2: {shown} must be text, got nothing"

    @pytest.mark.parametrize("line", ["no json", '["1.png"]', '"x"', "3", '{"file_name": "1.png"', "[" * 100_000])
    def test_a_line_that_is_no_object_is_refused(self, root, line):
        (root / "metadata.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line)
        expected = '{"file_name": "1.png", "text": "a cat"}'
        assert refusal(root) == f"metadata.jsonl:2: no JSON object; expected {expected}"

    def test_half_a_surrogate_pair_is_refused(self, root):
        (root / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "\\ud83d"}')
        assert refusal(root) == "metadata.jsonl:1: 'text' holds half a surrogate pair, which is not text"

    def test_null_and_numbers_of_parquet_are_refused_by_their_row(self, root):
        write(root / "metadata.parquet", [ROWS[0], {"file_name": "a/2.png", "text": None}])
        assert refusal(root) == "metadata.parquet:2: 'text' must be text, got null"
        write(root / "metadata.parquet", [{"file_name": "1.png", "text": 3}])
        assert refusal(root) == "metadata.parquet:1: 'text' must be text, got 3"
        (root / "metadata.parquet").write_bytes(b"hello")
        assert refusal(root).startswith("cannot read 'metadata.parquet': ")

    def test_csv_is_refused_by_its_line(self, root):
        file = root / "metadata.csv"
        file.write_text('file_name,text\n1.png,"two\nlines"\na/2.png,a cat, a dog\n')
        assert refusal(root) == "metadata.csv:4: more cells than columns; quote captions that hold commas"
        file.write_text("file_name,text\n1.png,x\na/2.png\n")
        assert refusal(root) == "metadata.csv:3: 'text' must be text, got nothing"
        file.write_text('file_name,text\n1.png,"x" y\n')
        assert refusal(root) == "metadata.csv:2: ',' expected after '\"'"

    def test_csv_is_all_text(self, root):
        (root / "metadata.csv").write_text('file_name,text\r\n1.png,NaN\r\na/2.png,\r\na/b/3.png,"a\u2028b, c"\r\n')
        images = read_image_folder(root)
        assert captions(images) == {"1.png": "NaN", "a/2.png": "", "a/b/3.png": "a\u2028b, c"}
        assert images.notes == ("1 of 3 images have no caption: they are trained with the empty one",)

    @pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
    def test_a_byte_order_mark_is_no_part_of_the_text(self, root, name):
        file = write(root / name, ROWS)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert list(captions(read_image_folder(root)).values()) == ["caption, 0", "caption, 1", "caption, 2"]

    @pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
    def test_another_encoding_is_refused_with_file_and_line(self, root, name):
        file = write(root / name, ROWS)
        lines = file.read_bytes().split(b"\n")
        lines[1] = lines[1].replace(b"caption", "Größe".encode("latin-1"))
        file.write_bytes(b"\n".join(lines))
        assert refusal(root) == f"{name}:2: not UTF-8 (invalid start byte): save the file as UTF-8"
        file.write_bytes(file.read_bytes().decode("latin-1").encode("utf-16"))
        assert refusal(root) == f"{name}:1: not UTF-8 (invalid start byte): save the file as UTF-8"


class TestCaptionColumn:
    @pytest.mark.parametrize("columns, chosen", [
        (("text", "caption", "prompt"), "text"), (("prompt", "caption"), "caption"), (("title", "prompt"), "prompt"),
    ])  # fmt: skip
    def test_every_source_has_the_same_rule(self, root, tmp_path, columns, chosen):
        rows = [{"file_name": name, **{column: f"{column} {name}" for column in columns}} for name in NAMES]
        write(root / "metadata.jsonl", rows)
        assert image_folder(root, 8).captions == [f"{chosen} {name}" for name in NAMES]
        datasets.load_dataset(
            "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache")
        ).save_to_disk(tmp_path / "saved")
        assert open_dataset(tmp_path / "saved", 8).captions == [f"{chosen} {name}" for name in NAMES]
        for source in (
            image_folder(root, 8, None, columns[-1]),
            open_dataset(tmp_path / "saved", 8, None, columns[-1]),
        ):
            assert source.captions == [f"{columns[-1]} {name}" for name in NAMES]

    def test_a_column_that_is_not_there_is_refused(self, root):
        assert refusal(root, "words") == "no column 'words'; there are: none"
        write(root / "metadata.jsonl", ROWS)
        assert refusal(root, "words") == "no column 'words'; there are: file_name, text"

    def test_without_such_a_column_there_are_no_captions(self, root):
        write(root / "metadata.jsonl", [{"file_name": name, "height": 3} for name in NAMES[:2]])
        images = read_image_folder(root)
        assert (len(images.files), images.captions) == (2, [])


class TestLinks:
    @pytest.mark.parametrize("target", [".", "..", "../.."])
    def test_a_link_to_a_folder_above_is_not_followed(self, root, target):
        (root / "a" / "up").symlink_to(target)
        images = read_image_folder(root)
        assert [path.relative_to(root).as_posix() for path in images.files] == list(NAMES)
        note = f"1 folder is reached twice through links and read once ('{root}/a/up' is left out)"
        assert images.notes == (note,)
        before = listing_of(root, 8), fingerprint_files(root)
        (root / "a" / "up").unlink()
        assert (listing_of(root, 8), fingerprint_files(root)) == before

    def test_a_folder_with_a_link_to_it_counts_once_by_its_own_name(self, root):
        (root / "0").symlink_to("a")
        (root / "z").symlink_to(root / "a" / "b")
        images = read_image_folder(root)
        assert [path.relative_to(root).as_posix() for path in images.files] == list(NAMES)
        assert images.notes[0].startswith("2 folders are reached twice through links and read once (")

    def test_links_to_folders_and_files_elsewhere_are_followed_once(self, root, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(root, elsewhere)
        (elsewhere / "a" / "round").symlink_to(elsewhere)
        linked = tmp_path / "linked"
        linked.mkdir()
        for name in ("cats", "dogs"):
            (linked / name).symlink_to(elsewhere)
        (linked / "single.png").symlink_to(elsewhere / "1.png")
        images = read_image_folder(linked)
        found = [path.relative_to(linked).as_posix() for path in images.files]
        assert found == ["cats/1.png", "cats/a/2.png", "cats/a/b/3.png", "single.png"]
        assert image_folder(linked, 8).num_classes == 2

    def test_the_folder_itself_may_be_a_link(self, root, tmp_path):
        (tmp_path / "link").symlink_to(root)
        assert listing_of(tmp_path / "link", 8) == listing_of(root, 8)

    @pytest.mark.parametrize("name", ["4.png", "cats", "loop.png"])
    def test_a_link_that_leads_nowhere_is_named(self, root, name):
        target = name if name == "loop.png" else "../gone"
        (root / "a" / name).symlink_to(target)
        expected = f"'a/{name}' is a link to '{target}', which is not there: mend or remove the link"
        assert refusal(root) == expected
        with pytest.raises(DataError) as caught:
            fingerprint_saved(root, 8)
        assert str(caught.value).replace(f"{root}/", "") == expected

    @pytest.mark.parametrize("file", ["images/00000/img00000000.png", "vae-sd/00000/img-mean-std-00000000.npy"])
    def test_a_link_of_a_prepared_folder_that_leads_nowhere_is_named(self, tmp_path, file):
        for tree, name in (("images", "img00000000.png"), ("vae-sd", "img-mean-std-00000000.npy")):
            (tmp_path / tree / "00000").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / tree / "00000" / name, "png")
        (tmp_path / "images" / "dataset.json").write_text('{"labels": null}')
        read_listing(tmp_path).fingerprint(8)
        (tmp_path / file).unlink()
        (tmp_path / file).symlink_to("gone")
        with pytest.raises(DataError, match=f"cannot read '{tmp_path / file}': .*No such file") as caught:
            read_listing(tmp_path).fingerprint(8)
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_folder_that_cannot_be_read_is_no_empty_one(self, root):
        (root / "a").chmod(0)
        with pytest.raises(PermissionError):
            read_image_folder(root)
