"""Every mistake in how a search is asked for is one line with its place, before anything is created."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repa_lab.orchestration.plan import make_plan
from repa_lab.runs import RunsRoot
from repa_lab.spec import SearchConfig, SpecError, load_spec

SOUND = """\
name: sound
model: {family: sit, size: nano/2}
regularizer: {type: repa, encoder: {name: efficientnet_lite0, image_size: 64}}
data: {source: digits}
train: {steps: 10}
evaluate: {extractor: {name: efficientnet_lite0}}
search:
  space:
    regularizer.loss: {choice: [cosine, nt_xent]}
    regularizer.temperature: {log: [0.05, 0.5], when: {regularizer.loss: nt_xent}}
    regularizer.weight: {log: [0.1, 1.0], when: {regularizer.type: [repa, urepa]}}
  objective: {metric: frechet, goal: min}
  prune: none
"""
LOSS, WEIGHT = "{choice: [cosine, nt_xent]}", "{log: [0.1, 1.0], when: {regularizer.type: [repa, urepa]}}"
NUMBERS = """\
    regularizer.weight: {log: [0.1, 1.0]}
    train.lr: {log: [0.001, 0.01]}
"""
CASES = [
    (
        ("when: {regularizer.loss: nt_xent}", "when: {regularizer.loss: ntxent}"),
        "10:56: search.space.regularizer.temperature.when.regularizer.loss: the space of 'regularizer.loss' has none of ['ntxent']",
    ),
    (
        ("when: {regularizer.loss: nt_xent}", "when: {regularizer.los: nt_xent}"),
        "10:56: search.space.regularizer.temperature.when.regularizer.los: unknown field 'los'; allowed: ",
    ),
    (
        ("when: {regularizer.loss: nt_xent}", "when: {regularizer.weight: 1.0}"),
        "10:56: search.space.regularizer.temperature.when.regularizer.weight: 'regularizer.weight' is drawn after "
        "'regularizer.temperature': put it before, and let it not depend on 'regularizer.temperature'",
    ),
    (
        ("when: {regularizer.loss: nt_xent}", "when: {regularizer.temperature: 0.1}"),
        "10:56: search.space.regularizer.temperature.when.regularizer.temperature: 'regularizer.temperature' cannot depend on itself",
    ),
    (
        (LOSS, "{choice: [cosine, nt_xent], when: {regularizer.temperature: 0.1}}"),
        "9:58: search.space.regularizer.loss.when.regularizer.temperature: 'regularizer.temperature' is drawn after",
    ),
    (
        ("[repa, urepa]", "urepa"),
        "11:50: search.space.regularizer.weight.when.regularizer.type: no arm has 'regularizer.type' at any of ['urepa'], "
        "so 'regularizer.weight' would never be searched",
    ),
    (
        (LOSS, "{choice: [cosine, nt_xent, dot]}"),
        "9:5: search.space.regularizer.loss: expected one of cosine, nt_xent, got 'dot'",
    ),
    (
        (f"regularizer.weight: {WEIGHT}", "regularizer.block_index: {int: [0, 9]}"),
        "11:5: search.space.regularizer.block_index: at 9: regularizer.block_index: sit has 4 blocks: block_index must be 0 to 3",
    ),
    (
        (f"regularizer.weight: {WEIGHT}", "evaluate.samples: {choice: [64, 128]}"),
        "11:5: search.space.evaluate.samples: changes how frechet:efficientnet_lite0@10k/ode50 is measured, so that trials could "
        "not be compared",
    ),
    (
        ("metric: frechet", "metric: kid"),
        "12:15: search.objective.metric: 'kid' is not measured by this spec; measured: frechet:",
    ),
    (
        ("{metric: frechet, goal: min}", "[{metric: gpu_hours}, {metric: kid}]"),
        "12:37: search.objective.1.metric: 'kid' is not measured by this spec; measured: frechet:",
    ),
    (
        ("metric: frechet", "metric: seconds"),
        "12:15: search.objective.metric: seconds is a cost, and something has to be measured for it: add an objective such as frechet",
    ),
    (
        ("{metric: frechet, goal: min}", "[{metric: frechet}, {metric: seconds}, {metric: seconds, goal: max}]"),
        "12:54: search.objective.2.metric: 'seconds' is an objective already",
    ),
    (
        ("{metric: frechet, goal: min}", "[{metric: frechet}, {metric: frechet}]"),
        "12:35: search.objective.1.metric: 'frechet' is measured already: the other objectives are costs, seconds or gpu_hours",
    ),
    (
        ("{metric: frechet, goal: min}\n  prune: none", "[{metric: frechet}, {metric: gpu_hours}]\n  prune: asha"),
        "13:3: search.prune: trials with several objectives cannot be pruned: use none, not asha",
    ),
    (("{metric: frechet, goal: min}", "[]"), "12:3: search.objective: expected "),
    (
        ("prune: none", "prune: sha"),
        "13:3: search.prune: expected one of none, median, asha, hyperband, got 'sha'; did you mean",
    ),
    (
        ("prune: none", "sampler: tpee"),
        "13:3: search.sampler: expected one of tpe, random, qmc, cmaes, got 'tpee'; did you mean",
    ),
    (
        ("prune: none", "sampler: cmaes"),
        "9:5: search.space.regularizer.loss: cmaes takes no choice, only log, uniform and int",
    ),
    (
        ("prune: none", "sampler: cmaes"),
        "10:49: search.space.regularizer.temperature.when: cmaes takes no conditions; use tpe",
    ),
    (
        ("prune: none", "storage: runs/study.db"),
        "13:3: search.storage: not the URL of a database, such as sqlite:///study.db or postgresql://user@host/name",
    ),
    (
        ("prune: none", "storage: nosuchdb://here/x"),
        "13:3: search.storage: Can't load plugin: sqlalchemy.dialects:nosuchdb",
    ),
]


def problems(text: str) -> list[str]:
    Path("spec.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))
    assert not Path("runs").exists()
    return [line.removeprefix("spec.yaml:") for line in str(caught.value).splitlines()]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_is_right_is_planned():
    Path("spec.yaml").write_text(SOUND)
    make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_each_mistake_is_one_line_with_its_place(change, expected):
    assert change[0] in SOUND
    lines = problems(SOUND.replace(*change))
    assert [line for line in lines if line.startswith(expected)], lines


def test_an_empty_space_is_refused():
    lines = problems(SOUND.partition("  space:")[0] + "  space: {}\n")
    assert lines == ["8:3: search.space: expected 1 or more values, got {}"]


def test_a_condition_of_a_condition_is_met_before_the_ends_are_tried():
    """A manifold needs pairs of tokens, and so either patches or a batch: the ends are tried where the condition holds."""
    space = """\
    regularizer.spatial_align: {choice: [true, false]}
    regularizer.spatial_norm: {uniform: [0.1, 0.9], when: {regularizer.spatial_align: true}}
    regularizer.weight: {uniform: [-1, 1], when: {regularizer.spatial_norm: 0.5}}
