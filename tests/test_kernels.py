"""Where a GPU may compute float32 products in TF32: in training alone."""

from __future__ import annotations

import pytest
import torch

from repa_lab.encoders.encoder import load_encoder
from repa_lab.kernels import kernels
from repa_lab.metrics.extractor import Extractor

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


def flags() -> tuple[bool, bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


def test_flags_hold_within_and_come_back():
    before = flags()
    with kernels(tf32=True, benchmark=True):
        assert flags() == (True, True, True)
        with kernels(tf32=False):
            assert flags() == (False, False, False)
        assert flags() == (True, True, True)
    assert flags() == before
    with pytest.raises(ValueError, match="inside"), kernels(tf32=True, benchmark=True):
        raise ValueError("inside")
    assert flags() == before


def test_features_of_encoders_and_extractors_never_use_it():
    encoder = load_encoder("efficientnet_lite0", image_size=32, resolution=32)
    extractor = Extractor("efficientnet_lite0", None, torch.device("cpu"), ("frechet",))
    seen = []
    for network in (encoder.model, extractor._net):
        next(network.children()).register_forward_hook(lambda *_: seen.append(flags()[:2]))
    with kernels(tf32=True):
        encoder(PIXELS)
        extractor.features(PIXELS)
    assert seen == [(False, False)] * 2
