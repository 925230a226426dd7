"""What the README shows is what the code does."""

import re
from pathlib import Path

import pytest
import torch

from repa_lab.align import UREPA, Schedule, Tokens
from repa_lab.models.facts import SIT_SHAPES, UNET_SHAPES
from repa_lab.models.tap import capture
from repa_lab.spec import load_spec
from repa_lab.spec.yaml import read_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_links_and_pictures_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_example_question_is_a_sound_spec(tmp_path):
    (example,) = re.findall(r"```yaml\n(name: .*?)```", README, flags=re.DOTALL)
    (tmp_path / "question.yaml").write_text(example)
    spec = load_spec(tmp_path / "question.yaml")
    assert [arm.label for arm in spec.arms] == ["small, weight=0.25", "small, weight=0.5", "base, weight=0.25", "base, weight=0.5", "baseline"]
    assert {size.split("/")[0] for size in SIT_SHAPES} == {"nano", "S", "B", "L", "XL"}
    assert set(UNET_SHAPES) == {"nano", "S", "B"}


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_experiment_says_what_it_expects_and_costs(file):
    text = file.read_text()
    assert all(f"# {word}:" in text for word in ("Hypothesis", "Source", "Expected", "Cost"))
    assert read_yaml(file).value["question"].endswith("?")


def test_the_loop_of_the_readme_trains_a_plain_diffusers_unet():
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    regularizer = UREPA(in_dim=32, out_dim=24, weight=Schedule("linear", weight=0.5, warmup_steps=1, decay_steps=20, end=0.5))
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": regularizer.parameters()})
    x, teacher = torch.randn(4, 1, 8, 8), Tokens(torch.randn(4, 36, 24), grid=(6, 6))
    cosines = []
    with capture(unet.mid_block) as tap:
        for step in range(20):
            loss = (unet(x, 500).sample - x).square().mean()
            tokens = tap.take()
            if regularizer.weight_at(step) > 0:
                alignment = regularizer(tokens, teacher, step)
                loss = loss + alignment.loss
                cosines.append(alignment.cosine.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(cosines) == 19
    assert cosines[-1] > cosines[0] + 0.1
