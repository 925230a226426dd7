from __future__ import annotations

import json
import threading

import pytest
import torch

from repa_lab.data import DataError
from repa_lab.data.cache import TextCache
from repa_lab.files import digest

IDENTITY = {"kind": "texts/1", "family": "test", "precision": "fp32"}
ODD = [
    "", " ", "  two spaces ", "a cat", "a cat ", "A cat", "line\nbreak", "tab\t", "null\0byte", "quote\"'\\",
    "../../etc/passwd",
    "a/b/c", "ß", "é", "e\u0301", "猫", "🐈\u200d⬛", "\u2028", "\ufeffmarked", "x" * 10_000, "{prompt}", "%s", "CON", ".hidden",
]  # fmt: skip


class Encoder:
    """Named tensors that no other text has: floats of two precisions, a mask, ids, truth values, and one number."""

    def __init__(self, broken: str | None = None) -> None:
        self.asked: list[list[str]] = []
        self._broken = broken

    def __call__(self, captions) -> dict[str, torch.Tensor]:
        self.asked.append(list(captions))
        rows = [encode(caption) for caption in captions]
        for row, caption in zip(rows, captions, strict=True):
            if caption == self._broken:
                row["pooled"][1] = torch.inf
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def encode(caption: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(int(digest(caption)[:8], 16))
    return {
        "hidden": torch.randn(7, 4, generator=draw),
        "pooled": torch.randn(3, generator=draw).bfloat16(),
        "half": torch.randn(2, 2, generator=draw).half(),
        "mask": torch.randint(2, (7,), generator=draw),
        "ids": torch.randint(100, (7,), generator=draw, dtype=torch.int32),
        "shown": torch.randint(2, (5,), generator=draw).bool(),
        "length": torch.tensor(len(caption)),
    }


def assert_holds(cache: TextCache, texts: list[str]) -> None:
    found = cache.read(texts)
    for row, text in enumerate(texts):
        for name, value in encode(text).items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name][row], value), (name, text)


def files(root) -> list:
    return sorted(root.glob("*/*.safetensors"))


@pytest.fixture
def cache(tmp_path) -> TextCache:
    return TextCache(tmp_path, IDENTITY)


def test_what_is_read_is_what_was_encoded(cache):
    encoder = Encoder()
    cache.build(["one", "two", "three", "four", "five"], encoder, 2)
    assert encoder.asked == [["one", "two"], ["three", "four"], ["five"]]
    found = cache.read(["four", "one", "four"])
    assert found.keys() == encode("").keys()
    assert found["hidden"].shape == (3, 7, 4)
    assert found["length"].tolist() == [4, 3, 4]
    assert_holds(cache, ["four", "one", "four", "five"])


def test_texts_with_odd_characters_are_kept_apart(cache, tmp_path):
    cache.build(ODD, Encoder(), 5)
    assert len(files(tmp_path)) == len(ODD)
    assert_holds(cache, ODD)
    assert_holds(TextCache(tmp_path, IDENTITY), ODD[::-1])
    assert {path.parent.parent for path in tmp_path.rglob("*.safetensors")} == {tmp_path}  # nothing left its folder


def test_each_text_is_encoded_once_whatever_how_often_it_appears(cache):
    first, second, third = Encoder(), Encoder(), Encoder()
    cache.build(["a", "b", "a", "a", "c", "b"], first, 10)
    assert first.asked == [["a", "b", "c"]]
    cache.build(["d", "a", "d", "e"], second, 1)
    assert second.asked == [["d"], ["e"]]
    cache.build(["e", "d", "c", "b", "a"], third, 1)
    assert third.asked == []
    assert_holds(cache, list("abcde"))


def test_a_text_is_encoded_alike_whatever_batch_it_came_in(tmp_path):
    for size in (1, 3, 100):
        cache = TextCache(tmp_path / str(size), IDENTITY)
        cache.build(ODD, Encoder(), size)
        assert_holds(cache, ODD)


def test_a_kill_loses_one_batch(cache):
    def dying(captions):
        if "e" in captions:
            raise KeyboardInterrupt
        return Encoder()(captions)

    with pytest.raises(KeyboardInterrupt):
        cache.build("abcdefg", dying, 2)
    rest = Encoder()
    cache.build("abcdefg", rest, 2)
    assert rest.asked == [["e", "f"], ["g"]]


def test_progress_counts_what_is_missing(cache):
    heard: list[tuple[int, int]] = []
    cache.build("abcde", Encoder(), 2, lambda *told: heard.append(told))
    assert heard == [(2, 5), (4, 5), (5, 5)]
    heard.clear()
    cache.build("abcdefg", Encoder(), 2, lambda *told: heard.append(told))
    assert heard == [(2, 2)]


