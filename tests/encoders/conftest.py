from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from repa_lab.data.sources import Digits
from repa_lab.encoders.encoder import Encoder, load_encoder


class Code:
    """Unpickling it creates a file: what a hostile file of weights could do."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._victim),)


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="session")
def lite0() -> Encoder:
    return load_encoder("efficientnet_lite0", 32, 8)


@pytest.fixture
def hostile(tmp_path):
    """A file of weights with code in it, and the folder that running the code would make."""
    torch.save({"conv.weight": Code(tmp_path / "victim")}, tmp_path / "hostile.pth")
    return tmp_path / "hostile.pth", tmp_path / "victim"


def dinov2(variant: str) -> nn.Module:
    """DINOv2 ViT-S at random weights; its position table too, which timm leaves so small that resampling would not show."""
    torch.manual_seed(0)
    model = timm.create_model(f"vit_small_patch14_{variant}", num_classes=0, dynamic_img_size=True).eval()
    nn.init.normal_(model.pos_embed)
    return model


@pytest.fixture(scope="session")
def vits14(tmp_path_factory):
    """The model, and its weights as safetensors."""
    model, path = dinov2("dinov2"), tmp_path_factory.mktemp("vits14") / "weights.safetensors"
    save_file(model.state_dict(), path)
    return model, path


@pytest.fixture(scope="session")
def vits14_reg(tmp_path_factory):
    """The model with registers, and its weights as a .pth."""
    model, path = dinov2("reg4_dinov2"), tmp_path_factory.mktemp("vits14_reg") / "weights.pth"
    torch.save(model.state_dict(), path)
    return model, path
