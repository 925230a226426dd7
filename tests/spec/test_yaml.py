from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from repa_lab.errors import printable
from repa_lab.spec import SpecError
from repa_lab.spec.document import parse_scalar, read_file

CORE = {
    # null
    "": None, "~": None, "null": None, "Null": None, "NULL": None, "nUll": "nUll",
    # bool
    "true": True, "True": True, "FALSE": False, "off": "off", "on": "on", "yes": "yes", "No": "No", "y": "y", "tRUE": "tRUE",
    # int
    "0": 0, "-7": -7, "+12": 12, "010": 10, "0o17": 15, "0xFf": 255, "1_000": "1_000", "0b11": "0b11", "-0x1": "-0x1",
    "190:20:30": "190:20:30", "0o8": "0o8",
    # float
    "1e-4": 1e-4, "1E5": 1e5, "1.10": 1.1, ".5": 0.5, "-.5e1": -5.0, "1.": 1.0, "+1.5": 1.5, "6.02e+23": 6.02e23,
    ".inf": math.inf, "-.INF": -math.inf, "1e999": math.inf, ".": ".", "1e": "1e", "e5": "e5", "1.2.3": "1.2.3", "inf": "inf",
    # text that older rules took for something else
    "2026-01-02": "2026-01-02", "2026-01-02T03:04:05Z": "2026-01-02T03:04:05Z", "12:30": "12:30", "=": "=", "<<": "<<",
}  # fmt: skip


def read(tmp_path: Path, text: str):
    file = tmp_path / "q.yaml"
    file.write_bytes(text.encode())
    return read_file(file)


