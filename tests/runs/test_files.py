from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import textwrap

import pytest

from repa_lab.files import replace_atomically
from repa_lab.runs import files


class TestAtomicWrites:
    def test_a_write_that_raises_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "state.json"
        files.write_json(path, {"step": 1})

        def write(temporary):
            temporary.write_text('{"step": 2')
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            replace_atomically(path, write)
        assert files.read_json(path) == {"step": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["state.json"]

    def test_a_first_write_that_raises_leaves_nothing(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            replace_atomically(tmp_path / "a" / "x", lambda temporary: 1 // 0)
        assert list((tmp_path / "a").iterdir()) == []

    def test_the_file_is_whole_the_moment_it_is_there(self, tmp_path):
        path = tmp_path / "x"
        files.write_text(path, "old")
        seen = []

        def write(temporary):
            temporary.write_text("ne")
            seen.append(path.read_text())
            temporary.write_text("new")
            seen.append(path.read_text())

        replace_atomically(path, write)
        assert seen == ["old", "old"]
        assert path.read_text() == "new"

    def test_folders_are_made(self, tmp_path):
        files.write_text(tmp_path / "a" / "b" / "x", "text\nof two lines: é\n")
        assert (tmp_path / "a" / "b" / "x").read_bytes() == "text\nof two lines: é\n".encode()

    @pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [1, -math.inf]}])
    def test_json_that_is_not_json_is_refused_before_anything_is_touched(self, tmp_path, value):
        path = tmp_path / "x.json"
        files.write_json(path, {"old": True})
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(path, value)
        assert files.read_json(path) == {"old": True}

    def test_json_round_trip(self, tmp_path):
        value = {"a": 0.1 + 0.2, "b": [None, True, "é\n\u2028"], "c": {"d": 10**18}}
        files.write_json(tmp_path / "x.json", value)
        assert files.read_json(tmp_path / "x.json") == value

    def test_a_kill_at_any_write_leaves_the_old_or_the_new(self, tmp_path):
        """Another process writes versions of a large file without end and is killed in the middle."""
        path = tmp_path / "big.json"
        code = textwrap.dedent(f"""
            from pathlib import Path
            from repa_lab.runs import files
            version = 0
            while True:
                files.write_json(Path({str(path)!r}), [version] * 50_000)
                print(version, flush=True)
                version += 1
        """)
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            while int(process.stdout.readline()) < 3:
                pass
            process.kill()
            process.wait()
            process.stdout.close()
            value = files.read_json(path)
            assert len(value) == 50_000
            assert len(set(value)) == 1


class TestFormat:
    def test_a_record_carries_a_format_number_and_is_read_without(self, tmp_path):
        files.write_record(tmp_path / "x.json", {"a": 1})
        assert files.read_json(tmp_path / "x.json") == {"format": 1, "a": 1}
        assert files.read_record(tmp_path / "x.json") == {"a": 1}

    @pytest.mark.parametrize(
        ("content", "found"),
        [('{"a": 1}', "no format number"), ('{"format": 2}', "format 2"), ("{}", "no format number")],
    )
    def test_another_format_is_refused_in_one_line(self, tmp_path, content, found):
        line = "this version of repa-lab reads format 1; use the version that wrote it, or another --root"
        for name, read in (("x.json", files.read_record), ("x.jsonl", rows_of)):
            (tmp_path / name).write_text(f"{content}\n")
            with pytest.raises(files.FormatError) as caught:
                read(tmp_path / name)
            assert str(caught.value) == f"'{tmp_path / name}' has {found}: {line}"


def rows_of(path, **options):
    return files.JsonlReader(path, **options).new_rows()