"""
    lines = problems(_with_space(space))
    assert [line[:66] for line in lines] == ["11:5: search.space.regularizer.weight: expected a number of at lea"]


def test_cmaes_says_when_its_package_is_missing_and_when_there_is_one_field_only(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = problems(_with_space(NUMBERS).replace("prune: none", "sampler: cmaes"))
    assert lines == [
        "12:3: search.sampler: cmaes needs the package cmaes: pip install cmaes, or use tpe, random or qmc"
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    one = _with_space(NUMBERS.splitlines(keepends=True)[0]).replace("prune: none", "sampler: cmaes")
    assert problems(one) == ["11:3: search.sampler: cmaes needs two or more fields: use tpe for one"]


def test_a_database_whose_driver_is_missing_is_refused_without_its_password():
    if importlib.util.find_spec("psycopg2"):
        pytest.skip("the driver is here")
    lines = problems(SOUND.replace("prune: none", "storage: postgresql+psycopg2://me:secret@host/db"))
    assert lines == ["13:3: search.storage: needs another package: No module named 'psycopg2'"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("journal.log", "not the URL of a database, such as sqlite:///study.db or postgresql://user@host/name"),
        ("nosuchdb://me:secret@here/x", "Can't load plugin: sqlalchemy.dialects:nosuchdb"),
    ],
)
def test_a_database_of_the_environment_is_checked_like_one_of_the_spec(tmp_path, monkeypatch, url, message):
    monkeypatch.setenv("OPTUNA_STORAGE", url)
    (line,) = problems(SOUND)
    assert line.startswith(f"7:1: search.storage: OPTUNA_STORAGE in the environment: {message}")
    (file := tmp_path / "spec.yaml").write_text(SOUND.replace("prune: none", "storage: sqlite:///study.db"))
    assert "OPTUNA_STORAGE" not in "".join(make_plan(load_spec(file), RunsRoot(tmp_path)).warnings)


def test_every_problem_is_told_at_once():
    lines = problems(
        SOUND.replace(LOSS, "{choice: [dot]}").replace("metric: frechet", "metric: kid").replace("none", "sha")
    )
    assert [line.split(": ")[1] for line in lines] == [
        "search.prune"
    ]  # what does not parse hides what is checked on it


def test_planning_a_search_loads_no_optuna():
    Path("spec.yaml").write_text(SOUND)
    code = (
        "import sys, repa_lab; repa_lab.plan('spec.yaml'); sys.exit('optuna' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_page_on_searching_shows_is_right():
    folder = Path(__file__).parents[2]
    page = (folder / "docs/search.md").read_text()
    first, conditional, objectives = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    base = f"base: {folder / 'experiments/presets/quickstart.yaml'}\n"
    assert "base: presets/quickstart.yaml\n" in first
    several = f"search:\n  space: {{regularizer.weight: {{log: [0.1, 1]}}}}\n  {objectives.replace('fid', 'frechet')}"
    for text in (
        first.replace("base: presets/quickstart.yaml\n", base),
        f"name: x\n{base}{conditional}",
        f"name: x\n{base}{several}",
    ):
        Path("spec.yaml").write_text(text)
        make_plan(load_spec("spec.yaml"), RunsRoot(Path("runs")))
    assert set(re.findall(r"^\| `(\w+)` \|", page.partition("## Fields")[2].partition("### ")[0], re.MULTILINE)) == set(
        SearchConfig.model_fields
    )


def _with_space(space: str) -> str:
    head, rest = SOUND.split("    regularizer.loss")
    return head + space + rest[rest.index("  objective:") :]
