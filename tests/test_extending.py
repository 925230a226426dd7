"""The examples of `docs/extending.md` are whole: these tests run them as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from repa_lab import load_spec, sweep
from repa_lab.align import Prediction, Signals
from repa_lab.align.settings import REGULARIZERS
from repa_lab.encoders.encoder import load_encoder
from repa_lab.metrics.protocol import METRICS
from repa_lab.models.families import FAMILIES
from repa_lab.orchestration.plan import make_plan
from repa_lab.registry import drop_plugins, load_plugins
from repa_lab.runs import RunsRoot

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py): [^\n]*\n(.*?)```", PAGE, flags=re.DOTALL))
SPECS = {
    text.split("\n")[0].removeprefix("name: "): text
    for text in re.findall(r"```yaml\n(name: .*?)```", PAGE, flags=re.DOTALL)
}


@pytest.fixture
def folder(tmp_path):
    """A folder with every plugin and spec of the page, whose components are forgotten afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, text in SPECS.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    yield tmp_path
    drop_plugins([tmp_path / name for name in FILES])


def test_the_page_has_an_example_of_each_kind():
    assert list(FILES) == ["contrastive.py", "gradients.py", "patches.py", "mean_gap.py", "pixart_wide.py"]
    assert set(SPECS) == {"contrastive", "extended"}


def test_the_contrastive_loss_is_minus_the_distance_to_the_next_images_target(folder):
    load_plugins([folder / "contrastive.py"])
    component = REGULARIZERS["contrastive_flow"]
    settings = component.settings.model_validate({"type": "contrastive_flow"})
    output, target = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    loss = component.load()(settings, None)(Signals(prediction=Prediction(output, target)), 0)
    expected = -np.mean((output.double().numpy() - target.double().numpy()[[2, 0, 1]]) ** 2)
    assert loss.value.item() == pytest.approx(expected, abs=1e-6)
    assert settings.weight == 0.05


def test_its_spec_is_planned_with_the_plugins_settings(folder):
    experiment = load_spec(folder / "contrastive.yaml")
    assert [(arm.label, arm.config.regularizer.type) for arm in experiment.arms] == [
        ("all", "contrastive_flow"), ("baseline", "none"),
    ]  # fmt: skip


def test_a_source_an_encoder_and_a_metric_train_together(folder):
    outcome = sweep(folder / "extended.yaml", root=folder / "runs")
    assert (outcome.trained, outcome.failures) == (2, {})
    rows = [
        row
        for run in RunsRoot(folder / "runs").runs()
        for row in run.rows()
        if "mean_gap:efficientnet_lite0@16/ode2" in row
    ]
    assert [row["step"] for row in rows] == [4, 4]
    kept = sorted(path.name for run in RunsRoot(folder / "runs").runs() for path in (run.path / "plugins").iterdir())
    assert kept == ["gradients.py", "gradients.py", "mean_gap.py", "mean_gap.py", "patches.py"]


def test_the_encoders_tokens_are_the_normalised_pixels_of_each_patch(folder):
    load_plugins([folder / "patches.py"])
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    tokens = load_encoder("patches", image_size=8, resolution=8)(pixels)
    assert (tokens.grid, tokens.values.shape) == ((2, 2), (2, 4, 48))
    first = (pixels[0, :, :4, :4].double() / 255 - 0.5) / 0.5
    assert torch.allclose(tokens.values[0, 0].double(), first.flatten(), atol=1e-6)


def test_the_metric_has_its_goal_and_no_name_of_ours(folder):
    load_plugins([folder / "mean_gap.py"])
    assert METRICS["mean_gap"].goal == "min"
    assert METRICS["mean_gap"].compute(np.zeros((3, 2)), np.ones((4, 2))) == 1.0


def test_another_release_of_a_family_is_planned(folder):
    load_plugins([folder / "pixart_wide.py"])
    assert FAMILIES["pixart_900m"].shapes[""].depth == 42
    pipeline = FAMILIES["pixart_900m"].pipeline.released
    spec = {
        "name": "wide",
        "model": {"family": "pixart_900m", "pretrained": pipeline, "train": "lora"},
        "data": {"source": "imagefolder", "resolution": 512},
        "train": {"steps": 10},
        "regularizer": {"type": "repa", "block_index": 41},
    }
    (planned,) = make_plan(load_spec(spec), RunsRoot(folder / "runs")).runs
    assert planned.run.config.regularizer.block_index == 41


def test_an_edit_of_the_source_makes_new_runs(folder):
    def ids() -> list[str]:
        planned = make_plan(load_spec(folder / "extended.yaml"), RunsRoot(folder / "runs"))
        return [entry.run.run_id for entry in planned.runs]

    before = ids()
    (folder / "patches.py").write_text(FILES["patches.py"] + "\n# edited\n", encoding="utf-8")
    after = ids()
    assert after[0] != before[0]  # the aligned arm asks the encoder
    assert after[1] == before[1]  # the baseline does not
