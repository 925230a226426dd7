"""The way of the data, as ratios of two sides measured in one run. Prints; asserts nothing about time."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
import torch

from repa_lab.align import REPA, Signals, Tokens
from repa_lab.align.settings import EncoderSettings
from repa_lab.data.cache import open_cache
from repa_lab.data.latents import PixelSpace
from repa_lab.data.sources import Digits, split
from repa_lab.encoders import targets
from repa_lab.encoders.encoder import Encoder, load_encoder
from repa_lab.encoders.targets import packed, unpacked
from repa_lab.training.batches import Images, Steps
from repa_lab.training.diffusion import Flow
from repa_lab.training.model import Labels
from tests.benchmarks.ratios import ratios, show
from tests.data.conftest import image_folder, noise_image
from tests.training.conftest import make_run

pytestmark = pytest.mark.bench

CPU, BATCH, STEPS = torch.device("cpu"), 256, 4


def test_batches_with_features_against_a_bare_gather(tmp_path):
    """256 features of DINOv2-B (16x16x768 in float16, 384 KiB) of 1,797 images, gathered and copied once."""
    source = Digits()
    tokens = torch.randn(128, 16, 16, 768).half()
    cache = open_cache(tmp_path, {"kind": "bench"}, source, lambda pixels: tokens[: len(pixels)])
    (file,) = tmp_path.glob("*/values-*")
    bare_rows = np.memmap(file, np.float16, "r").reshape(len(source), -1)
    images = Images(source, split(len(source), 97), PixelSpace(source))
    config = make_run(**{"train.batch_size": BATCH}).config
    readers = [cache.__getitem__]
    steps = Steps(
        config, 0, images, partial(Flow().times, None), Labels(source.labels, 10, 10), (0, 1), readers, [lambda _: 1.0]
    )
    draw, pinned = np.random.default_rng(0), torch.zeros(BATCH, 16, 16, 768).half()  # memory that is used again

    def bare() -> None:
        for _ in range(STEPS):
            pinned.view(BATCH, -1).numpy()[:] = bare_rows[draw.integers(len(source), size=BATCH)]

    def lab() -> None:
        for batch in steps.load(range(STEPS), CPU, 0):
            pinned.copy_(batch.loaded[0])

    show("batches per second and core: lab / bare memory map", ratios(bare, lab, rounds=7), "; the aim is 0.7")


def test_share_of_the_encoder_in_filling_a_cold_cache(tmp_path, monkeypatch):
    """EfficientNet-Lite0 on 1,024 PNGs of 64x64 pixels: seconds in its forward pass over all but loading it."""
    (tmp_path / "images").mkdir()
    for number in range(1024):
        noise_image(number, (64, 64)).save(tmp_path / "images" / f"{number}.png")
    seconds = {"forward": 0.0, "load": 0.0}

    def timed(name, function):
        def call(*args, **options):
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - began

        return call

    monkeypatch.setattr(Encoder, "forward", timed("forward", Encoder.forward))
    monkeypatch.setattr(targets, "load_encoder", timed("load", targets.load_encoder))
    source, began = image_folder(tmp_path / "images", 64), time.perf_counter()
    encoder = EncoderSettings(name="efficientnet_lite0", image_size=64)
    targets.cached_targets(source, encoder, tmp_path / "cache", CPU)
    total = time.perf_counter() - began - seconds["load"]
    print(f"\nencoder's share of filling a cache: {seconds['forward'] / total:.3f} of {total:.2f} s; the aim is 0.9")


def massive(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens with four channels of twenty times the magnitude, as large vision transformers have them."""
    return torch.cat([20 * tokens[..., :4], tokens[..., 4:]], dim=-1)


def test_what_the_storage_of_features_changes():
    """Loss and gradient of REPA with features in each storage against float32."""
    digits = Digits()
    encoder = load_encoder("efficientnet_lite0", 64, 8)
    normal = torch.randn(256, 16, 768)
    cases = {
        "EfficientNet-Lite0, digits": encoder(digits.read(range(256))).values,
        "normal, D=768": normal,
        "four massive channels, D=768": massive(normal),
    }
    student = torch.randn(256, 16, 64)

    def loss(features: torch.Tensor, is_standardized: bool) -> tuple[float, torch.Tensor]:
        if is_standardized:
            features = (features - features.mean((0, 1))) / features.std((0, 1)).clamp_min(1e-6)
        torch.manual_seed(1)
        regularizer, tokens = REPA(64, features.shape[-1], weight=1.0), student.clone().requires_grad_()
        value = regularizer(Signals(taps=(Tokens(tokens, (4, 4)),), encoders=(Tokens(features, (4, 4)),))).value
        value.backward()
        return value.item(), torch.cat([tokens.grad.flatten(), *(p.grad.flatten() for p in regularizer.parameters())])

    print()
    for name, features in cases.items():
        for is_standardized in (False, True):
            exact_loss, exact = loss(features, is_standardized)
            for storage in ("fp16", "fp8", "int8"):
                stored = packed(features, storage)
                found_loss, found = loss(unpacked(stored, storage), is_standardized)
                cosine = torch.cosine_similarity(exact.double(), found.double(), dim=0).item()
                print(
                    f"{name}{', standardised' * is_standardized}, {storage}: loss {found_loss - exact_loss:+.1e}, "
                    f"cosine of gradients {cosine:.6f}, {stored.nbytes / features.numel():.2f} bytes for a value"
                )
