"""What `plan` refuses, and where it says it is wrong. Every message is what a user reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from repa_lab.runs import RunsRoot
from repa_lab.spec import SpecError, load_spec
from repa_lab.sweep.plan import make_plan

SOUND = """\
name: sound
model: {family: sit, size: nano/2}
regularizer: {type: repa, encoder: {name: efficientnet_lite0, image_size: 64}}
data: {source: digits}
train: {steps: 10}
evaluate: {extractor: {name: efficientnet_lite0}}
"""

CASES = [
    (
        ("family: sit", "family: sitt"),
        "2:9: model.family: unknown family 'sitt'; allowed: sit, unet, sd15, sdxl, kolors, flux, flux2, sd3, chroma, sana, "
        "pixart, hidream, auraflow, lumina2, qwen_image, z_image, dit, hunyuan_dit, cogview4, kandinsky5; did you mean 'sit'?",
    ),
    (("size: nano/2", "size: nano/3"), "2:22: model.size: unknown size of sit 'nano/3'; allowed: nano/2, nano/4, nano/8, S/2"),
    ((", size: nano/2", ""), "2:1: model.size: sit needs a size: unknown size of sit ''; allowed: nano/2"),
    (("type: repa", "type: urepa"), "3:15: regularizer.type: sit is a transformer: use repa, not urepa"),
    (
        ("type: repa,", "type: repa, block_index: 4,"),
        "3:27: regularizer.block_index: sit has 4 blocks: block_index must be 0 to 3, got 4",
    ),
    (
        ("image_size: 64", "image_size: 16"),
        "3:63: regularizer.encoder.image_size: efficientnet_lite0 gives one token at 16 px; patch tokens are required: "
        "use 32 px or more",
    ),
    (
        ("image_size: 64", "image_size: 70"),
        "3:63: regularizer.encoder.image_size: efficientnet_lite0 has patches of 16: 70 is no multiple; allowed: 64, 80, ...",
    ),
    (
        (", image_size: 64", ""),
        "3:27: regularizer.encoder.image_size: the papers' rule has no size for 8 px images; set image_size to a "
        "multiple of 16",
    ),
    (("image_size: 64", "image_size: 64, weights: nowhere.pth"), "3:79: regularizer.encoder.weights: no file 'nowhere.pth'"),
    (
        ("image_size: 64", "image_size: 64, pixels: vae"),
        "3:79: regularizer.encoder.pixels: vae decodes latents, and data.vae names no VAE; use image, or set data.vae",
    ),
    (
        ("{name: efficientnet_lite0, image_size: 64}", "[{name: efficientnet_lite0, image_size: 64}, {name: mocov3_vitb16}]"),
        "3:81: regularizer.encoder.1.weights: the weights of 'mocov3_vitb16' are on no model hub; give weights: FILE",
    ),
    (("{source: digits}", "{source: imagefolder, path: nowhere}"), "4:29: data.path: no folder 'nowhere'"),
    (("nano/2", "nano/8, pretrained: x"), "2:36: model.pretrained: sit is trained from scratch: leave pretrained out"),
    (
        ("steps: 10}", "steps: 10}\ncompare: {metric: fid}"),
        "6:11: compare.metric: 'fid' is not measured by this spec; measured: frechet:efficientnet_lite0@10k/ode50",
    ),
    (
        ("steps: 10}", "steps: 10}\nsearch: {space: {regularizer.wait: {log: [1, 2]}}}"),
        "6:18: search.space.regularizer.wait: unknown field 'wait'; allowed: block_index, encoder, loss, manifold, "
        "manifold_weight, projector, resample, schedule, spatial_align, spatial_norm, temperature, type, weight; did you mean 'weight'?",
    ),
    (("name: sound", "name: cache"), "1:1: name: 'cache' is a folder of the runs root; choose another name"),
]


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_each_mistake_is_one_line_with_its_place(tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    file = Path("spec.yaml")
    assert change[0] in SOUND
    file.write_text(SOUND.replace(*change))
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec(file), RunsRoot(Path("runs")))
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith(f"spec.yaml:{expected}")], lines
    assert not Path("runs").exists()


def test_all_problems_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SOUND.replace("repa,", "repa, block_index: 7,").replace("64", "16").replace("sound", "by-id"))
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))
    assert [problem.path for problem in caught.value.problems] == [
        "name",
        "regularizer.block_index",
        "regularizer.encoder.image_size",
    ]


def test_planning_loads_no_torch():
    code = "import sys, repa_lab; repa_lab.plan('experiments/quickstart.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
