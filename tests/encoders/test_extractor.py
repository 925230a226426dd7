from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from repa_lab.encoders.encoder import EncoderError, lite0_model
from repa_lab.encoders.extractor import EXTRACTORS, Extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("efficientnet_lite0", None, CPU)


def test_only_inceptions_features_have_inceptions_name():
    assert EXTRACTORS["inception"] == ("inception-v3-compat", "2048")
    assert "inception" not in EXTRACTORS["efficientnet_lite0"][0]


def test_features_are_lite0s_pooled_ones(extractor):
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features = extractor(pixels)
    assert (features.shape, features.dtype) == ((3, 1280), "float64")
    with torch.no_grad():
        expected = lite0_model()(pixels.float() / 255 * 2 - 1)
    torch.testing.assert_close(torch.from_numpy(features).float(), expected, rtol=1e-5, atol=1e-5)


def test_a_grey_image_is_one_of_three_equal_channels(extractor):
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert (extractor(grey) == extractor(grey.repeat(1, 3, 1, 1))).all()


@pytest.mark.parametrize("side", [8, 50, 200])
def test_images_are_resized_bicubically_with_antialiasing(extractor, side):
    pixels = torch.randint(0, 256, (1, 1, side, side), dtype=torch.uint8)
    image = Image.fromarray(pixels[0, 0].numpy().astype(np.float32))  # Pillow's bicubic, without rounding
    resized = torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BICUBIC))).clamp(0, 255)
    with torch.no_grad():
        expected = lite0_model()((resized / 127.5 - 1).expand(1, 3, 64, 64))
    found = torch.from_numpy(extractor(pixels)).float()
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_batches_do_not_matter(extractor):
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    whole = extractor(pixels)
    assert abs(extractor(pixels, batch_size=2) - whole).max() < 1e-4 * abs(whole).max()


def refused(match: str, name: str, weights: str | None) -> None:
    with pytest.raises(EncoderError, match=match) as caught:
        Extractor(name, weights, CPU)
    assert caught.value.field == "weights"


def test_missing_weights_are_named(tmp_path):
    refused(f"no file '{tmp_path}/x.pth'", "inception", str(tmp_path / "x.pth"))


def test_unreachable_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused("Inception's weights are not on this machine and cannot be fetched; give weights: FILE", "inception", None)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "x.pth")
    refused("x.pth' does not fit 'inception': Error", "inception", str(tmp_path / "x.pth"))


@pytest.mark.parametrize("content", [b"", b"\x80", b"hello world", b"PK\3\4aaaa"])
def test_damaged_weights_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    refused("x.pth' is no file of tensors", "inception", str(tmp_path / "x.pth"))


def test_code_in_a_file_of_weights_is_not_run(hostile):
    path, victim = hostile
    refused("hostile.pth' is no file of tensors", "inception", str(path))
    assert not victim.exists()


def test_weights_that_would_be_ignored_are_refused(tmp_path):
    (tmp_path / "x.pth").touch()
    refused("come with a package; leave weights out", "efficientnet_lite0", str(tmp_path / "x.pth"))
