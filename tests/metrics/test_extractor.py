from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from repa_lab.encoders.registry import facts_of
from repa_lab.metrics import frechet_distance, inception_score, kid, precision_recall, statistics
from repa_lab.metrics.extractor import Extractor, resample_positions, resize_like_pillow
from repa_lab.metrics.protocol import EXTRACTORS, METRICS, layers
from repa_lab.timm_models import EncoderError, TimmModel, lite0_model
from tests.rounding import LITE0, UNIT, rounding

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("efficientnet_lite0", None, CPU)


class TestFacts:
    def test_only_inceptions_features_have_inceptions_name(self):
        assert [name for name, facts in EXTRACTORS.items() if "inception" in facts.registered] == ["inception"]
        assert EXTRACTORS["inception"].layers["frechet"] == "2048"

    def test_torch_fidelity_knows_every_one_of_them_by_a_name_of_its_own(self):
        assert all(facts.registered in FEATURE_EXTRACTORS_REGISTRY for facts in EXTRACTORS.values())
        assert len({facts.registered for facts in EXTRACTORS.values()}) == len(EXTRACTORS)

    def test_a_metric_has_a_layer_where_it_has_a_name(self):
        for name, facts in EXTRACTORS.items():
            for metric, kinds in ((name, METRICS[name].yields) for name in METRICS):
                has_name = any(inception if name == "inception" else other for inception, other in kinds)
                assert (metric in facts.layers) == has_name

    def test_a_layer_is_asked_for_once(self):
        assert layers("inception", METRICS) == ("2048", "spatial", "logits_unbiased")
        assert layers("inception", ["kid", "frechet"]) == ("2048",)
        assert layers("dinov2_vitl14", METRICS) == ("cls",)

    def test_the_digest_of_inceptions_weights_begins_as_their_publisher_names_the_file(self):
        assert URL_INCEPTION_V3.endswith(f"-{EXTRACTORS['inception'].sha256[:8]}.pth")

    def test_dinov2s_are_the_encoders(self):
        for name, facts in EXTRACTORS.items():
            encoder = facts_of(name)
            assert facts.model == (
                encoder and TimmModel(encoder.timm_name, options=encoder.options, weights=encoder.weights)
            )
            assert (len(facts.sha256) == 64) == (not name.startswith(("tiny-", "efficientnet")))


def pooled(extractor: Extractor, pixels: torch.Tensor, **options: int) -> np.ndarray:
    return extractor.features(pixels, **options)["1280"].numpy()


def test_features_are_lite0s_pooled_ones(extractor):
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features = pooled(extractor, pixels)
    assert (features.shape, features.dtype) == ((3, 1280), "float32")
    with torch.no_grad():
        expected = lite0_model()(pixels.float() / 255 * 2 - 1)
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=0, atol=rounding(expected, LITE0))


def test_a_grey_image_is_one_of_three_equal_channels(extractor):
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert (pooled(extractor, grey) == pooled(extractor, grey.repeat(1, 3, 1, 1))).all()


@pytest.mark.parametrize("side", [8, 50, 200])
def test_images_are_resized_bicubically_with_antialiasing(extractor, side):
    pixels = torch.randint(0, 256, (1, 1, side, side), dtype=torch.uint8)
    image = Image.fromarray(pixels[0, 0].numpy().astype(np.float32))  # Pillow's bicubic, without rounding
    resized = torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BICUBIC))).clamp(0, 255)
    with torch.no_grad():
        expected = lite0_model()((resized / 127.5 - 1).expand(1, 3, 64, 64))
    found = torch.from_numpy(pooled(extractor, pixels))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_batches_do_not_matter(extractor):
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    whole = pooled(extractor, pixels)
    assert abs(pooled(extractor, pixels, batch_size=2) - whole).max() <= rounding(whole, LITE0)


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
    refused(
        "Inception's weights are not on this machine and cannot be downloaded; give weights: FILE", "inception", None
    )


