from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from repa_lab import metrics
from repa_lab.metrics import alignment
from tests.metrics.conftest import of_arrays

cka, cknna, mutual_knn = map(of_arrays, (metrics.cka, metrics.cknna, metrics.mutual_knn))
clip_and_normalise, nearest_neighbours = map(of_arrays, (metrics.clip_and_normalise, metrics.nearest_neighbours))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def related(count: int, wide: int = 12, narrow: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that share a part, with means far from 0."""
    shared = normal(count, 3, seed=seed)
    x = shared @ normal(3, wide, seed=seed + 1) + normal(count, wide, seed=seed + 2) + 0.5
    return x, shared @ normal(3, narrow, seed=seed + 3) + normal(count, narrow, seed=seed + 4) - 0.3


def neighbours_by_loops(x: np.ndarray, k: int) -> list[list[int]]:
    return [order[:k] for order in orders_by_loops(x.tobytes(), x.shape)]


@functools.cache
def orders_by_loops(values: bytes, shape: tuple[int, int]) -> list[list[int]]:
    """Products rounded once, all items sorted, the lower index first among equals."""
    x, found = np.frombuffer(values).reshape(shape), []
    for i, item in enumerate(x):
        product = {j: math.fsum(item * other) for j, other in enumerate(x) if j != i}
        found.append(sorted(product, key=lambda j, product=product: (-product[j], j)))
    return found


def mask(x: np.ndarray, k: int) -> np.ndarray:
    matrix = np.zeros((len(x), len(x)))
    for i, near in enumerate(neighbours_by_loops(x, k)):
        matrix[i, near] = 1
    return matrix


def paper_by_loops(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """2410.06940, Eqs. 23-24, term by term."""
    n = len(x)

    def align(a: np.ndarray, b: np.ndarray) -> float:
        kernel, other = a @ a.T, b @ b.T
        in_a, in_b = mask(a, k), mask(b, k)
        total = 0.0
        for i in range(n):
            for j in range(n):
                if i != j and in_a[i, j] and in_b[i, j]:
                    total += (kernel[i, j] - kernel[i].mean()) * (other[i, j] - other[i].mean())
        return total / (n - 1) ** 2

    return align(x, y) / math.sqrt(align(x, x) * align(y, y))


def masked_hsic(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """The unbiased HSIC (2010.15327, Eq. 3) of whole masked kernels."""
    n, ones, both = len(a), np.ones(len(a)), mask(a, k) * mask(b, k)
    p, q = both * (a @ a.T), both * (b @ b.T)
    middle = ones @ p @ ones * (ones @ q @ ones) / ((n - 1) * (n - 2))
    return (np.trace(p @ q) + middle - 2 / (n - 2) * (ones @ p @ q @ ones)) / (n * (n - 3))


def platonic_by_matrices(x: np.ndarray, y: np.ndarray, k: int) -> float:
    return masked_hsic(x, y, k) / (math.sqrt(masked_hsic(x, x, k) * masked_hsic(y, y, k)) + 1e-6)


BY_DEFINITION = {"paper": paper_by_loops, "platonic": platonic_by_matrices}
definitions = pytest.mark.parametrize("definition", BY_DEFINITION)

COUNT, WIDTH = 70, 9
two_points = np.where(np.arange(COUNT) % 2, 1.0, -1.0)[:, None] * normal(1, WIDTH)
FEATURES = {
    "normal": normal(COUNT, WIDTH),
    "a large mean": normal(COUNT, WIDTH) + 1e4 * normal(1, WIDTH, seed=1),
    "two points and a hair": two_points + 1e-9 * normal(COUNT, WIDTH, seed=1),
    "heavy norms": normal(COUNT, WIDTH) * np.exp(3 * normal(COUNT, 1, seed=1)),
    "one item far out": normal(COUNT, WIDTH) * np.where(np.arange(COUNT) == 5, 1e5, 1)[:, None],
    "each item thrice": np.random.default_rng(0).permutation(np.repeat(normal(COUNT // 3 + 1, WIDTH), 3, axis=0))[
        :COUNT
    ],
    "small integers": np.random.default_rng(0).integers(-1, 2, (COUNT, WIDTH)).astype(float),
    "classes": np.eye(WIDTH)[np.arange(COUNT) % WIDTH],
    "constant": np.full((COUNT, WIDTH), 0.1),
    "nothing": np.zeros((COUNT, WIDTH)),
    "huge": 1e100 * normal(COUNT, WIDTH),
    "tiny": 1e-100 * normal(COUNT, WIDTH),
    "items that float32 barely holds": normal(COUNT, WIDTH) * np.where(np.arange(COUNT) % 2, 1e-42, 1)[:, None],
}
hard = pytest.mark.parametrize("x", FEATURES.values(), ids=FEATURES.keys())


class TestNearestNeighbours:
    @hard
    @pytest.mark.parametrize("k", [1, 10, COUNT - 1])
    def test_agrees_with_sorting_all_products(self, x, k, tensor):
        assert nearest_neighbours(tensor(x), k).tolist() == neighbours_by_loops(x, k)

    def test_single_precision_alone_would_be_wrong(self):
        """What the case of the name is for: there float32 does not see who is near."""
        x = FEATURES["two points and a hair"]
        single = (x.astype(np.float32) @ x.astype(np.float32).T).astype(float) - np.diag(np.full(COUNT, np.inf))
        order = np.argsort(-single, axis=1, kind="stable")[:, :10]
        shared = [len({*a} & {*b}) for a, b in zip(order.tolist(), neighbours_by_loops(x, 10), strict=True)]
        assert np.mean(shared) < 8

    @hard
    def test_does_not_depend_on_the_chunk(self, x, tensor, monkeypatch):
        whole = nearest_neighbours(tensor(x), 10)
        for chunk in (1, 7, COUNT // 2, COUNT - 1, COUNT):
            monkeypatch.setattr(alignment, "_CHUNK", chunk)
            assert nearest_neighbours(tensor(x), 10).tolist() == whole.tolist()

    def test_more_items_than_a_chunk(self, tensor):
        x = normal(2500, 16)
        products = x @ x.T
        np.fill_diagonal(products, -np.inf)
        assert nearest_neighbours(tensor(x), 10).tolist() == np.argsort(-products, axis=1)[:, :10].tolist()

    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    def test_of_unit_features_are_those_of_scikit_learn(self, metric):
        """On the sphere the order by inner product is that by cosine and by distance."""
        x = unit(normal(400, 20) + 0.5)
        found = NearestNeighbors(n_neighbors=10, metric=metric).fit(x).kneighbors(return_distance=False)
        assert np.array_equal(nearest_neighbours(x, 10), found)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_takes_tensors_of_any_type(self, dtype):
        x = torch.from_numpy(normal(COUNT, WIDTH)).to(dtype).requires_grad_()
        widened = x.detach().double().numpy()
        assert nearest_neighbours(x, 10).tolist() == neighbours_by_loops(widened, 10)

    @pytest.mark.parametrize("k", [0, -1, 6, 7])
    def test_refuses_a_k_out_of_range(self, k):
        with pytest.raises(ValueError, match=f"k = {k} neighbours of 6 items: give 1 <= k <= 5"):
            nearest_neighbours(normal(6, 3), k)

    @pytest.mark.parametrize("shape", [(6,), (6, 2, 3), (1, 3), (6, 0)])
    def test_refuses_other_shapes(self, shape):
        with pytest.raises(ValueError, match="one pooled vector an item"):
            nearest_neighbours(normal(*shape), 1)

    def test_names_the_item_that_is_not_finite(self):
        x = normal(6, 3)
        x[4, 1], x[2, 0] = np.nan, np.inf
        with pytest.raises(
            ValueError, match=r"not finite \(2 of 6 items, the first at index 2\): leave these items out"
        ):
            nearest_neighbours(x, 2)


class TestMutualKNN:
    @pytest.mark.parametrize("k", [1, 5, 10, 59])
    def test_agrees_with_sets(self, k, tensor):
        x, y = related(60)
        pairs = zip(neighbours_by_loops(x, k), neighbours_by_loops(y, k), strict=True)
        expected = np.mean([len({*a} & {*b}) / k for a, b in pairs])
        assert mutual_knn(tensor(x), tensor(y), k) == pytest.approx(expected, abs=1e-15)
        assert 0 < expected <= 1

    def test_of_features_with_themselves_is_1(self):
        assert mutual_knn(normal(60, 5), normal(60, 5), 10) == 1

    def test_of_independent_features_is_chance(self):
        """k of n - 1: the mean of 40 pairs (seeds 0 to 79), and the first pair alone as the field measured one."""
        found = np.array(
            [mutual_knn(normal(200, 64, seed=2 * i), normal(200, 32, seed=2 * i + 1), 10) for i in range(40)]
        )
        assert abs(found.mean() - 10 / 199) < 4 * found.std() / np.sqrt(40)
        assert found.std() / np.sqrt(40) < 0.001

    def test_refuses_different_items(self):
        with pytest.raises(ValueError, match="need features of the same items, got 6 and 7"):
            mutual_knn(normal(6, 3), normal(7, 3), 2)


class TestCKNNA:
    def test_by_hand(self):
        """Neighbours 3 3 3 2 and 3 0 0 0, hence (0, 3) shared. K less its mean there 1 (4 - 2.5) = 1.5; L's 4 (3 - 2.5) = 2."""
        x, y = np.array([[1.0], [2], [3], [4]]), np.array([[4.0], [1], [2], [3]])
        assert nearest_neighbours(x, 1).ravel().tolist() == [3, 3, 3, 2]
        assert nearest_neighbours(y, 1).ravel().tolist() == [3, 0, 0, 0]
        of_itself = 1.5**2 + 3**2 + 4.5**2 + 2**2  # for x and, in another order, for y
        assert cknna(x, y, k=1) == pytest.approx(1.5 * 2 / of_itself, abs=1e-15)

    @definitions
    @pytest.mark.parametrize("k", [2, 10, 39])
    def test_agrees_with_the_definition(self, definition, k, tensor):
        x, y = related(40)
        expected = BY_DEFINITION[definition](x, y, k)
        assert cknna(tensor(x), tensor(y), k, definition) == pytest.approx(expected, abs=1e-12)
        assert abs(expected) > 0.03

    @definitions
    def test_of_independent_features(self, definition):
        """200 x 64 with 200 x 32, seeds 0 and 1: a twentieth, the share of neighbours that chance gives them, and little else."""
        x, y = normal(200, 64), normal(200, 32, seed=1)
        found = cknna(x, y, 10, definition)
        assert found == pytest.approx(BY_DEFINITION[definition](x, y, 10), abs=1e-12)
        assert 0.01 < found < 0.09

    def test_the_two_definitions_differ(self):
        x, y = related(40)
        assert abs(cknna(x, y, 2) - cknna(x, y, 2, "platonic")) > 0.04

    def test_of_features_with_themselves(self):
        x, _ = related(40)
        assert cknna(x, x) == pytest.approx(1, abs=1e-14)
        # The 1e-6 stands beside an HSIC that is 96 here, and 1e8 times less for features a hundredth as long.
        assert masked_hsic(x, x, 10) == pytest.approx(96, abs=1)
        assert cknna(x, x, definition="platonic") == pytest.approx(1, abs=1e-7)
        assert cknna(x / 100, x / 100, definition="platonic") == pytest.approx(0.96 / 1.96, abs=0.01)

    def test_with_all_neighbours_platonic_is_unbiased_cka(self):
        x, y = related(40)
        assert cknna(x, y, 39, "platonic") == pytest.approx(cka(x, y), abs=1e-5)

    @definitions
    def test_ignores_rotation_and_order(self, definition):
        x, y = related(40)
        expected = cknna(x, y, 10, definition)
        rotation = np.linalg.qr(normal(12, 12, seed=9))[0]
        order = np.random.default_rng(1).permutation(40)
        assert cknna(x @ rotation, y, 10, definition) == pytest.approx(expected, abs=1e-12)
        assert cknna(x[order], y[order], 10, definition) == pytest.approx(expected, abs=1e-12)
        assert abs(cknna(x[order], y, 10, definition) - expected) > 0.05

    def test_papers_ignores_scale_and_sides(self, tensor):
        x, y = related(40)
        for scaled in (7 * x, 1e-20 * x, 1e20 * x):
            assert cknna(tensor(scaled), tensor(y)) == pytest.approx(cknna(x, y), abs=1e-12)
        assert cknna(y, x) == pytest.approx(cknna(x, y), abs=1e-14)

    def test_platonics_does_not_ignore_sides(self):
        x, y = related(40)
        assert abs(cknna(x, y, 10, "platonic") - cknna(y, x, 10, "platonic")) > 1e-4
        for pair in ((x, y), (y, x)):
            assert cknna(*pair, 10, "platonic") == pytest.approx(platonic_by_matrices(*pair, 10), abs=1e-12)

    @pytest.mark.parametrize("seed, low, high", [(12, -1, -0.1), (161, 1.1, 2)])
    def test_platonics_leaves_the_unit_interval(self, seed, low, high):
        """Six points of the plane against the same points, each at its neighbour's place."""
        x = normal(6, 2, seed=seed)
        found = cknna(x, np.roll(x, 1, axis=0), 2, "platonic")
        assert found == pytest.approx(platonic_by_matrices(x, np.roll(x, 1, axis=0), 2), abs=1e-12)
        assert low < found < high

    def test_platonics_is_nan_where_a_kernel_has_no_positive_hsic_with_itself(self, tensor):
        x, y = np.array([[-1.0, -3], [-1, -1], [-1, 4], [4, -1]]), normal(4, 2)
        assert masked_hsic(x, x, 2) < 0 < masked_hsic(y, y, 2)
        assert math.isnan(cknna(tensor(x), tensor(y), 2, "platonic"))
        assert cknna(x, y, 2) == pytest.approx(paper_by_loops(x, y, 2), abs=1e-12)

    @definitions
    @pytest.mark.parametrize("name", ["each item thrice", "small integers", "classes"])
    def test_ties_go_to_the_lower_index(self, definition, name, tensor):
        x, y = FEATURES[name], normal(COUNT, 5, seed=3)
        assert cknna(tensor(x), tensor(y), 10, definition) == pytest.approx(
            BY_DEFINITION[definition](x, y, 10), abs=1e-12
        )

    @definitions
    def test_of_a_constant_side(self, definition, tensor):
        """Constant to float64, where the mean is off by its rounding: 0 and not rounding over rounding."""
        if definition == "paper":
            assert cknna(tensor(FEATURES["constant"]), tensor(normal(COUNT, 4)), 10) == 0
        assert cknna(tensor(FEATURES["nothing"]), tensor(normal(COUNT, 4)), 10, definition) == 0

    @definitions
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_takes_tensors_of_any_type(self, definition, dtype):
        x, y = (torch.from_numpy(side).to(dtype) for side in related(40))
        widened = [side.double().numpy() for side in (x, y)]
        assert cknna(x.requires_grad_(), y, 10, definition) == cknna(*widened, 10, definition)
        assert cknna(x, y, 10, definition) == pytest.approx(BY_DEFINITION[definition](*widened, 10), abs=1e-12)

    def test_refuses_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="unknown definition 'Paper'; allowed: paper, platonic"):
            cknna(normal(6, 3), normal(6, 3), 2, "Paper")

    @pytest.mark.parametrize(
        "definition, k, least", [("paper", 0, 1), ("paper", 6, 1), ("platonic", 1, 2), ("platonic", 6, 2)]
    )
    def test_refuses_a_k_out_of_range(self, definition, k, least):
        with pytest.raises(ValueError, match=f"give {least} <= k <= 5, or more items"):
            cknna(normal(6, 3), normal(6, 3), k, definition)

    @pytest.mark.parametrize(
        "x, y", [((3, 2), (3, 2)), ((5, 2), (6, 2)), ((5,), (5, 2)), ((5, 2, 2), (5, 2)), ((5, 0), (5, 2))]
    )
    def test_refuses_what_it_cannot_compare(self, x, y):
        with pytest.raises(
            ValueError, match=r"need features (\(n >= 4, d\), one pooled vector an item|of the same items), got"
        ):
            cknna(normal(*x), normal(*y), 2)

    def test_names_the_side_that_is_not_finite(self):
        y = normal(6, 3)
        y[3, 0] = np.nan
        with pytest.raises(ValueError, match="y: features are not finite"):
            cknna(normal(6, 3), y, 2)


