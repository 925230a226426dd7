from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from repa_lab.encoders.encoder import feature_stage
from repa_lab.encoders.registry import ENCODERS, grid_problem, input_size, token_identity, weights_problem
from repa_lab.timm_models import skeleton

DINOV2 = ["dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14"]
DINOV3 = ["s16", "s16plus", "b16", "l16", "h16plus", "7b16"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# Family: statistics in the publisher's code, tokens that are no patches (CLS, and registers where there are some).
FAMILIES = {
    "efficientnet": (HALF, 0),
    "dinov2": (IMAGENET, 1),
    "dinov3": (IMAGENET, 5),
    "dino": (IMAGENET, 1),
    "mae": (IMAGENET, 1),
    "mocov3": (IMAGENET, 1),
    "clip": (CLIP, 1),
    "siglip2": (HALF, 0),
    "ijepa": (IMAGENET, 0),
}


def test_the_guides_names_are_there():
    assert {"efficientnet_lite0", *DINOV2, *(f"{name}_reg" for name in DINOV2)} <= set(ENCODERS)


def test_every_family_is_there_in_its_sizes():
    named = {family: {name for name in ENCODERS if name.split("_")[0] == family} for family in FAMILIES}
    assert set().union(*named.values()) == set(ENCODERS)
    assert named["dinov3"] == {f"dinov3_vit{size}" for size in DINOV3}
    assert named["dino"] == {"dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"}
    assert named["mae"] == {"mae_vitb16", "mae_vitl16", "mae_vith14"}
    assert {"mocov3_vits16", "mocov3_vitb16"} < named["mocov3"]
    assert {"clip_vitb16", "clip_vitl14"} < named["clip"]
    assert {"siglip2_vitb16", "siglip2_vitl16", "siglip2_so400m14"} < named["siglip2"]
    assert named["ijepa"] == {"ijepa_vith14"}


@pytest.mark.parametrize("name", ENCODERS)
def test_facts_are_those_of_timms_model(name):
    facts = ENCODERS[name]
    model = skeleton(name, facts)
    stage, stride = feature_stage(name, model)
    assert (stride, model.feature_info[stage]["num_chs"]) == (facts.stride, facts.dim)
    if not name.startswith("efficientnet"):
        assert stage == len(model.blocks) - 1
        assert model.patch_embed.patch_size == (facts.stride, facts.stride)
    statistics, prefix = FAMILIES[name.split("_")[0]]
    prefix += 4 if name.endswith("_reg") else 0
    assert getattr(model, "num_prefix_tokens", 0) == prefix
    assert (getattr(model, "num_reg_tokens", None) or 0) == (4 if name.endswith("_reg") else 0)
    config = timm.get_pretrained_cfg(facts.timm_name)
    assert (config.mean, config.std) == statistics
    assert facts.weights != "hub" or config.has_weights


def test_moco_v3_has_twelve_heads_in_its_small_vit_too():
    heads = {size: skeleton("it", ENCODERS[f"mocov3_vit{size}16"]).blocks[0].attn.num_heads for size in "sbl"}
    assert heads == {"s": 12, "b": 12, "l": 16}
    assert skeleton("it", ENCODERS["dino_vits16"]).blocks[0].attn.num_heads == 6


def test_clip_computes_the_gelu_that_it_was_trained_with():
    for name in ("clip_vitb16", "clip_vitl14", "clip_vitl14_336"):
        act = skeleton(name, ENCODERS[name]).blocks[0].mlp.act
        x = torch.linspace(-3, 3, 7)
        torch.testing.assert_close(act(x), x * torch.sigmoid(1.702 * x))


def test_tokens_are_taken_before_the_final_norm_where_repas_code_takes_them_so():
    before = {
        name for name in (*ENCODERS, *(f"tiny-{name}" for name in ENCODERS)) if token_identity(name) == {"norm": False}
    }
    named = {"mae_vitb16", "mae_vitl16", "mae_vith14", "clip_vitb16", "clip_vitl14", "clip_vitl14_336"}
    assert before == named | {f"tiny-{name}" for name in named}
    others = {*ENCODERS, "vit_large_patch16_224.mae", "resnet50"} - named
    assert all(token_identity(name) == {} for name in others)


SIZES = [(14, 256, 224), (14, 512, 448), (16, 256, 256), (16, 64, 64), (8, 256, 128), (14, 15, 0)]


@pytest.mark.parametrize("stride, resolution, size", SIZES)
def test_the_papers_input_size(stride, resolution, size):
    assert input_size(stride, (resolution, resolution)) == (size, size)


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_it_gives_the_token_count_of_a_patch_2_transformer_over_latents(resolution):
    height, width = input_size(14, (resolution, resolution // 2))
    assert (height // 14, width // 14) == (resolution // 8 // 2, resolution // 2 // 8 // 2)


@pytest.mark.parametrize(
    "stride, shape, image_size, size",
    [
        (14, (768, 1024), None, (672, 896)),  # 48 and 64 cells of 16 pixels
        (14, (300, 300), 518, (518, 518)),
        (14, (300, 300), 225, (225, 225)),  # what is no grid stays visible, to be refused
        (14, (512, 768), 518, (420, 630)),  # 518 * sqrt(2/3) = 422.9, 518 * sqrt(3/2) = 634.4
        (16, (512, 768), 256, (208, 320)),  # 209.0, 313.5
        (16, (4, 1), 32, (64, 16)),
        (14, (1, 1000), 28, (14, 882)),  # 0.9 and 885.4: one patch a side at least
    ],
)
def test_an_image_keeps_its_aspect(stride, shape, image_size, size):
    assert input_size(stride, shape, image_size) == size
    assert input_size(stride, shape[::-1], image_size) == size[::-1]


@pytest.mark.parametrize("stride, image_size", [(14, 518), (16, 256), (14, 224)])
def test_any_aspect_costs_about_as_many_tokens_and_is_hardly_squeezed(stride, image_size):
    tokens = (image_size // stride) ** 2
    for height, width in [(512, 768), (768, 512), (1024, 576), (1000, 999), (640, 480), (1, 2)]:
        h, w = (side // stride for side in input_size(stride, (height, width), image_size))
        assert abs(h * w / tokens - 1) < 0.08
        assert abs(h / w / (height / width) - 1) < 0.08


@pytest.mark.parametrize(
    "name, size, resolution, problem",
    [
        ("dinov2_vits14", None, 256, None),
        ("dinov2_vits14", 518, 1024, None),
        ("dinov2_vits14", 28, 8, None),
        (
            "dinov2_vits14",
            224 + 1,
            256,
            "dinov2_vits14 has patches of 14: 225 is not a multiple; allowed: 224, 238, ...",
        ),
        ("dinov2_vits14", 13, 256, "dinov2_vits14 has patches of 14: 13 is not a multiple; allowed: 14, 14, ..."),
        (
            "dinov2_vitg14",
            14,
            256,
            "dinov2_vitg14 gives one token at 14 px; patch tokens are required: use 28 px or more",
        ),
        (
            "dinov2_vits14",
            None,
            31,
            "dinov2_vits14 gives one token at 14 px; patch tokens are required: use 28 px or more",
        ),
        (
            "efficientnet_lite0",
            None,
            8,
            "the papers' rule has no size for 8 px images; set image_size to a multiple of 16",
        ),
        ("efficientnet_lite0", 64, 8, None),
        ("resnet50", 13, 8, None),
    ],
)
def test_a_size_that_gives_no_grid_is_named(name, size, resolution, problem):
    assert grid_problem(name, size, resolution) == problem


def test_what_is_on_no_hub_needs_a_file():
    match = "the weights of 'mocov3_vitb16' are on no model hub; give weights: FILE, the publisher's .pth.tar"
    assert weights_problem("mocov3_vitb16", None) == match
    assert weights_problem("mocov3_vitb16", "vit-b-300ep.pth.tar") is None
    assert [weights_problem(name, None) for name in ("dinov2_vits14", "efficientnet_lite0", "resnet50")] == [None] * 3


def test_importing_it_costs_no_torch():
    code = "import sys, repa_lab.encoders.registry; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
