from __future__ import annotations

import pytest

from repa_lab.runs import RunDirectory, RunWriter
from repa_lab.runs.tail import RowTail


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "r")


def test_every_row_comes_once(run):
    tail = RowTail(run)
    assert tail.new_rows() == []
    seen = []
    with RunWriter(run) as writer:
        for step in range(7):
            writer.row({"step": step, "note": "é\u2028"})
            if step % 3 == 2:
                seen.append([row["step"] for row in tail.new_rows()])
    seen.append([row["step"] for row in tail.new_rows()])
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]
    assert tail.new_rows() == []


def test_a_torn_row_comes_when_it_is_whole(run):
    tail = RowTail(run)
    run.path.mkdir()
    line = '{"step": 1, "note": "é"}\n'.encode()
    for byte in range(len(line)):
        with (run.path / "metrics.jsonl").open("ab") as file:
            file.write(line[byte : byte + 1])
        assert tail.new_rows() == ([{"step": 1, "note": "é"}] if byte == len(line) - 1 else [])


def test_a_torn_row_that_the_next_writer_dropped(run):
    tail = RowTail(run)
    with RunWriter(run) as writer:
        writer.row({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert tail.new_rows() == [{"step": 1}]
    with RunWriter(run) as writer:
        writer.row({"step": 2})
    assert tail.new_rows() == [{"step": 2}]


def test_a_rewound_file_is_read_again(run):
    tail = RowTail(run)
    with RunWriter(run) as writer:
        for step in (1, 2, 3):
            writer.row({"step": step})
        assert len(tail.new_rows()) == 3
        writer.rewind(1)
        assert [row["step"] for row in tail.new_rows()] == [1]
        writer.row({"step": 2})
    assert [row["step"] for row in tail.new_rows()] == [2]
