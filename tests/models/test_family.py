from __future__ import annotations

import pytest
import torch

from repa_lab.models.families import FAMILIES, catalogue
from repa_lab.models.family import SIT_DOWN_SHAPES, SIT_SHAPES, UNET_SHAPES, shape_of
from repa_lab.models.flops import forward_of
from repa_lab.models.scratch import CLASSES, Input, build
from repa_lab.models.sit import SiTDown
from repa_lab.registry import UnknownComponentError

FROM_SCRATCH = [(family, size) for family in FAMILIES.values() if family.from_scratch for size in family.shapes]


@pytest.mark.parametrize(
    "family, size", FROM_SCRATCH, ids=lambda value: value if isinstance(value, str) else value.name
)
def test_facts_are_those_of_the_denoiser_that_is_built(family, size):
    shape, side = family.shapes[size], (32, 64)
    with torch.device("meta"):
        denoiser = build(family.name, size, Input(4, side, 10))
        tap = denoiser.tap(shape.block)
        denoiser(torch.empty(1, 4, *side), torch.empty(1), torch.zeros(1, dtype=torch.long))
    tokens = tap.take()
    assert tokens.dim == shape.width
    assert tokens.grid == (side[0] // shape.stride, side[1] // shape.stride)
    parameters = forward_of(family, size, tokens.grid[0] * tokens.grid[1], 4, 10).parameters
    assert parameters == sum(parameter.numel() for parameter in denoiser.parameters())
    if family.kind == "transformer":
        assert len(denoiser.blocks) == shape.depth
        assert all(block.attn.num_heads == shape.heads for block in denoiser.blocks)
        assert shape.width % shape.heads == 0


def test_every_family_from_scratch_can_be_built_and_no_other():
    assert set(CLASSES) == {family.name for family in FAMILIES.values() if family.from_scratch}


def test_every_family_of_the_guide_and_those_beside_it_can_be_trained():
    named = "flux flux2 sd3 chroma sana pixart hidream auraflow lumina2 sdxl sd15 kolors"
    beside = "qwen_image z_image dit hunyuan_dit cogview4 kandinsky5 longcat_image ernie_image krea2 sit sit_down unet"
    videos = "wan ltxvideo"
    assert set(FAMILIES) == {*named.split(), *beside.split(), *videos.split()}
    assert {name for name, family in FAMILIES.items() if family.is_video} == set(videos.split())
    assert all(family.from_scratch or (family.network and family.pipeline) for family in FAMILIES.values())


def test_the_papers_blocks():
    """Depth 4 for B and 8 for L and XL, counted from 1, are blocks 3 and 7 counted from 0."""
    assert {size: SIT_SHAPES[f"{size}/2"].block for size in ("B", "L", "XL")} == {"B": 3, "L": 7, "XL": 7}
    assert {(s.depth, s.width, s.heads) for s in SIT_SHAPES.values()} >= {(12, 768, 12), (24, 1024, 16), (28, 1152, 16)}


def test_u_repas_blocks():
    """U-REPA's Table 2: blocks per stage and widths. Its Table 4 is best at the 18th of XL's 36 blocks, counted from 1."""
    stages = {size: (shape.stages, shape.width, shape.depth, shape.block) for size, shape in SIT_DOWN_SHAPES.items()}
    assert stages["B/2"] == ((5, 5, 5), 768, 15, 7)
    assert stages["L/2"] == ((9, 14, 9), 1024, 32, 15)
    assert stages["XL/2"] == ((10, 16, 10), 1152, 36, 17)
    with pytest.raises(UnknownComponentError, match="unknown size of sit_down 'B/4'; allowed: nano/2, B/2, L/2, XL/2"):
        shape_of(FAMILIES["sit_down"], "B/4")


def test_a_blocks_stride_is_that_of_the_tokens_that_leave_it():
    shape = SIT_DOWN_SHAPES["nano/2"]
    denoiser = SiTDown.from_size("nano/2", in_channels=1, input_size=8)
    grids = [denoiser.grid_of(block) for block in range(shape.depth)]
    assert grids == [(8 // shape.stride_at(block),) * 2 for block in range(shape.depth)]
    assert set(grids) == {(2, 2), (4, 4)}
    assert shape.stride_at(None) == shape.stride == shape.stride_at(shape.block)
    assert [UNET_SHAPES["B"].stride_at(block) for block in (None, "mid")] == [8, 8]
    assert {SIT_SHAPES["B/2"].stride_at(block) for block in (None, 0, 11)} == {2}


def test_strides_of_pretrained_families_in_pixels():
    pixels = {name: f.latent_stride * f.shapes[""].stride for name, f in FAMILIES.items() if not f.from_scratch}
    assert {name: 1024 // stride for name, stride in pixels.items() if name in ("sdxl", "kolors", "sana")} == {
        "sdxl": 32,
        "kolors": 32,
        "sana": 32,
    }
    assert 512 // pixels["sd15"] == 8
    assert {pixels[name] for name in ("flux", "flux2", "sd3", "chroma", "pixart", "hidream", "lumina2")} == {16}


def test_the_regularizer_that_fits():
    assert {family.regularizer for family in FAMILIES.values() if family.kind == "unet"} == {"urepa"}
    both = [name for name, family in FAMILIES.items() if {"urepa", "repa"} <= {*family.regularizers}]
    assert both == ["sit_down"]
    assert FAMILIES["sit_down"].regularizer == "urepa"
    transformers = [FAMILIES[name] for name in FAMILIES.keys() - both if FAMILIES[name].kind == "transformer"]
    assert {family.regularizer for family in transformers} == {"repa"}
    assert not any("layersync" in family.regularizers for family in FAMILIES.values() if family.kind == "unet")
    assert all("dispersive" in family.regularizers for family in FAMILIES.values())
    for family in FAMILIES.values():
        for shape in family.shapes.values():
            assert shape.block == "mid" if family.kind == "unet" else 0 <= shape.block < shape.depth


def test_what_does_not_exist_is_named_with_what_does():
    with pytest.raises(
        UnknownComponentError, match=r"unknown family 'sdlx'; allowed: sit, unet, .*; did you mean 'sdxl'\?"
    ):
        FAMILIES["sdlx"]
    with pytest.raises(UnknownComponentError, match=r"unknown size of unet 'B/2'; allowed: nano, S, B$"):
        shape_of(FAMILIES["unet"], "B/2")
    with pytest.raises(UnknownComponentError, match="unknown size of sit ''"):
        shape_of(FAMILIES["sit"], None)
    assert shape_of(FAMILIES["flux"], None).depth == 57
    assert set(UNET_SHAPES) == {"nano", "S", "B"}


def test_the_catalogue_has_every_family_with_the_grid_and_the_suggestions_of_the_guide():
    rows = {entry.family: entry for entry in catalogue()}
    assert {name.split()[0] for name in rows} == set(FAMILIES)
    assert {size: rows[f"sit {size}/2"].parameters for size in ("B", "L", "XL")} == {
        "B": 130_500_112,
        "L": 458_086_416,
        "XL": 675_111_184,
    }
    assert {name: rows[name].grid for name in ("sdxl", "flux", "sd3")} == {
        "sdxl": (32, 32),
        "flux": (64, 64),
        "sd3": (64, 64),
    }
    assert (rows["sdxl"].block_index, rows["sdxl"].regularizer) == ("mid", "urepa")
    assert (rows["flux"].block_index, rows["flux"].blocks, rows["flux"].regularizer) == (8, 57, "repa")
    assert rows["sit XL/2"].grid == (16, 16)
