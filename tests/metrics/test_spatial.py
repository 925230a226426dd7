from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from repa_lab import metrics
from tests.metrics.conftest import of_arrays

lds, cds, rmsc = of_arrays(metrics.lds), of_arrays(metrics.cds), of_arrays(metrics.rmsc)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / length if length else 0.0


def pairs(image: np.ndarray, grid: tuple[int, int]) -> list[tuple[int, float]]:
    """Distance and cosine of every pair of places, by walking over the grid."""
    h, w = grid
    places = [(row, column) for row in range(h) for column in range(w)]
    found = []
    for i, (r, c) in enumerate(places):
        for j, (s, d) in enumerate(places):
            if i < j:
                found.append((abs(r - s) + abs(c - d), cosine(image[i], image[j])))
    return found


def lds_by_loops(tokens: np.ndarray, grid: tuple[int, int], far: int) -> float:
    values = []
    for image in tokens:
        near = [value for distance, value in pairs(image, grid) if distance == 1]
        distant = [value for distance, value in pairs(image, grid) if distance >= far]
        values.append(np.mean(near) - np.mean(distant))
    return float(np.mean(values))


def cds_by_loops(tokens: np.ndarray, grid: tuple[int, int], farthest: int) -> float:
    slopes = []
    for image in tokens:
        steps = range(1, min(farthest, sum(grid) - 2) + 1)
        means = [np.mean([value for distance, value in pairs(image, grid) if distance == step]) for step in steps]
        slopes.append(np.polyfit(list(steps), means, 1)[0])
    return -float(np.mean(slopes))


def rmsc_by_loops(tokens: np.ndarray) -> float:
    values = []
    for image in tokens:
        units = [token / (np.linalg.norm(token) or math.inf) for token in image]
        mean = sum(units) / len(units)
        values.append(math.sqrt(sum((u - mean) @ (u - mean) for u in units) / len(units)))
    return float(np.mean(values))


