from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from repa_lab.metrics import cka, cosine, cosine_gap, svcca
from repa_lab.metrics.arrays import as_array, centred, unit


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
def test_a_tensor_keeps_its_values(dtype):
    tensor = torch.from_numpy(3 * normal(4, 5)).to(dtype)
    found = as_array(tensor)
    assert found.dtype == np.float64
    assert found.tolist() == tensor.tolist()


def test_a_tensor_that_asks_for_gradients_and_a_view():
    tensor = torch.from_numpy(normal(4, 5)).requires_grad_()
    assert as_array(tensor.T[1:]).tolist() == tensor.T[1:].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu():
    tensor = torch.from_numpy(normal(4, 5)).to(torch.bfloat16)
    assert as_array(tensor.cuda()).tolist() == tensor.tolist()


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
