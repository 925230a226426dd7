from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import pytest

from repa_lab.runs import files


class TestAtomicWrites:
    def test_a_write_that_raises_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "state.json"
        files.write_json(path, {"step": 1})

        def write(temporary):
            temporary.write_text('{"step": 2')
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            files.replace_atomically(path, write)
        assert files.read_json(path) == {"step": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["state.json"]

    def test_a_first_write_that_raises_leaves_nothing(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            files.replace_atomically(tmp_path / "a" / "x", lambda temporary: 1 // 0)
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

        files.replace_atomically(path, write)
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


class TestLines:
    ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "note": "é\n\u2028"}, {"step": 3, "x": [1, None]}]  # noqa: RUF012

    def fill(self, path):
        for row in self.ROWS:
            files.append_line(path, row)

    def test_rows_come_back_in_order(self, tmp_path):
        path = tmp_path / "m.jsonl"
        assert files.read_lines(path) == []
        self.fill(path)
        assert files.read_lines(path) == self.ROWS
        assert len(path.read_text().split("\n")) == 4

    def test_a_tail_torn_anywhere_is_left_out(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        content = path.read_bytes()
        for length in range(len(content) + 1):
            path.write_bytes(content[:length])
            whole = content[:length].count(b"\n")
            assert files.read_lines(path) == self.ROWS[:whole]

    @pytest.mark.parametrize(
        "line", [b"{", b"\x00\x00\x00", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b'"x"', b"3"]
    )
    def test_a_damaged_line_is_named(self, tmp_path, line):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        first, *rest = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([first, line, *rest, b""]))
        with pytest.raises(files.DamagedFileError, match=rf"^'{path}' line 2 is damaged: no JSON"):
            files.read_lines(path)
        path.write_bytes(line)
        with pytest.raises(files.DamagedFileError, match=rf"^'{path}' is damaged: no JSON"):
            files.read_object(path)

    def test_dropping_a_torn_tail_keeps_every_whole_row_to_the_byte(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        content = path.read_bytes()
        for length in range(len(content) + 1):
            path.write_bytes(content[:length])
            files.drop_torn_line(path)
            assert path.read_bytes() == content[: content.rfind(b"\n", 0, length) + 1]
        files.drop_torn_line(tmp_path / "missing")
        assert not (tmp_path / "missing").exists()

    def test_a_row_is_with_the_operating_system_at_once(self, tmp_path):
        path = tmp_path / "m.jsonl"
        code = (
            f"import os, signal; from pathlib import Path; from repa_lab.runs import files\n"
            f"files.append_line(Path({str(path)!r}), {{'step': 1}}); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
        assert files.read_lines(path) == [{"step": 1}]

    def test_rewriting_replaces_the_file_whole(self, tmp_path):
        path = tmp_path / "m.jsonl"
        self.fill(path)
        before = path.stat().st_ino
        files.rewrite_lines(path, self.ROWS[:1])
        assert files.read_lines(path) == self.ROWS[:1]
        assert path.stat().st_ino != before
        assert [json.loads(line) for line in path.read_text().splitlines()] == self.ROWS[:1]
