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
    assert_holds(cache, ODD)
    assert_holds(TextCache(tmp_path, IDENTITY), ODD[::-1])


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
    with pytest.raises(DataError, match="the embedding of 'not there' is not in the cache") as caught:
        cache.read(["there", "not there"])
    assert caught.value.field == "source"


def test_any_flipped_bit_is_noticed_when_the_cache_is_opened_to_be_built(tmp_path):
    """In every byte of every file of tensors and records, one bit flipped, which one takes turns."""
    TextCache(tmp_path, IDENTITY).build(["text"], Encoder(), 1)
    sound = {path: path.read_bytes() for path in tmp_path.glob("*/*.bin")}
    assert len(sound) == len(encode("")) + 1
    unnoticed = []
    for path, content in sound.items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            again = Encoder()
            TextCache(tmp_path, IDENTITY).build(["text"], again, 1)
            if again.asked != [["text"]]:
                unnoticed.append((path.name, place))
            for file, kept in sound.items():
                file.write_bytes(kept)
    assert unnoticed == []


@pytest.mark.parametrize("name", ["texts.bin", "hidden.bin"])
@pytest.mark.parametrize("keep", [0, 5, -1])
def test_what_a_truncated_file_lacks_is_encoded_again(tmp_path, name, keep):
    TextCache(tmp_path, IDENTITY).build("abc", Encoder(), 3)
    (path,) = tmp_path.glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:keep])
    again, cache = Encoder(), TextCache(tmp_path, IDENTITY)
    cache.build("abc", again, 3)
    assert sum(map(len, again.asked)) == (1 if keep == -1 else 3)
    assert_holds(cache, list("abc"))
    assert_holds(TextCache(tmp_path, IDENTITY), list("abc"))


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(cache, tmp_path):
    cache.build("abc", Encoder(), 3)
    (path,) = tmp_path.glob("*/hidden.bin")
    with path.open("r+b") as mapped:
        mapped.truncate(100)
    with pytest.raises(DataError, match=r"hidden.bin' was cut short, from 336 to 100 bytes: start again"):
        cache.read("abc")


@pytest.mark.parametrize(
    "damage", [lambda text: "", lambda text: text[:60], lambda text: text.replace("test", "tests")]
)
def test_without_a_sound_manifest_all_texts_are_encoded_again(cache, tmp_path, damage):
    cache.build("abc", Encoder(), 3)
    (manifest,) = tmp_path.glob("*/manifest.json")
    manifest.write_text(damage(manifest.read_text()))
    again, other = Encoder(), TextCache(tmp_path, IDENTITY)
    other.build("abc", again, 3)
    assert again.asked == [["a", "b", "c"]]
    assert_holds(other, list("abc"))


def test_tensors_of_another_shape_are_refused(cache):
    cache.build("a", lambda texts: {"hidden": torch.zeros(len(texts), 4)}, 1)
    with pytest.raises(DataError, match="tensors of all texts must be alike"):
        cache.build("b", lambda texts: {"hidden": torch.zeros(len(texts), 5)}, 1)


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
    assert again.asked == [["cat", "dog", "eel"]]


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
        manifest = json.loads((tmp_path / digest(identity)[:16] / "manifest.json").read_text())
        assert manifest["identity"] == identity


def test_rows_without_a_record_are_not_taken_for_texts(cache, tmp_path):
    """As a kill leaves them between writing tensors and recording their texts."""
    cache.build("ab", Encoder(), 2)
    for path in tmp_path.glob("*/*.bin"):
        if path.name != "texts.bin":
            path.write_bytes(path.read_bytes() + b"half a row")
    again, other = Encoder(), TextCache(tmp_path, IDENTITY)
    other.build("abc", again, 2)
    assert again.asked == [["c"]]
    assert_holds(other, list("abc"))


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
