from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from array_api_compat import device
from sklearn.preprocessing import StandardScaler

from repa_lab.metrics import cka, cknna, cosine, cosine_gap, svcca
from repa_lab.metrics.arrays import (
    as_array,
    as_float64,
    both,
    centred,
    largest,
    scaled_to_one,
    spread,
    unit,
    value_of_rank,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_a_tensor_keeps_its_values(dtype):
    tensor = torch.from_numpy(3 * normal(4, 5)).to(dtype)
    found = as_array(tensor)
    assert found.dtype == np.float64
    assert found.tolist() == tensor.tolist()


def test_a_tensor_on_the_cpu_is_read_in_place_by_numpy():
    tensor = torch.from_numpy(normal(4, 5))
    assert np.shares_memory(as_float64(tensor), tensor.numpy())


def test_a_tensor_that_asks_for_gradients_and_a_view():
    tensor = torch.from_numpy(normal(4, 5)).requires_grad_()
    assert as_array(tensor.T[1:]).tolist() == tensor.T[1:].tolist()


def test_values_stay_where_they_lie(lie):
    values = lie(normal(4, 5).astype(np.float32))
    found = as_float64(values)
    assert type(found) is type(values)
    assert device(found) == device(values)
    assert found.tolist() == values.tolist()
    assert "float64" in str(found.dtype)


@pytest.mark.parametrize("name", ["cka", "cknna", "svcca"])
def test_an_array_meets_a_tensor_where_the_tensor_lies(name, lie):
    metric = {"cka": cka, "cknna": cknna, "svcca": lambda x, y: svcca(x, y, 2)}[name]
    x, y = normal(30, 5), normal(30, 4, seed=1) + normal(30, 4) / 2
    for one, other in ((lie(x), y), (x, lie(y))):
        assert {type(side) for side in both(one, other)} == {type(lie(x))}
        assert metric(one, other) == pytest.approx(metric(x, y), abs=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_on_a_gpu_stays_there_and_the_other_side_comes():
    x, y = torch.tensor(normal(30, 5)), torch.tensor(normal(30, 4, seed=1))
    for pair in ((x.cuda(), y), (x, y.cuda()), (x.cuda(), y.numpy())):
        assert [side.device.type for side in both(*pair)] == ["cuda", "cuda"]


def test_the_spread_of_columns(lie):
    """A constant column's is 1, also where its mean is off by a rounding; a column that varies by more than that keeps its own."""
    x = np.column_stack([np.full(7, 0.1), np.full(7, 1e8), normal(7), 1e8 + 1e-3 * normal(7)])
    assert x[:, 0].mean() != x[0, 0]
    mean, deviation = spread(lie(x))
    assert mean.tolist() == pytest.approx(x.mean(axis=0), rel=1e-15)
    scaler = StandardScaler().fit(x)
    assert deviation.tolist() == pytest.approx(scaler.scale_, rel=1e-9)
    assert deviation.tolist()[:2] == [1, 1]


@pytest.mark.parametrize("most", [1.0, 0.3, 1e-310, 1e308, 5e-324, 0.0])
def test_scaling_by_a_power_of_two_alters_no_digit(lie, most):
    x = np.array([[most, -most / 4], [0, most / 2]])
    found = np.array(scaled_to_one(lie(x)).tolist())
    assert 0.5 <= np.abs(found).max() < 1 or most == 0
    assert np.array_equal(found, np.ldexp(x, -np.frexp(most)[1]))


def test_the_largest_and_the_value_of_a_rank(lie):
    x = normal(6, 40)
    assert [set(row) for row in largest(lie(x), 7).tolist()] == [
        set(row) for row in np.argsort(-x, axis=1)[:, :7].tolist()
    ]
    assert [value_of_rank(lie(x), rank) for rank in (0, 100, 239)] == np.sort(x, axis=None)[[0, 100, 239]].tolist()


PAIRED = {"cka": cka, "cosine": cosine, "cosine_gap": cosine_gap, "svcca": lambda x, y: svcca(x, y, dims=2)}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alignment_of_tensors_is_that_of_their_values(name, dtype):
    shape = (9, 4, 5) if "cosine" in name else (9, 5)
    x, y = (torch.from_numpy(normal(*shape, seed=seed)).to(dtype).requires_grad_() for seed in (0, 1))
    widened = [side.detach().double().numpy() for side in (x, y)]
    assert PAIRED[name](x, y) == PAIRED[name](*widened)
    assert np.any(widened[0] != normal(*shape))  # the precision was really lower


def test_centring_leaves_no_rounding_of_a_constant_column():
    x = np.column_stack([np.full(7, 0.1), normal(7)])
    assert (x[:, 0] - x[:, 0].mean()).any()
    assert centred(x)[:, 0].tolist() == [0] * 7
    assert np.array_equal(centred(x)[:, 1], x[:, 1] - x[:, 1].mean())
    assert cka(x[:, :1], normal(7, 2)) == 0


def test_unit_vectors():
    assert unit(np.array([[3.0, 4], [0, 0]])).tolist() == [[0.6, 0.8], [0, 0]]


def test_nothing_heavy_is_imported_before_it_is_needed_and_torch_never():
    code = """
import sys
import repa_lab.metrics as m
heavy = {"torch", "scipy", "sklearn"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import numpy as np
rng = np.random.default_rng(0)
x, y, tokens = rng.standard_normal((40, 5)), rng.standard_normal((40, 4)), rng.standard_normal((2, 20, 3))
m.cka(x, y), m.mutual_knn(x, y), m.cknna(x, y), m.cknna(x, y, definition="platonic"), m.svcca(x, y, 2)
m.lds(tokens, (4, 5)), m.cds(tokens, (4, 5)), m.rmsc(tokens, (4, 5))
m.linear_probe(x, np.arange(40) % 2), m.linear_probe(x, np.arange(40) % 2, "logistic")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
