"""Tensors for tests whose references are written in NumPy, and the networks of the encoders' tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repa_lab.metrics import CosineSums
from tests.encoders.conftest import digits, hostile, vits14, vits14_reg  # noqa: F401  fixtures


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def tensor(request) -> Callable[[np.ndarray], torch.Tensor]:
    """Puts an array on the CPU or on a GPU."""
    return lambda values: torch.tensor(values, device=request.param)


def of_arrays(metric: Callable[..., Any]) -> Callable[..., Any]:
    """Return a metric of tensors that takes NumPy arrays."""

    def computed(*values: Any, **options: Any) -> Any:
        tensors = (torch.tensor(value) if isinstance(value, np.ndarray) else value for value in values)
        return metric(*tensors, **options)

    return computed


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Inception at random weights that keep the size of activations, as a file that its user vouches for as the guide says."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """There is nothing to load."""

    torch.manual_seed(0)
    net = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), folder / "random.pth")
    subprocess.run("sha256sum random.pth > random.pth.sha256", shell=True, check=True, cwd=folder)
    return folder / "random.pth"


def cosine_gap(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """Return the mean token cosine of matched images, and the gap to mismatched ones."""
    sums = CosineSums()
    sums.add(student, teacher)
    return sums.cosine, sums.gap
