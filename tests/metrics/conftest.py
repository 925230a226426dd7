"""Where the features of a test lie: the same facts hold for arrays and for tensors that torch computes on."""

import numpy as np
import pytest
import torch

from repa_lab.metrics import arrays


@pytest.fixture(params=["array", "tensor", *(["gpu"] if torch.cuda.is_available() else [])])
def lie(request, monkeypatch):
    """Puts an array where the test is about: ``tensor`` has torch compute on the CPU, as it does on a GPU where there is one."""
    if request.param == "array":
        return np.asarray
    monkeypatch.setattr(arrays, "_BY_NUMPY", ("mps",))
    return lambda values: torch.tensor(values, device="cuda" if request.param == "gpu" else "cpu")
