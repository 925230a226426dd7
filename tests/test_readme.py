"""What the README shows is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from repa_lab.cli import app
from repa_lab.encoders.registry import ENCODERS
from repa_lab.models.family import SIT_SHAPES, UNET_SHAPES
from repa_lab.spec import RunConfig, RunOptions, load_spec
from repa_lab.spec.document import read_file
from repa_lab.spec.schema import unknown_field

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_links_and_pictures_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_are_whole():
    tables = 0
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), flags=re.MULTILINE):
            head, line, *rows = (
                re.sub(r"\\\||`[^`]*`", "x", row) for row in table.splitlines()
            )  # what stands in code divides nothing
            assert re.fullmatch(r"\|(-+\|)+", line), f"{page.name}: a row without its table: {head}"
            assert {row.count("|") for row in (head, *rows)} == {line.count("|")}, f"{page.name}: {head}"
            tables += 1
    assert tables > 40


def shown_commands():
    """Every `repa-lab ...` in a code span or at the start of a line of code, comments left out."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for span, line in re.findall(
            r"`(?:\$ )?repa-lab ([^`]+)`|^(?:\$ )?repa-lab ([^#\n]+)", page.read_text(), flags=re.MULTILINE
        ):
            yield page.name, span or line


def test_every_command_that_is_shown_exists_with_its_options():
    group = typer.main.get_command(app)
    before = {option for parameter in group.params for option in parameter.opts}
    seen = set()
    for page, shown in shown_commands():
        words = shown
        while words.split()[0] in before:  # an option of all commands, and its value
            words = words.split(maxsplit=2)[2]
        name, *rest = words.split()
        command = group.commands[name]
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        options = set(re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)(?=[ =\]]|$)", words))
        assert options <= known or name == "import", (
            f"{page}: repa-lab {words}"
        )  # which takes the flags of another trainer
        seen.add(name)
    assert seen == set(group.commands)


def test_the_example_question_is_a_sound_spec(tmp_path):
    (example,) = re.findall(r"```yaml\n(name: .*?)```", README, flags=re.DOTALL)
    (tmp_path / "question.yaml").write_text(example)
    spec = load_spec(tmp_path / "question.yaml")
    assert [arm.label for arm in spec.arms] == [
        "small, weight=0.25",
        "small, weight=0.5",
        "base, weight=0.25",
        "base, weight=0.5",
        "baseline",
    ]
    assert {size.split("/")[0] for size in SIT_SHAPES} == {"nano", "S", "B", "L", "XL"}
    assert set(UNET_SHAPES) == {"nano", "S", "B"}


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_experiment_says_what_it_expects_and_costs(file):
    text = file.read_text()
    assert all(f"# {word}:" in text for word in ("Hypothesis", "Source", "Expected", "Cost"))
    assert read_file(file).value["question"].endswith("?")


def run_example(*words, cwd):
    command = [sys.executable, str(ROOT / "docs/examples/urepa_in_your_loop.py"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_loop_aligns_a_plain_diffusers_unet_and_leaves_it_plain(tmp_path):
    from diffusers import UNet2DModel

    lines = run_example(82, tmp_path / "unet", cwd=tmp_path)
    cosines = [float(re.search(r"cosine (-?[\d.]+)", line)[1]) for line in lines]
    manifolds = [float(re.search(r"manifold ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) == 5
    assert cosines[-1] > cosines[0] + 0.3
    assert manifolds[-1] < manifolds[0] / 2
    unet, info = UNet2DModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(info.values())
    assert unet.config.block_out_channels == [32, 64]


def test_the_loop_of_the_readme_is_the_examples():
    (readme,) = re.findall(r"```python\n(from repa_lab.align .*?)```", README, flags=re.DOTALL)
    example = (ROOT / "docs/examples/urepa_in_your_loop.py").read_text()
    marked = [line for line in example.splitlines() if "# U-REPA" in line]
    assert len(marked) == 11
    for part in (
        "with capture(unet.mid_block) as tap:",
        "if regularizer.is_active(step):",
        "loss = loss + regularizer.weight_at(step) * ",
        'optimizer.add_param_group({"params": regularizer.parameters()})',
    ):
        assert part in readme
        assert part in example
    imports = {line.split("  #")[0] for line in marked if line.startswith("from repa_lab")}
    assert imports == {line for line in readme.splitlines() if line.startswith("from repa_lab")}


REGULARIZER = (ROOT / "docs/regularizer.md").read_text()


def test_every_encoder_is_in_the_documentation_with_its_patch():
    rows = [
        row.split("|")[1:3]
        for row in REGULARIZER.splitlines()
        if row.startswith(("| `dino", "| `mae", "| `moco", "| `clip", "| `sig", "| `ijepa", "| `eff"))
    ]
    named = {name: patches for names, patches in rows for name in re.findall(r"`(\w+)`", names) if name != "_reg"}
    named |= {f"{name}_reg": patches for name, patches in named.items() if name.startswith("dinov2")}
    assert named.keys() == ENCODERS.keys()
    for name, patches in named.items():
        assert str(ENCODERS[name].stride) in patches.replace(" ", "").split(","), name


def test_every_field_of_the_documentation_exists():
    paths = re.findall(r"`(regularizer\.[a-z_.]+|evaluate\.[a-z_.]+|run\.[a-z_]+|data\.[a-z_]+)[:`]", REGULARIZER)
    assert len(paths) > 20
    for path in paths:
        section, _, field = path.partition(".")
        wrong = unknown_field(RunOptions, field) if section == "run" else unknown_field(RunConfig, path)
        assert wrong is None, f"{path}: {wrong}"