def refusal(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        read(tmp_path, text)
    return [line.removeprefix(f"{tmp_path}/q.yaml") for line in str(caught.value).splitlines()]


class TestCoreSchema:
    @pytest.mark.parametrize("text, value", CORE.items())
    def test_plain_scalars(self, tmp_path, text, value):
        for found in (read(tmp_path, f"key: {text}\n").value["key"], parse_scalar(text)):
            assert found == value
            assert type(found) is type(value)

    def test_nan(self, tmp_path):
        assert all(math.isnan(value) for value in read(tmp_path, "a: .nan\nb: .NaN\n").value.values())

    def test_quoted_scalars_are_text(self, tmp_path):
        assert read(tmp_path, "a: '1e-4'\nb: \"true\"\nc: ''\nd: |\n  5\n").value == {
            "a": "1e-4",
            "b": "true",
            "c": "",
            "d": "5\n",
        }

    def test_core_tags_say_what_a_scalar_is(self, tmp_path):
        assert read(tmp_path, "a: !!str 5\nb: !!int '5'\nc: !!float 5\nd: !!null ''\n").value == {
            "a": "5",
            "b": 5,
            "c": 5.0,
            "d": None,
        }

    def test_values_on_the_command_line(self):
        assert parse_scalar("[1, 2e-3, off, null]") == [1, 0.002, "off", None]
        assert parse_scalar("{log: [0.05, 2.0]}") == {"log": [0.05, 2.0]}
        for text in (
            "[1",
            "!!python/name:os.system",
            "!!int x",
            "*a",
            "a: b: c",
            "[" * 2000,
            "\x00",
            "{a: 1, a: 2}",
            "{1: 2}",
        ):
            with pytest.raises(ValueError, match="not a YAML value"):
                parse_scalar(text)

    def test_numbers_of_absurd_length_are_refused(self, tmp_path):
        assert refusal(tmp_path, "a: " + "1" * 5000) == [":1:4: not valid YAML: a number of 5,000 digits"]
        assert refusal(tmp_path, "a: 0x" + "f" * 5000) == [":1:4: not valid YAML: a number of 5,002 digits"]


class TestTags:
    @pytest.mark.parametrize(
        "value",
        [
            "!!python/object/apply:os.system ['touch pwned']",
            "!!python/name:os.system ''",
            "!!python/tuple [1]",
            "!!timestamp 2020-13-45",
            "!!timestamp nonsense",
            "!!binary aGk=",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!pairs [a: 1]",
            "!mine 5",
            "!<tag:example.com,2026:x> 5",
        ],
    )
    def test_no_other_tag_is_known(self, tmp_path, monkeypatch, value):
        monkeypatch.chdir(tmp_path)
        (line,) = refusal(tmp_path, f"name: q\nquestion: {value}\n")
        assert line.startswith(":2:11: not valid YAML: could not determine a constructor for the tag ")
        assert not (tmp_path / "pwned").exists()

    @pytest.mark.parametrize("value", ["!!int abc", "!!int ''", "!!float x", "!!bool maybe", "!!bool yes", "!!null 5"])
    def test_a_core_tag_must_fit(self, tmp_path, value):
        kind, text = value.removeprefix("!!").split(" ")
        expected = f"{text.strip(chr(39))!r} is not a valid {kind}"
        assert refusal(tmp_path, f"a: {value}\n") == [f":1:4: not valid YAML: {expected}"]


class TestKeys:
    def test_duplicates_are_all_named_with_the_line_of_the_first(self, tmp_path):
        text = "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\nb: {x: 1, x: 2}\n"
        assert refusal(tmp_path, text) == [
            ":5:3: b.c: duplicate key 'c', first given on line 3",
            ":6:1: a: duplicate key 'a', first given on line 1",
            ":7:1: b: duplicate key 'b', first given on line 2",
            ":7:11: b.x: duplicate key 'x', first given on line 7",
        ]

    def test_duplicates_inside_lists(self, tmp_path):
        assert refusal(tmp_path, "a:\n- {b: 1}\n- {b: 1, b: 2}\n") == [
            ":3:10: a.1.b: duplicate key 'b', first given on line 3"
        ]

    def test_keys_must_be_text(self, tmp_path):
        text = "1: a\ntrue: b\n~: c\n1.5: d\n? [x]\n: e\n? {y: z}\n: f\nok: {2: g}\n'1': fine\noff: fine\n"
        assert refusal(tmp_path, text) == [
            ":1:1: a key must be text, got '1'; quote it",
            ":2:1: a key must be text, got 'true'; quote it",
            ":3:1: a key must be text, got '~'; quote it",
            ":4:1: a key must be text, got '1.5'; quote it",
            ":5:3: a key must be text, got a sequence",
            ":7:3: a key must be text, got a mapping",
            ":9:6: ok: a key must be text, got '2'; quote it",
        ]

    def test_a_mapping_merges_others_and_its_own_keys_win(self, tmp_path):
        text = "x: &x {a: 1, b: {c: 2}}\ny: &y\n  <<: *x\n  a: 3\nz: {b: 0, <<: [{d: 4, a: 5}, *y]}\n'<<': 6\n"
        value = read(tmp_path, text).value
        assert value == {
            "x": {"a": 1, "b": {"c": 2}},
            "y": {"a": 3, "b": {"c": 2}},
            "z": {"a": 5, "b": 0, "d": 4},
            "<<": 6,
        }
        assert list(value["y"]) == ["b", "a"]

    def test_a_merged_value_is_placed_where_it_is_written(self, tmp_path):
        places = read(tmp_path, "x: &x {a: 1, b: {c: 2}}\ny:\n  <<: *x\n  b: {d: 3}\n").places
        assert {path[1:]: (p.line, p.column) for path, p in places.items() if path[:1] == ("y",)} == {
            (): (2, 1),
            ("a",): (1, 8),
            ("b",): (4, 3),
            ("b", "d"): (4, 7),
        }

    @pytest.mark.parametrize(
        "text, line",
        [
            ("x: {<<: 5}\n", ":1:9: x: << takes a mapping, or a list of mappings"),
            ("x: &x {a: 1}\ny: {<<: [*x, 2]}\n", ":2:14: y: << takes a mapping, or a list of mappings"),
            ("x: {<<: {a: 1}, <<: {b: 1}}\n", ":1:17: x.<<: duplicate key '<<', first given on line 1"),
            ("x: &x {<<: *x}\n", ":1:1: nested more than 40 levels deep"),
        ],
    )
    def test_what_cannot_be_merged(self, tmp_path, text, line):
        assert refusal(tmp_path, text) == [line]


class TestPlaces:
    TEXT = "name: q\ntrain:\n  steps: 5\n  lr:   1e-4\naxes:\n  regularizer.weight: [0.5,\n    1.0]\n  named: {a: {x.y: 1}}\n"

    def test_keys_stand_where_they_begin_and_list_items_too(self, tmp_path):
        places = {path: (p.line, p.column) for path, p in read(tmp_path, self.TEXT).places.items()}
        assert places == {
            (): (1, 1),
            ("name",): (1, 1),
            ("train",): (2, 1),
            ("train", "steps"): (3, 3),
            ("train", "lr"): (4, 3),
            ("axes",): (5, 1),
            ("axes", "regularizer.weight"): (6, 3),
            ("axes", "regularizer.weight", 0): (6, 24),
            ("axes", "regularizer.weight", 1): (7, 5),
            ("axes", "named"): (8, 3),
            ("axes", "named", "a"): (8, 11),
            ("axes", "named", "a", "x.y"): (8, 15),
        }

    def test_an_alias_has_places_wherever_it_is_used(self, tmp_path):
        document = read(tmp_path, "a: &e {name: x}\nb: *e\n")
        assert document.value == {"a": {"name": "x"}, "b": {"name": "x"}}
        assert {("a", "name"), ("b", "name")} <= set(document.places)
        assert (document.places[("b",)].line, document.places[("b",)].column) == (2, 1)


class TestFiles:
    def test_a_syntax_error_stands_where_it_is(self, tmp_path):
        assert refusal(tmp_path, "name: q\nmodel: {family: sit\ntrain: 5\n") == [
            ":3:6: not valid YAML: expected ',' or '}', but got ':'"
        ]
        assert refusal(tmp_path, "name: q\n\tmodel: 5\n") == [
            ":2:1: not valid YAML: found character '\\t' that cannot start any token"
        ]
        assert refusal(tmp_path, "name: q\n---\nname: r\n") == [":2:1: not valid YAML: but found another document"]
        assert refusal(tmp_path, "a: 'x\n\nb: c\n") == [":4:1: not valid YAML: found unexpected end of stream"]

    def test_control_characters(self, tmp_path):
        assert refusal(tmp_path, "name: q\nquestion: a\x07b\n") == [
            ":2:12: not valid YAML: the character '\\x07' is not allowed"
        ]

    @pytest.mark.parametrize("escape", ["\\U00110000", "\\UFFFFFFFF"])
    def test_an_escape_beyond_unicode(self, tmp_path, escape):
        assert refusal(tmp_path, f'name: "{escape}"\n') == [":1:1: not valid YAML: an escape stands for no character"]

    @pytest.mark.parametrize("text", ["", "# nothing\n", "- name: q\n", "name\n", "5\n", "null\n"])
    def test_the_top_must_be_a_mapping(self, tmp_path, text):
        assert refusal(tmp_path, text) == [":1:1: a spec must be a mapping of fields, such as 'name: my_question'"]

    def test_a_byte_order_mark_and_windows_line_ends_change_nothing(self, tmp_path):
        document = read(tmp_path, "\ufeffname: q\r\ntrain: {steps: 5}\r\n")
        assert document.value == {"name": "q", "train": {"steps": 5}}
        assert document.places[("train", "steps")].line == 2

    def test_a_file_of_ten_megabytes(self, tmp_path):
        assert refusal(tmp_path, "name: q\n" + "# padding\n" * 1_050_000) == [
            ":1:1: a spec may have at most 1,048,576 bytes; this file has 10,500,008"
        ]

    def test_what_cannot_be_read(self, tmp_path):
        (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
        cases = {
            tmp_path / "none.yaml": "cannot read the file: No such file or directory",
            tmp_path: "cannot read the file: Is a directory",
            tmp_path / "latin.yaml": "not UTF-8 text: invalid continuation byte at byte 9",
            tmp_path / ("x" * 300): "cannot read the file: File name too long",
            Path("a\0b"): "cannot read the file: embedded null byte",
        }
        for file, message in cases.items():
            with pytest.raises(SpecError) as caught:
                read_file(file)
            assert str(caught.value) == f"{printable(str(file))}:1:1: {message}"


class TestBombs:
    def test_an_alias_bomb_is_refused_before_it_is_built(self, tmp_path):
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
        (line,) = refusal(tmp_path, "\n".join(lines))
        assert line.endswith("more than 20,000 values or 40 levels")

    def test_a_bomb_of_refused_keys(self, tmp_path):
        for item, expected in (("x: *a{}", "more than 20,000 values or 40 levels"), ("? [*a{}] : x", "got a sequence")):
            lines = [f"a{i}: &a{i} {{{', '.join([item.format(i - 1)] * 10)}}}" for i in range(1, 30)]
            assert refusal(tmp_path, "\n".join(["a0: &a0 [x, x]", *lines]))[-1].endswith(expected)

    def test_a_list_that_holds_itself(self, tmp_path):
        assert refusal(tmp_path, "a: &a [1, *a]\n") == [":1:8: more than 20,000 values or 40 levels"]

    @pytest.mark.parametrize("text", ["a: " + "[" * 5000, "a: " + "{b: " * 5000, "- " * 3000 + "x"])
    def test_bottomless_nesting(self, tmp_path, text):
        assert refusal(tmp_path, text) == [":1:1: nested more than 40 levels deep"]

    def test_nesting_within_the_parsers_reach(self, tmp_path):
        (line,) = refusal(tmp_path, "a: " + "[" * 50 + "]" * 50)
        assert line.endswith("more than 20,000 values or 40 levels")

    def test_too_many_values(self, tmp_path):
        (line,) = refusal(tmp_path, "a: [" + "1, " * 20_001 + "]")
        assert line.endswith("more than 20,000 values or 40 levels")


def test_half_a_surrogate_pair_is_not_text(tmp_path):
    assert refusal(tmp_path, 'a: ["x", "\\ud800"]\n"\\udfff": 1\nb: "\\U0001F600"\n') == [
        ":1:10: a.1: half a surrogate pair is not text",
        ":2:1: a key must be text, got '\\udfff'; quote it",
    ]


def test_what_json_writes_is_read_as_json(tmp_path):
    value = {"a": ["\U0001f600", 'caf\xe9\n\t"/', 1e-7, -0.5, 10**20, True, None, {}, []], "\U0001f600": {"b": "1"}}
    for indent in (None, 2):
        assert read(tmp_path, json.dumps(value, indent=indent)).value == value
    assert read(tmp_path, '{"a":[1,2,],"b":"\\/",}').value == {"a": [1, 2], "b": "/"}