def test_a_text_that_is_missing_is_named(cache):
    cache.build(["there"], Encoder(), 1)
    with pytest.raises(DataError, match="the cached embedding of 'not there' is missing or damaged") as caught:
        cache.read(["there", "not there"])
    assert caught.value.field == "source"


@pytest.mark.parametrize("keep", [0, 5, 60, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_file_is_refused_and_encoded_again(cache, tmp_path, keep):
    cache.build("abc", Encoder(), 3)
    path = files(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="missing or damaged"):
        cache.read("abc")
    again = Encoder()
    cache.build("abc", again, 3)
    assert sum(map(len, again.asked)) == 1
    assert_holds(cache, list("abc"))


def test_any_flipped_bit_is_noticed(cache, tmp_path):
    """In every byte of the file, header and all: one bit flipped, which one takes turns."""
    cache.build(["text"], Encoder(), 1)
    (path,) = files(tmp_path)
    sound = path.read_bytes()
    unnoticed = []
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            cache.read(["text"])
        except DataError:
            continue
        unnoticed.append(place)
    assert unnoticed == []
    again = Encoder()
    cache.build(["text"], again, 1)
    assert again.asked == [["text"]]
    assert path.read_bytes() == sound


def test_another_texts_file_is_never_read(cache, tmp_path):
    cache.build(["a"], Encoder(), 1)
    (first,) = files(tmp_path)
    cache.build(["b"], Encoder(), 1)
    (second,) = (path for path in files(tmp_path) if path != first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="the cached embedding of 'b' is missing or damaged"):
        cache.read(["a", "b"])
    again = Encoder()
    cache.build(["a", "b"], again, 2)
    assert again.asked == [["b"]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_and_not_kept(cache, tmp_path, value):
    def overflowing(captions):
        found = Encoder()(captions)
        found["half"][list(captions).index("dog"), 1, 0] = value
        return found

    with pytest.raises(DataError) as caught:
        cache.build(["cat", "dog", "eel"], overflowing, 3)
    assert str(caught.value) == "'dog' is encoded to what is not finite (half); use run.encoder_precision: fp32"
    assert caught.value.field == "source"
    again = Encoder()
    cache.build(["cat", "dog", "eel"], again, 3)
    assert again.asked == [["dog", "eel"]]


def test_a_long_text_is_shortened_in_messages(cache):
    with pytest.raises(DataError) as caught:
        cache.build(["y" * 300], Encoder(broken="y" * 300), 1)
    assert str(caught.value).startswith(f"'{'y' * 50}' is encoded to what is not finite (pooled)")


def test_another_identity_is_another_folder(tmp_path):
    identities = [IDENTITY, {**IDENTITY, "precision": "bf16"}, {**IDENTITY, "family": "other"}]
    for identity in identities:
        encoder = Encoder()
        TextCache(tmp_path, identity).build("ab", encoder, 2)
        assert encoder.asked == [["a", "b"]]
    assert {path.name for path in tmp_path.iterdir()} == {digest(identity)[:16] for identity in identities}
    for identity in identities:
        about = json.loads((tmp_path / digest(identity)[:16] / "about.json").read_text())
        assert about == identity


def test_nothing_of_a_file_being_written_is_taken_for_one(cache, tmp_path):
    cache.build("ab", Encoder(), 2)
    for path in files(tmp_path):
        path.rename(path.with_suffix(".tmp"))
    again = Encoder()
    cache.build("ab", again, 2)
    assert again.asked == [["a", "b"]]
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_that_build_at_once_do_not_disturb_each_other(tmp_path):
    texts, errors = [f"text {i}" for i in range(60)], []
    start = threading.Barrier(4)

    def build() -> None:
        try:
            start.wait()
            TextCache(tmp_path, IDENTITY).build(texts, Encoder(), 7)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_holds(TextCache(tmp_path, IDENTITY), texts)


def test_what_is_read_may_be_changed_without_harm(cache):
    cache.build("a", Encoder(), 1)
    cache.read("a")["hidden"].zero_()
    assert_holds(cache, ["a"])


def test_of_much_only_the_headers_are_looked_at_and_damage_shows_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("repa_lab.data.cache._ALWAYS_CHECKED_BYTES", 0)
    cache, asked = TextCache(tmp_path, {"encoder": 1}), []

    def encode(texts):
        asked.append(list(texts))
        return {"values": torch.arange(8.0).expand(len(texts), 8).clone()}

    cache.build(["a", "b", "c"], encode, 8)
    flipped, cut = (
        next(path for path in tmp_path.rglob("*.safetensors") if path == cache._path(text)) for text in "ab"
    )
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    cache.build(["a", "b", "c"], encode, 8)
    assert asked == [["a", "b", "c"], ["b"]]
    assert cache.read(["b", "c"])["values"].tolist() == [list(range(8))] * 2
    with pytest.raises(DataError, match="'a' is missing or damaged; delete"):
        cache.read(["a"])
