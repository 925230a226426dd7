"""A tiny real sweep and a tiny real search, looked at in every way there is: notebooks, W&B, TensorBoard, the leaderboard."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repa_lab import load_results, sweep
from repa_lab.orchestration.reproduce import results_of
from repa_lab.report import leaderboards, plots
from repa_lab.runs import RunDirectory, RunsRoot
from repa_lab.spec import RunOptions, load_spec
from tests.orchestration.conftest import tiny
from tests.tracking.conftest import numbers, without_none
from tests.tracking.server import KEY, Server, serving

__all__ = ["tiny"]

ROOT = Path(__file__).parents[1]
ANALYSIS = ROOT / "analysis"
METRIC = "frechet:efficientnet_lite0@16/ode2"
WANDB = {"mode": "auto", "project": "p", "entity": "us", "tags": ["mine"], "artifacts": "final"}


class Made(NamedTuple):
    root: RunsRoot
    sweep: Path
    search: Path
    server: Server


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Made:
    """The sweep is tracked and two of its runs are profiled; the search has two trials of one seed."""
    from repa_lab.training.profile import Request, profile_run

    root = RunsRoot(tmp_path_factory.mktemp("runs"))
    options = tiny()["run"]
    published = {"source": "a paper's table", "arms": {"baseline": {"fid": 40.0}, "aligned": {"fid": 20.0}}}
    tracked = {**options, "wandb": WANDB, "tensorboard": True}
    experiment = load_spec(tiny(run=tracked, compare={"targets": {"frechet": [1e9]}}, published=published))
    with serving() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_BASE_URL", server.address)
        environment.setenv("WANDB_API_KEY", KEY)
        done = sweep(experiment, root.path, workers=1)
    assert done.untracked == {}
    results_of(experiment, done.path, "nano")
    space = {"train.lr": {"log": [1e-4, 1e-2]}}
    search = {"space": space, "objective": {"metric": "frechet", "goal": "min"}, "trials": 2, "sampler": "random"}
    hunt = sweep(tiny(name="hunt", axes={}, seeds=1, search=search), root.path, workers=1)
    assert not done.failures and not hunt.failures
    for arm in done.directory.manifest.arms:
        run = root.run(arm.runs[0].run_id)
        profile_run(run, Request((0.2, 0.8), ("cka",), samples=16), RunOptions.model_validate(options), root.cache)
    return Made(root, done.path, hunt.path, server)


def execute(name: str, path: Path) -> list[Any]:
    """The outputs of a notebook that is pointed at a path, as papermill would."""
    notebook = nbformat.read(ANALYSIS / name, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"path = {str(path)!r}"
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ANALYSIS)}}
    ).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def text(outputs: list[Any]) -> str:
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


NOTEBOOKS = sorted(path.name for path in ANALYSIS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_holds_no_outputs_and_no_logic(name):
    for cell in nbformat.read(ANALYSIS / name, as_version=4).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        for word in ("import repa_lab", "def ", "lambda", "if ", "matplotlib.pyplot", "pandas"):
            assert cell.cell_type != "code" or word not in cell.source
        imported = [line for line in cell.source.splitlines() if line.startswith(("from ", "import "))]
        assert all(
            line.startswith(("from repa_lab.report import ", "from IPython.display import ")) for line in imported
        )


def test_convergence_of_a_sweep(made):
    outputs = execute("compare_convergence.ipynb", made.sweep)
    assert pictures(outputs) == 3
    assert "Does it run?" in text(outputs) and "two seeds are too few to conclude" in text(outputs)
    assert f"{METRIC} at step 6" in text(outputs)


def test_what_a_search_found(made):
    outputs = execute("search_results.ipynb", made.search)
    assert pictures(outputs) == 2
    best = min(trial["value"] for trial in json.loads((made.search / "sweep.json").read_text())["search"]["trials"])
    assert "Best of 2 completed trials (2 in all)" in text(outputs)
    assert f"{METRIC} = {best:.0f}" in text(outputs)


def test_alignment_block_by_block(made):
    outputs = execute("alignment_by_layer.ipynb", made.sweep)
    assert pictures(outputs) == 1
    assert "aligned, seed 0, and its baseline" in text(outputs)


def test_a_papers_table_beside_ours(made):
    outputs = execute("reproduce_paper.ipynb", made.sweep)
    assert pictures(outputs) == 2
    (shown,) = [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert shown == (made.sweep / "reproduce.md").read_text() and "a paper's table" in shown
    *_, frame = plots.reproduction(made.sweep)
    frame = frame.set_index("arm")
    assert frame["published"].to_dict() == {"baseline": 40.0, "aligned": 20.0}
    expected = load_results(made.sweep).summary.query("metric == @METRIC").set_index("arm")
    assert frame["measured"].to_dict() == pytest.approx(expected["mean"].to_dict())


def test_a_sweep_in_a_notebook_shows_one_bar_that_is_rewritten(tiny, tmp_path):
    """Every state of the bar has the same place in the output; the time left is there from the first run on."""
    spec, messages = tiny(), []
    source = f"from repa_lab import sweep\noutcome = sweep({spec!r}, {str(tmp_path)!r}, workers=1)\noutcome.trained"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])

    class Client(NotebookClient):
        def process_message(self, message, cell, cell_index):
            messages.append(message)
            return super().process_message(message, cell, cell_index)

    Client(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    bar, result = notebook.cells[0].outputs
    assert (bar.output_type, result.data["text/plain"]) == ("display_data", "4")
    assert re.fullmatch(r"█{24} tiny: 4 of 4 runs done in 0:\d\d:\d\d", bar.data["text/plain"])
    assert bar.data["text/html"].startswith('<div><progress value="1.0000"')
    shown = [
        message["content"] for message in messages if message["msg_type"] in ("display_data", "update_display_data")
    ]
    assert len({content["transient"]["display_id"] for content in shown}) == 1
    texts = [content["data"]["text/plain"] for content in shown]
    assert any(re.search(r" tiny: features.*: \d+ of \d+ images$", text) for text in texts)
    counts = [int(found[1]) for text in texts if (found := re.search(r"tiny: (\d) of 4 runs done", text))]
    assert counts == sorted(counts) and counts[-1] == 4
    assert any(re.search(r"tiny: [123] of 4 runs done, about 0:\d\d:\d\d left in all$", text) for text in texts)


def runs_of(made: Made) -> list[RunDirectory]:
    manifest = json.loads((made.sweep / "sweep.json").read_text())
    return [made.root.run(run["run_id"]) for arm in manifest["arms"] for run in arm["runs"]]


def test_wandb_has_the_rows_of_every_run_and_its_headline(made):
    for run in runs_of(made):
        assert numbers(made.server, run) == without_none(run.rows())
        *rows, table = made.server.history(run.run_id)
        grids = [row for row in rows if "samples" in row]
        assert [row["step"] for row in grids] == [3, 6] and all("images" in row for row in grids)
        assert table["evaluations"]["nrows"] == 2
        curve = {row["step"]: row[METRIC] for row in run.rows() if METRIC in row}
        summary = made.server.summaries[run.run_id]
        found = {key: value for key, value in summary.items() if key.startswith("headline/")}
        best = min(curve, key=lambda step: curve[step])
        assert found == {
            **{"headline/metric": METRIC, "headline/final": curve[6], "headline/best": curve[best]},
            **{"headline/best_step": best, "headline/steps_to/1e+09": 3},
        }


def test_wandb_groups_a_sweeps_runs_and_has_their_nested_settings_and_weights(made):
    for run in runs_of(made):
        aligned, told = run.spec["regularizer"]["type"], made.server.runs[run.run_id]
        assert {key: told[key] for key in ("groupName", "jobType", "project", "entity")} == {
            **{"groupName": "tiny", "jobType": "train", "project": "p", "entity": "us"},
        }
        name = f"{'baseline' if aligned == 'none' else 'aligned'}, seed {run.spec['seed']}"
        assert (told["displayName"], told["tags"]) == (name, ["sit", aligned, "mine"])
        assert made.server.config(run.run_id) == {**run.spec, "protocols": run.protocols}
        assert made.server.artifacts[f"{run.run_id}-ema"]["state"] == "COMMITTED"


def test_tensorboard_has_the_rows_of_every_run(made):
    for run in runs_of(made):
        events = EventAccumulator(str(run.path / "tensorboard")).Reload()
        told = [(event.step, event.value) for event in events.Scalars(METRIC)]
        assert told == [(row["step"], pytest.approx(row[METRIC], rel=1e-6)) for row in run.rows() if METRIC in row]
        assert [event.step for event in events.Images("samples")] == [3, 6]


def test_the_leaderboard_has_the_arms_of_both_sweeps(made):
    board = next(board for board in leaderboards(made.root.path) if board.metric == METRIC)
    arms = board.frame.set_index("arm")
    # The search's first trial is the spec's own setting, which the sweep has trained already.
    shared = arms[arms["sweeps"] == "hunt, tiny"].index
    assert shared.tolist() == ["lr=0.001 / aligned"] and len(arms) == 2 + 2 - 1
    columns = ["mean", "low", "high", "step", "n"]
    expected = load_results(made.sweep).summary.query("metric == @METRIC").set_index("arm")
    for shown, arm in (("baseline", "baseline"), (shared[0], "aligned")):
        assert arms.loc[shown, columns].tolist() == expected.loc[arm, columns].tolist()
    assert arms["mean"].is_monotonic_increasing
    # How alignment was measured stands in no name, so it is what the runs recorded that lets them meet.
    (aligned,) = leaderboards(made.root.path, metric="heldout/cka")
    assert len(aligned.frame) == len(board.frame) and aligned.goal == "max"
