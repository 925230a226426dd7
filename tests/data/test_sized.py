from __future__ import annotations

import json

import pytest
import torch

from repa_lab.data import store
from repa_lab.data.crop import Buckets
from repa_lab.data.folder import ImageFolder
from repa_lab.data.sized import open_sized
from repa_lab.data.sources import Digits, groups
from repa_lab.data.store import open_or_build
from repa_lab.files import digest
from tests.data.conftest import noise_image
from tests.data.test_store import KilledError, flip_bit

IDENTITY = {"kind": "test/1", "data": "abc"}
# Widths and heights, so that the sizes 20x12, 16x16 and 12x20 (height, width) take turns irregularly.
WIDE, SQUARE, TALL = (50, 30), (16, 16), (33, 61)
SHAPES = [SQUARE, WIDE, TALL, WIDE, SQUARE, TALL, WIDE, SQUARE, WIDE, WIDE, SQUARE]
MEMBERS = [[1, 3, 6, 8, 9], [0, 4, 7, 10], [2, 5]]  # the images of 12x20, 16x16 and 20x12


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "_SHARD_ROWS", 2)


@pytest.fixture
def source(folder):
    images = {f"{i:02}.png": noise_image(i, shape) for i, shape in enumerate(SHAPES)}
    return ImageFolder(folder(images), 16, Buckets(16, 4, 2.0))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


class Halves:
    """Every second pixel of every second row, as float16; remembers for which images it was asked at once."""

    def __init__(self, source, die_after: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self._source, self._die_after = source, die_after

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        if self._die_after is not None and sum(map(len, self.asked)) >= self._die_after:
            raise KilledError
        self.asked.append(index.tolist())
        return self._source.read(index.tolist())[..., ::2, ::2].half()

    @property
    def images(self) -> list[int]:
        return [image for batch in self.asked for image in batch]


def test_every_image_is_found_by_its_own_number(source, root):
    compute = Halves(source)
    stores = open_sized(root, IDENTITY, source, compute, batch_size=2)
    for i in range(len(source)):
        (height, width) = source.sizes[i].tolist()
        index = torch.tensor([i])
        assert stores.shape(index) == (3, height // 2, width // 2)
        assert torch.equal(stores[index], source.read([i])[..., ::2, ::2].half())
    for members in MEMBERS:
        index = torch.tensor(members[::-1] + members[:1])
        assert torch.equal(stores[index], source.read(index.tolist())[..., ::2, ::2].half())


def test_is_asked_for_images_of_one_size_and_each_once(source, root):
    compute = Halves(source)
    open_sized(root, IDENTITY, source, compute, batch_size=2)
    assert sorted(compute.images) == list(range(11))
    for batch in compute.asked:
        assert len({tuple(source.sizes[i].tolist()) for i in batch}) == 1
    again = Halves(source)
    open_sized(root, IDENTITY, source, again, batch_size=2)
    assert again.asked == []


def test_every_size_has_a_store_that_says_which(source, root):
    stores = open_sized(root, IDENTITY, source, Halves(source), dtype=torch.float32, about={"for": "people"})
    held = [json.loads((path / "manifest.json").read_text()) for path in root.iterdir()]
    found = {(tuple(one["identity"]["size"]), one["count"], tuple(one["shape"]), one["dtype"]) for one in held}
    assert found == {
        ((12, 20), 5, (3, 6, 10), "float32"), ((16, 16), 4, (3, 8, 8), "float32"), ((20, 12), 2, (3, 10, 6), "float32"),
    }  # fmt: skip
    assert {path.name for path in root.iterdir()} == {digest(one["identity"])[:16] for one in held}
    assert all(json.loads((path / "about.json").read_text()) == {"for": "people"} for path in root.iterdir())
    assert [tuple(one.shape) for one in stores.stores] == [(3, 6, 10), (3, 8, 8), (3, 10, 6)]


@pytest.mark.parametrize("whole", [True, False])
def test_images_of_one_size_share_the_store_that_there_was_before(root, whole):
    """The folder and the key of a source of squares are those of a plain store: caches of earlier versions stay good."""
    digits = Digits()
    digits.sizes = digits.sizes[:5]
    digits.labels = digits.labels[:5]

    def means(index: torch.Tensor) -> torch.Tensor:
        return digits.read(index).float().mean((1, 2, 3)).unsqueeze(1)

    def unasked(index: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it is there already")

    if whole:
        open_or_build(root, IDENTITY, 5, means)
        opened = open_sized(root, IDENTITY, digits, unasked)
    else:
        opened = open_sized(root, IDENTITY, digits, means)
        open_or_build(root, IDENTITY, 5, unasked)
    assert [path.name for path in root.iterdir()] == [digest(IDENTITY)[:16]]
    assert torch.equal(opened[torch.tensor([4, 0])], means(torch.tensor([4, 0])))


@pytest.mark.parametrize("done", range(11))
def test_a_kill_loses_at_most_a_shard(source, root, done):
    killed = Halves(source, die_after=done)
    with pytest.raises(KilledError):
        open_sized(root, IDENTITY, source, killed, batch_size=1)
    rest = Halves(source)
    stores = open_sized(root, IDENTITY, source, rest, batch_size=1)
    repeated = set(killed.images) & set(rest.images)
    assert len(repeated) <= 2  # the rows of a shard; the first image of a store also tells what its arrays are like
    assert set(killed.images) | set(rest.images) == set(range(11))
    for i in range(11):
        assert torch.equal(stores[torch.tensor([i])], source.read([i])[..., ::2, ::2].half())


def test_progress_counts_all_images_to_the_total(source, root):
    heard: list[tuple[int, int]] = []
    open_sized(root, IDENTITY, source, Halves(source), batch_size=2, progress=lambda *told: heard.append(told))
    # Five images in batches of two within shards of two, then four, then two.
    assert heard == [(done, 11) for done in (2, 4, 5, 7, 9, 11)]
    heard.clear()
    open_sized(root, IDENTITY, source, Halves(source), progress=lambda *told: heard.append(told))
    assert heard == []


def test_a_flipped_bit_is_computed_again_in_its_own_store_alone(source, root):
    open_sized(root, IDENTITY, source, Halves(source))
    (square,) = (path for path in root.iterdir() if json.loads((path / "manifest.json").read_text())["count"] == 4)
    flip_bit(square / "values-00000002.safetensors", row=1)
    again = Halves(source)
    stores = open_sized(root, IDENTITY, source, again)
    assert again.asked == [[7, 10]]
    assert torch.equal(stores[torch.tensor([10])], source.read([10])[..., ::2, ::2].half())


def test_groups_are_in_order_and_together_all():
    sizes = torch.tensor([[16, 16], [8, 32], [16, 16], [32, 8], [8, 32], [8, 16]])
    assert [group.tolist() for group in groups(sizes)] == [[5], [1, 4], [0, 2], [3]]
    assert [group.tolist() for group in groups(torch.full((3, 2), 8))] == [[0, 1, 2]]