class TestClipAndNormalise:
    def test_by_hand(self):
        """Absolute values 0 to 9; rank int(.8 * 10) = 8 counted from 0 is 8, so 9 becomes 8."""
        x = np.array([[3.0, -4], [0, 0], [6, 8], [5, -9], [7, -1]])
        x[1] = 2, 0
        clipped = np.array([[3.0, -4], [2, 0], [6, 8], [5, -8], [7, -1]])
        assert clip_and_normalise(x, 0.8).numpy() == pytest.approx(unit(clipped), abs=1e-15)

    def test_lengths_are_1_and_a_zero_stays(self):
        x = normal(9, 4)
        x[3] = 0
        lengths = np.linalg.norm(clip_and_normalise(x), axis=1)
        assert lengths == pytest.approx(np.where(np.arange(9) == 3, 0, 1), abs=1e-15)

    def test_a_quantile_of_1_only_normalises(self):
        assert clip_and_normalise(normal(9, 4), 1).numpy() == pytest.approx(unit(normal(9, 4)), abs=1e-15)

    def test_takes_the_value_that_sorting_everything_gives(self, tensor):
        x = torch.from_numpy(normal(50, 30) ** 3).to(torch.bfloat16)
        bound = x.abs().double().flatten().sort().values[int(0.95 * x.numel())].item()
        expected = unit(np.clip(x.double().numpy(), -bound, bound))
        assert np.array(clip_and_normalise(tensor(x.double().numpy())).tolist()) == pytest.approx(expected, abs=1e-15)

    @pytest.mark.parametrize("quantile", [0, -0.1, 1.1, float("nan")])
    def test_refuses_what_is_no_quantile(self, quantile):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            clip_and_normalise(normal(4, 2), quantile)