GRIDS = pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3), (1, 9), (7, 6)], ids=str)
MEASURES = {
    "lds": lambda tokens, grid: lds(tokens, grid, far=3),
    "cds": cds,
    "rmsc": rmsc,
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
E1, E2 = [1.0, 0.0], [0.0, 1.0]


class TestByHand:
    """A row of four tokens, ``e1 e1 e2 e2``: cosines 1 0 1 at distance 1, 0 0 at 2, 0 at 3."""

    ROW = np.array([[E1, E1, E2, E2]])

    def test_lds(self):
        assert lds(self.ROW, (1, 4), far=3) == pytest.approx(2 / 3 - 0, abs=1e-15)
        assert lds(self.ROW, (4, 1), far=2) == pytest.approx(2 / 3 - 0, abs=1e-15)
        # As 2 x 2 the rows differ: at distance 1 the two across agree and the two down do not; both diagonals differ.
        assert lds(self.ROW, (2, 2), far=2) == pytest.approx(2 / 4 - 0, abs=1e-15)

    def test_cds(self):
        """Means 2/3 0 0 at 1 2 3: slope (-1 * 2/3 + 1 * 0) / 2. Two distances give their difference."""
        assert cds(self.ROW, (1, 4)) == pytest.approx(1 / 3, abs=1e-15)
        assert cds(self.ROW, (1, 4), farthest=2) == pytest.approx(2 / 3, abs=1e-15)
        assert cds(self.ROW, (2, 2)) == pytest.approx(1 / 2, abs=1e-15)

    def test_rmsc(self):
        """The mean is (1/2, 1/2), each token's square distance from it 1/2."""
        assert rmsc(self.ROW, (2, 2)) == pytest.approx(math.sqrt(0.5), abs=1e-15)

    def test_the_grid_is_row_major(self):
        """Alternating tokens are columns on 3 x 2, where the 4 of 7 near pairs that go down agree, and a chessboard on 2 x 3."""
        tokens = np.array([[E1, E2, E1, E2, E1, E2]])
        assert lds(tokens, (3, 2), far=3) == pytest.approx(4 / 7 - 0, abs=1e-15)
        assert lds(tokens, (2, 3), far=3) == pytest.approx(0 - 0, abs=1e-15)


class TestAgainstLoops:
    @GRIDS
    @pytest.mark.parametrize("far", [2, 4])
    def test_lds(self, grid, far, tensor):
        tokens = normal(3, grid[0] * grid[1], 5) + 0.5
        assert lds(tensor(tokens), grid, far) == pytest.approx(lds_by_loops(tokens, grid, far), abs=1e-12)

    @GRIDS
    @pytest.mark.parametrize("farthest", [2, 8])
    def test_cds(self, grid, farthest, tensor):
        tokens = normal(3, grid[0] * grid[1], 5) + 0.5
        assert cds(tensor(tokens), grid, farthest) == pytest.approx(cds_by_loops(tokens, grid, farthest), abs=1e-12)

    @GRIDS
    def test_rmsc(self, grid, tensor):
        tokens = normal(3, grid[0] * grid[1], 5) + 0.5
        assert rmsc(tensor(tokens), grid) == pytest.approx(rmsc_by_loops(tokens), abs=1e-12)

    def test_the_papers_settings(self):
        """Distances 6 and 8 on 16 x 16."""
        tokens = normal(1, 256, 4) + 0.5
        assert lds(tokens, (16, 16)) == pytest.approx(lds_by_loops(tokens, (16, 16), 6), abs=1e-12)
        assert cds(tokens, (16, 16)) == pytest.approx(cds_by_loops(tokens, (16, 16), 8), abs=1e-12)


class TestAll:
    @measures
    def test_of_a_constant_map_is_0(self, measure):
        assert measure(np.broadcast_to(normal(2, 1, 5), (2, 20, 5)), (4, 5)) == pytest.approx(0, abs=1e-7)

    @measures
    def test_of_nothing_but_zeros_is_0(self, measure):
        assert measure(np.zeros((2, 20, 5)), (4, 5)) == 0

    @measures
    def test_ignores_rotation_and_the_length_of_every_token(self, measure):
        tokens = normal(2, 20, 5) + 0.5
        expected = measure(tokens, (4, 5))
        rotation = np.linalg.qr(normal(5, 5, seed=9))[0]
        assert abs(expected) > 1e-3
        assert measure(tokens @ rotation, (4, 5)) == pytest.approx(expected, abs=1e-12)
        assert measure(tokens * np.exp(normal(2, 20, 1, seed=2)), (4, 5)) == pytest.approx(expected, abs=1e-12)

    @measures
    def test_is_the_mean_over_images(self, measure):
        tokens = normal(2, 20, 5) + 0.5
        single = [measure(tokens[i : i + 1], (4, 5)) for i in range(2)]
        assert measure(tokens, (4, 5)) == pytest.approx(np.mean(single), abs=1e-12)
        assert abs(single[0] - single[1]) > 1e-4

    @measures
    def test_structure_is_more_than_noise(self, measure):
        """Tokens that turn slowly over the grid, and the same tokens shuffled; contrast depends on no place."""
        row, column = np.divmod(np.arange(48), 8)
        tokens = np.stack([np.cos(row / 4), np.sin(row / 4), np.cos(column / 4), np.sin(column / 4)], axis=1)[None]
        shuffled = tokens[:, np.random.default_rng(0).permutation(48)]
        if measure is rmsc:
            assert measure(shuffled, (6, 8)) == pytest.approx(measure(tokens, (6, 8)), abs=1e-12)
        else:
            assert measure(tokens, (6, 8)) > measure(shuffled, (6, 8)) + 0.01

    @measures
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_takes_tensors_of_any_type(self, measure, dtype):
        tokens = torch.from_numpy(normal(2, 20, 5) + 0.5).to(dtype)
        assert measure(tokens.requires_grad_(), (4, 5)) == measure(tokens.detach().double().numpy(), (4, 5))

    @measures
    @pytest.mark.parametrize("grid", [(4, 4), (5, 5), (-4, -5)])
    def test_refuses_a_grid_that_the_tokens_do_not_fill(self, measure, grid):
        with pytest.raises(ValueError, match=f"20 tokens do not fill the grid {grid[0]}x{grid[1]}: give the"):
            measure(normal(2, 20, 5), grid)

    @measures
    @pytest.mark.parametrize("shape", [(20, 5), (2, 4, 5, 3), (2, 20, 0)])
    def test_refuses_other_shapes(self, measure, shape):
        with pytest.raises(ValueError, match="need tokens"):
            measure(np.zeros(shape), (4, 5))

    @measures
    def test_refuses_values_that_are_not_finite(self, measure):
        tokens = normal(2, 20, 5)
        tokens[1, 3, 2] = np.nan
        with pytest.raises(ValueError, match="1 of 2 items, the first at index 1"):
            measure(tokens, (4, 5))


class TestSettings:
    @pytest.mark.parametrize("far", [1, 6, 0])
    def test_refuses_a_distance_that_the_grid_does_not_have(self, far):
        with pytest.raises(ValueError, match=f"grid 3x4 are at most 5 apart: give 2 <= far <= 5, got {far}"):
            lds(normal(1, 12, 3), (3, 4), far)

    @pytest.mark.parametrize("grid, farthest", [((1, 2), 8), ((1, 1), 8), ((3, 3), 1)])
    def test_a_slope_needs_two_distances(self, grid, farthest):
        with pytest.raises(ValueError, match="needs two distances"):
            cds(normal(1, grid[0] * grid[1], 3), grid, farthest)