def vouch(path) -> None:
    path.with_name(f"{path.name}.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "x.pth")
    vouch(tmp_path / "x.pth")
    refused("x.pth' does not fit 'inception': Error", "inception", str(tmp_path / "x.pth"))


@pytest.mark.parametrize("content", [b"", b"\x80", b"hello world", b"PK\3\4aaaa"])
def test_damaged_weights_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    refused(
        "x.pth' is not the published file of 'inception'.*; get that file, or vouch",
        "inception",
        str(tmp_path / "x.pth"),
    )
    vouch(tmp_path / "x.pth")
    refused("x.pth' is not a file of tensors, or is damaged; download it again", "inception", str(tmp_path / "x.pth"))


def test_code_in_a_file_of_weights_is_not_run(hostile):
    path, victim = hostile
    refused("hostile.pth' is not the published file of 'inception'", "inception", str(path))
    assert not victim.exists()
    vouch(path)
    refused("hostile.pth' is not a file of tensors", "inception", str(path))
    assert not victim.exists()


def test_weights_that_would_be_ignored_are_refused(tmp_path):
    (tmp_path / "x.pth").touch()
    refused(
        "the weights of efficientnet_lite0 are not loaded from a file; leave weights out",
        "efficientnet_lite0",
        str(tmp_path / "x.pth"),
    )
    refused("are not loaded from a file; leave weights out", "tiny-dinov2_vits14", str(tmp_path / "x.pth"))


def test_another_file_than_the_published_one_is_refused(tmp_path, vits14):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    found = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    match = f"x.pth' is not the published file of 'inception': its SHA-256 begins with {found[:8]}, not 6726825d; get that file, or vouch"
    refused(match, "inception", str(tmp_path / "x.pth"))
    refused(
        "is not the published file of 'dinov2_vits14': .*, not b938bf1b; .*: sha256sum FILE > FILE.sha256",
        "dinov2_vits14",
        str(vits14[1]),
    )


def test_a_digest_of_another_file_vouches_for_nothing(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    vouch(tmp_path / "x.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    refused("is not the published file", "inception", str(tmp_path / "x.pth"))


def test_a_damaged_download_is_no_inception(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, cached)
    refused("6726825d.pth' is not the published file of 'inception'", "inception", None)


def test_pixels_that_are_not_bytes_are_refused(extractor):
    with pytest.raises(TypeError, match="must be uint8, 0 to 255"):
        extractor.features(torch.rand(1, 3, 8, 8))


def test_an_extractor_without_a_use_is_refused():
    with pytest.raises(ValueError, match="efficientnet_lite0 has no features for sfid, inception_score"):
        Extractor("efficientnet_lite0", None, CPU, ("sfid", "inception_score"))


def noise(count: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


class Pixels(Dataset):
    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def by_torch_fidelity(generated: torch.Tensor, real: torch.Tensor, registered: str, **options) -> dict[str, float]:
    settings = {
        "cuda": False,
        "cache": False,
        "verbose": False,
        "save_cpu_ram": True,
        "fid": True,
        "kid": True,
        "prc": True,
    }
    sides = {"input1": Pixels(generated), "input2": Pixels(real)}
    return torch_fidelity.calculate_metrics(**sides, feature_extractor=registered, **{**settings, **options})


def test_lite0s_metrics_are_torch_fidelitys_of_the_same_images(digits):
    pixels = (
        digits.read(range(110)).expand(-1, 3, -1, -1).repeat_interleave(4, -1).repeat_interleave(4, -2).contiguous()
    )
    generated, real = pixels[:50] // 2 + 30, pixels[50:]
    extractor = Extractor("efficientnet_lite0", None, CPU, ("frechet", "kid", "precision_recall"))
    theirs = by_torch_fidelity(generated, real, EXTRACTORS["efficientnet_lite0"].registered, kid_subset_size=50)
    x, y = (extractor.features(side)["1280"] for side in (generated, real))
    first, second = statistics(x), statistics(y)
    distance, shares = kid(x, y), precision_recall(x, y)
    found = {
        "frechet_inception_distance": frechet_distance(first.mu, first.sigma, second.mu, second.sigma),
        "kernel_inception_distance_mean": distance.value,
        "kernel_inception_distance_std": distance.std,
        "precision": shares.precision,
        "recall": shares.recall,
    }
    assert found == {name: pytest.approx(theirs[name], rel=1e-6) for name in found}
    assert 0 < shares.precision + shares.recall < 2


EVERYTHING = METRICS.names


class TestInception:
    @pytest.fixture(scope="class")
    def net(self, inception) -> Extractor:
        return Extractor("inception", str(inception), CPU, EVERYTHING)

    def test_its_metrics_are_torch_fidelitys_of_the_same_images(self, net, inception):
        generated, real = noise(10, 16), noise(4, 24, 1) // 3
        options = {"isc": True, "fid": False, "kid_subset_size": 4, "feature_extractor_weights_path": str(inception)}
        theirs = by_torch_fidelity(generated, real, "inception-v3-compat", **options)
        x, y = net.features(generated), net.features(real)
        distance, score = kid(x["2048"], y["2048"]), inception_score(x["logits_unbiased"])
        shares = precision_recall(x["2048"], y["2048"])
        found = {"inception_score_mean": score.value, "inception_score_std": score.std, "precision": shares.precision}
        found |= {
            "recall": shares.recall,
            "kernel_inception_distance_mean": distance.value,
            "kernel_inception_distance_std": distance.std,
        }
        assert found == {name: pytest.approx(theirs[name], rel=1e-6) for name in found}
        assert distance.value > 0

    def test_one_pass_serves_every_metric(self, net):
        seen = []
        hooks = [net._net.Conv2d_1a_3x3.register_forward_hook(lambda *args: seen.append(len(args[2])))]
        found = net.features(noise(5, 8), batch_size=2)
        hooks[0].remove()
        assert seen == [2, 2, 1]
        shapes = {layer: values.shape for layer, values in found.items()}
        assert shapes == {"2048": (5, 2048), "spatial": (5, 2023), "logits_unbiased": (5, 1008)}
        assert {values.dtype for values in found.values()} == {torch.float32}

    def test_spatial_features_are_the_first_channels_of_a_1x1_branch_place_by_place(self, net):
        """By the network's own modules up to the sixth block's branch that TensorFlow calls ``mixed_6/conv``."""
        pixels, inner = noise(2, 40), net._net
        before = (
            "Conv2d_1a_3x3",
            "Conv2d_2a_3x3",
            "Conv2d_2b_3x3",
            "MaxPool_1",
            "Conv2d_3b_1x1",
            "Conv2d_4a_3x3",
            "MaxPool_2",
        )
        blocks = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c")
        with torch.no_grad():
            x = (
                interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False) - 128
            ) / 128
            for name in (*before, *blocks):
                x = getattr(inner, name)(x)
            branch = inner.Mixed_6d.branch1x1(x)
        found = net.features(pixels)["spatial"].reshape(2, 17, 17, 7)
        for channel in range(7):
            np.testing.assert_allclose(found[..., channel], branch[:, channel].numpy(), rtol=1e-5, atol=1e-6)
        assert (found >= 0).all() and found.std() > 0

    def test_only_what_is_asked_for_is_computed(self, inception):
        alone = Extractor("inception", str(inception), CPU, ("sfid",))
        seen = []
        for name in ("Mixed_6e", "Mixed_7a", "fc"):
            getattr(alone._net, name).register_forward_hook(lambda *args, name=name: seen.append(name))
        found = alone.features(noise(1, 8))
        assert list(found) == ["spatial"]
        assert set(seen) <= {"Mixed_6e"}
        pooled = Extractor("inception", str(inception), CPU)
        assert isinstance(pooled._net, FeatureExtractorInceptionV3)
        assert list(pooled.features(noise(1, 8))) == ["2048"]

    def test_autocast_around_it_changes_nothing(self, net):
        pixels = noise(1, 8)
        with torch.autocast("cpu", torch.bfloat16):
            cast = net.features(pixels)
        assert all(np.array_equal(values, cast[layer]) for layer, values in net.features(pixels).items())

    def test_convolutions_are_not_cut_to_tensorfloat32(self, net):
        seen = []
        hook = net._net.Mixed_6d.register_forward_hook(lambda *args: seen.append(torch.backends.cudnn.allow_tf32))
        before = torch.backends.cudnn.allow_tf32
        net.features(noise(1, 8))
        hook.remove()
        assert (seen, torch.backends.cudnn.allow_tf32) == ([False], before)

    def test_its_identity_is_the_files_content(self, net, inception, tmp_path):
        digest = hashlib.sha256(inception.read_bytes()).hexdigest()
        assert net.identity == {"extractor": "inception", "weights": digest, "preprocessing": "tf1-bilinear-299"}
        for name in (inception, inception.with_name("random.pth.sha256")):
            shutil.copy(name, tmp_path / name.name)
        assert Extractor("inception", str(tmp_path / "random.pth"), CPU).identity == net.identity


def bicubic_1d(values: np.ndarray, count: int, step: float) -> np.ndarray:
    """Keys' cubic (a = -0.75) along the first axis, at ``(i + 0.5) step - 0.5``, edges repeated; float64."""

    def weight(distance: float) -> float:
        a, x = -0.75, abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = []
    for i in range(count):
        at = (i + 0.5) * step - 0.5
        near = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
        out.append(sum(weight(at - j) * values[min(max(j, 0), len(values) - 1)] for j in near))
    return np.stack(out)


class TestDINOv2:
    @pytest.fixture(scope="class")
    def vouched(self, vits14, tmp_path_factory):
        """The model and its file. Its layers count: as timm makes them, they add a hundred-thousandth to what passes by."""
        state = {
            name: torch.ones_like(value) if "gamma" in name else value for name, value in vits14[0].state_dict().items()
        }
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
        model.load_state_dict(state)
        path = tmp_path_factory.mktemp("vouched") / "vits14.safetensors"
        save_file(state, path)
        vouch(path)
        return model, path

    @pytest.fixture(scope="class")
    def net(self, vouched) -> Extractor:
        return Extractor("dinov2_vits14", str(vouched[1]), CPU, EVERYTHING)

    def test_positions_are_resampled_by_dinov2s_rule(self):
        table = torch.randn(1, 1 + 37 * 37, 5)
        found = resample_positions(table, 16)
        places = table[0, 1:].double().numpy().reshape(37, 37, 5)

        def resampled(step: float) -> np.ndarray:
            rows = bicubic_1d(places, 16, step)
            return bicubic_1d(rows.swapaxes(0, 1), 16, step).swapaxes(0, 1)

        expected = resampled(37 / 16.1)
        # The step, its product and a difference are rounded to float32: a place is off by three units of itself.
        moved = np.abs(resampled(37 / 16.1 * (1 + 3 * UNIT)) - expected).max()
        error = moved + rounding(expected, (2, 4))
        np.testing.assert_allclose(found[0, 1:].numpy().reshape(16, 16, 5), expected, rtol=0, atol=error)
        assert torch.equal(found[:, 0], table[:, 0])

    @pytest.mark.parametrize("side", [8, 64, 224, 256, 500])
    def test_images_are_resized_as_pillow_does_it(self, side):
        pixels = noise(2, side)
        images = [
            Image.fromarray(one.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for one in pixels
        ]
        expected = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        off = (resize_like_pillow(pixels, 224) - expected).abs()
        assert off.max() <= 2
        assert (off > 0).float().mean() < 0.01

    def test_features_are_the_cls_token_after_the_norm(self, net, vouched):
        model, pixels = vouched[0], noise(3, 100)
        state = model.state_dict()
        plain = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
        plain.load_state_dict({**state, "pos_embed": resample_positions(state["pos_embed"], 16)})
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        images = (resize_like_pillow(pixels, 224) / 255 - mean) / std
        with torch.no_grad():
            expected, timms = plain.forward_features(images)[:, 0].numpy(), model(images).numpy()
        found = net.features(pixels)
        assert {layer: values.shape for layer, values in found.items()} == {"cls": (3, 384)}
        np.testing.assert_allclose(found["cls"], expected, rtol=1e-3, atol=1e-4)
        assert np.abs(expected[0] - expected[1]).max() > 1e-2
        assert np.abs(expected - timms).max() > 1e-2  # timm's own resampling of the positions is another

    def test_images_of_any_aspect_are_seen_whole(self, net):
        wide = F.pad(noise(1, 32), (0, 32))
        squashed = resize_like_pillow(wide, 224).byte()
        assert squashed.shape == (1, 3, 224, 224)
        assert np.array_equal(net.features(wide)["cls"], net.features(squashed)["cls"])

    def test_its_identity_names_the_file(self, net, vouched):
        digest = hashlib.sha256(vouched[1].read_bytes()).hexdigest()
        assert net.identity == {
            "extractor": "dinov2_vits14",
            "weights": digest,
            "preprocessing": "bicubic-antialias-224-imagenet",
        }

    def test_registers_are_another_network(self, vits14_reg, tmp_path):
        shutil.copy(vits14_reg[1], tmp_path / "reg.pth")
        vouch(tmp_path / "reg.pth")
        refused("does not fit 'dinov2_vits14'", "dinov2_vits14", str(tmp_path / "reg.pth"))

    def test_code_in_its_file_is_not_run(self, hostile):
        path, victim = hostile
        vouch(path)
        refused("does not fit 'dinov2_vits14'", "dinov2_vits14", str(path))
        assert not victim.exists()

    @pytest.mark.parametrize("name", [name for name in EXTRACTORS if name.startswith("tiny-")])
    def test_a_tiny_one_needs_nothing_and_is_the_same_everywhere(self, name):
        first, second = (Extractor(name, None, CPU, EVERYTHING) for _ in range(2))
        pixels = noise(2, 8)
        assert first.features(pixels)["cls"].shape == (2, 48)
        assert np.array_equal(first.features(pixels)["cls"], second.features(pixels)["cls"])
        assert first.identity["weights"].startswith("none:vit_")
