from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from repa_lab.encoders.registry import ENCODERS, default_image_size, grid_problem

NAMES = ["dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14"]


def test_the_guides_names_are_there():
    assert set(ENCODERS) == {"efficientnet_lite0", *NAMES, *(f"{name}_reg" for name in NAMES)}


@pytest.mark.parametrize("name", ENCODERS)
def test_facts_are_those_of_timms_model(name):
    facts = ENCODERS[name]
    with torch.device("meta"):
        model = timm.create_model(facts.timm_name, num_classes=0, **facts.options)
    fitting = [stage for stage in model.feature_info if stage["reduction"] <= 16]
    assert (fitting[-1]["reduction"], fitting[-1]["num_chs"]) == (facts.stride, facts.dim)
    registers = getattr(model, "num_reg_tokens", 0)
    assert registers == (4 if name.endswith("_reg") else 0)


SIZES = [(14, 256, 224), (14, 512, 448), (16, 256, 256), (16, 64, 64), (14, 15, 0)]


@pytest.mark.parametrize("stride, resolution, size", SIZES)
def test_the_papers_input_size(stride, resolution, size):
    assert default_image_size(stride, resolution) == size


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_it_gives_the_token_count_of_a_patch_2_transformer_over_latents(resolution):
    assert default_image_size(14, resolution) // 14 == resolution // 8 // 2


@pytest.mark.parametrize(
    "name, size, resolution, problem",
    [
        ("dinov2_vits14", None, 256, None),
        ("dinov2_vits14", 518, 1024, None),
        ("dinov2_vits14", 28, 8, None),
        ("dinov2_vits14", 224 + 1, 256, "dinov2_vits14 has patches of 14: 225 is no multiple; allowed: 224, 238, ..."),
        ("dinov2_vits14", 13, 256, "dinov2_vits14 has patches of 14: 13 is no multiple; allowed: 14, 14, ..."),
        ("dinov2_vitg14", 14, 256, "dinov2_vitg14 gives one token at 14 px; patch tokens are required: use 28 px or more"),
        ("dinov2_vits14", None, 31, "dinov2_vits14 gives one token at 14 px; patch tokens are required: use 28 px or more"),
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


def test_importing_it_costs_no_torch():
    code = "import sys, repa_lab.encoders.registry; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