class TestLines:
    ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "note": "é\n\u2028"}, {"step": 3, "x": [1, None]}]  # noqa: RUF012

    def fill(self, path):
        for row in self.ROWS:
            files.append_row(path, row)

    def test_rows_come_back_in_order(self, tmp_path):
        path = tmp_path / "m.jsonl"
        assert rows_of(path) == []
        self.fill(path)
        assert rows_of(path) == self.ROWS
        assert len(path.read_text().split("\n")) == 5

    def test_a_tail_torn_anywhere_is_left_out_until_it_is_whole(self, tmp_path):
        path, growing = tmp_path / "m.jsonl", tmp_path / "growing.jsonl"
        self.fill(path)
        content, reader, grown = path.read_bytes(), files.JsonlReader(growing), []
        for length in range(len(content) + 1):
            path.write_bytes(content[:length])
            whole = max(0, content[:length].count(b"\n") - 1)
            assert rows_of(path) == self.ROWS[:whole]
            with growing.open("ab") as file:
                file.write(content[length - 1 : length])
            grown += reader.new_rows()
            assert grown == self.ROWS[:whole]

    @pytest.mark.parametrize(
        "line", [b"{", b"\x00\x00\x00", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b'"x"', b"3"]
    )
    def test_a_damaged_line_is_named(self, tmp_path, line):
        path, damaged = tmp_path / "m.jsonl", []
        self.fill(path)
        header, first, *rest = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([header, first, line, *rest, b""]))
        with pytest.raises(files.DamagedFileError, match=rf"^'{path}' line 3 is damaged: (not JSON|no JSON object)$"):
            rows_of(path)
        assert rows_of(path, on_damage=lambda number, reason: damaged.append(number)) == self.ROWS
        assert damaged == [3]
        path.write_bytes(line)
        with pytest.raises(files.DamagedFileError, match=rf"^'{path}' is damaged: no JSON"):
            files.read_record(path)

    @pytest.mark.parametrize("step", ["-1", "true", "null", '"1"', "1.5"])
    def test_a_row_without_a_step_is_damaged(self, tmp_path, step):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        with path.open("a") as file:
            file.write(f'{{"step": {step}}}\n')
        assert len(rows_of(path)) == 4
        with pytest.raises(files.DamagedFileError, match=r"line 5 is damaged: no step$"):
            rows_of(path, required="step")

    def test_a_rewritten_file_is_read_again_from_its_start(self, tmp_path):
        path = tmp_path / "m.jsonl"
        reader = files.JsonlReader(path)
        assert reader.new_rows() == []
        self.fill(path)
        assert (reader.new_rows(), reader.new_rows()) == (self.ROWS, [])
        files.rewrite_rows(path, self.ROWS[:1])
        assert reader.new_rows() == self.ROWS[:1]
        files.append_row(path, self.ROWS[1])
        assert reader.new_rows() == self.ROWS[1:2]

    def test_a_torn_row_that_the_next_writer_dropped_is_never_read(self, tmp_path):
        path = tmp_path / "m.jsonl"
        reader = files.JsonlReader(path)
        files.append_row(path, {"step": 1})
        with path.open("ab") as file:
            file.write(b'{"step": 2, "lo')
        assert reader.new_rows() == [{"step": 1}]
        files.drop_torn_row(path)
        files.append_row(path, {"step": 2})
        assert reader.new_rows() == [{"step": 2}]

    def test_dropping_a_torn_tail_keeps_every_whole_row_to_the_byte(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        content = path.read_bytes()
        for length in range(len(content) + 1):
            path.write_bytes(content[:length])
            files.drop_torn_row(path)
            assert path.read_bytes() == content[: content.rfind(b"\n", 0, length) + 1]
        files.drop_torn_row(tmp_path / "missing")
        assert not (tmp_path / "missing").exists()

    def test_a_copy_of_hard_links_keeps_what_it_has(self, tmp_path):
        path, snapshot = tmp_path / "m.jsonl", tmp_path / "snapshot.jsonl"
        self.fill(path)
        with path.open("ab") as file:
            file.write(b'{"torn')
        snapshot.hardlink_to(path)
        before = snapshot.read_bytes()
        files.drop_torn_row(path)
        files.append_row(path, {"step": 9})
        assert snapshot.read_bytes() == before
        assert files.JsonlReader(path).new_rows() == [*self.ROWS, {"step": 9}]

    def test_a_row_is_with_the_operating_system_at_once(self, tmp_path):
        path = tmp_path / "m.jsonl"
        code = (
            f"import os, signal; from pathlib import Path; from repa_lab.runs import files\n"
            f"files.append_row(Path({str(path)!r}), {{'step': 1}}); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
        assert rows_of(path) == [{"step": 1}]

    def test_rewriting_replaces_the_file_whole(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        before = path.stat().st_ino
        files.rewrite_rows(path, self.ROWS[:1])
        assert rows_of(path) == self.ROWS[:1]
        assert path.stat().st_ino != before
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"format": 1}, *self.ROWS[:1]]


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_collection_is_as_before_after_a_pause_also_a_nested_or_failed_one(was_enabled):
    before = gc.isenabled()
    try:
        gc.enable() if was_enabled else gc.disable()
        with pytest.raises(files.DamagedFileError), files.garbage_collection_paused():
            with files.garbage_collection_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise files.DamagedFileError("here")
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable() if before else gc.disable()
