"""`repa-lab profile` on real runs, as a user meets it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from repa_lab.report.figure_data import load_profile, profile_matrix
from repa_lab.runs import RunsRoot, RunWriter
from tests.test_cli import cli
from tests.training.conftest import OFF, make_run, run_to_end


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> RunsRoot:
    """An aligned run, and a baseline that measures no alignment."""
    root = RunsRoot(tmp_path_factory.mktemp("cli") / "runs")
    for name, settings in (("aligned", {}), ("baseline", OFF)):
        run_to_end(
            make_run(**settings, **{"train.steps": 2, "train.lr": 0.05, "train.ema": 0.5}), root.run(name), root.cache
        )
    return root


def test_two_runs_end_to_end(root):
    """The baseline has no encoder; it is measured with that of the other run, by its name and with its settings."""
    words = (
        "--encoder",
        "efficientnet_lite0",
        "--timesteps",
        "0.9,0.5",
        "--metrics",
        "cka, cknna,lds",
        "--root",
        root.path,
    )
    done = cli("profile", "baseline", "aligned", *words)
    assert done.returncode == 0, done.stderr
    aligned, baseline = root.run("aligned"), root.run("baseline")
    measured = [row["heldout/cka"] for row in aligned.rows() if "heldout/cka" in row][-1]
    matrix = profile_matrix(load_profile(aligned), "cka")
    assert list(matrix.columns) == [0.5, 0.9]
    assert matrix.loc[1, 0.5] == measured
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")
    ]
    assert [line[0] for line in lines] == ["0.5", "0.9", "0.5", "0.9"]
    best = matrix[0.5].idxmax()
    assert lines[2][1:3] == [f"{best} ({matrix.loc[best, 0.5]:.3f})", f"{measured:.3f}"]
    assert "aligned: ema weights of step 2, 97 held-out images, efficientnet_lite0" in done.stdout
    assert [line for line in done.stdout.splitlines() if "ligned at" in line or line == "not aligned"] == [
        "not aligned",
        "aligned at block 1",
    ]
    pictures = [
        baseline.path / "profile.png",
        aligned.path / "profile.png",
        aligned.path / "profile-minus-baseline.png",
    ]
    assert done.stdout.splitlines()[-3:] == [str(path) for path in pictures]
    widths = []
    for path in pictures:
        with Image.open(path) as image:
            assert np.asarray(image).std() > 10
            widths.append(image.width)
    assert widths[2] > 2.5 * widths[1]


def test_json_is_what_is_stored(root):
    asked = ("--weights", "last", "--samples", 20, "--timesteps", "0.25", "--metrics", "cka")
    done = cli("profile", root.run("aligned").path, *asked, "--json", "--root", root.path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found == root.run("aligned").profile
    assert (found["protocol"]["weights"], found["protocol"]["images"], len(found["values"])) == ("last", 20, 4)


def test_what_cannot_be_compared_is_drawn_alone_and_said(root):
    other = root.run("other")
    shutil.copytree(root.run("aligned").path, other.path)
    spec = json.loads((other.path / "spec.json").read_text())
    spec["regularizer"]["encoder"]["standardize"] = True
    (other.path / "spec.json").write_text(json.dumps(spec))
    done = cli("profile", "aligned", "other", "--metrics", "cka", "--timesteps", "0.5", "--root", root.path)
    assert done.returncode == 0
    assert (
        done.stderr == "the profiles of aligned and other cannot be compared: encoder.standardize is False and True\n"
    )
    assert (other.path / "profile.png").exists() and not (other.path / "profile-minus-aligned.png").exists()


def test_a_grid_too_small_for_a_metric_is_said(root):
    run = make_run(**{"model.size": "nano/4"})
    run_to_end(run, root.run("coarse"), root.cache)
    done = cli("profile", "coarse", "--metrics", "cka,lds,cds,rmsc", "--timesteps", "0.5", "--root", root.path)
    assert "the grid is too small for lds" in done.stdout.splitlines()
    assert set(load_profile(root.run("coarse"))["metric"]) == {"cka", "cds", "rmsc"}
    assert (
        cli("profile", "coarse", "--metrics", "lds", "--root", root.path).stderr
        == "no block of run coarse has a grid that is large enough for lds\n"
    )


def refused(*words) -> str:
    done = cli("profile", *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_mistakes_are_one_line(root, tmp_path):
    with RunWriter(RunsRoot(tmp_path).run("new")) as writer:
        writer.describe(make_run().to_json(), {})
    at = ("--root", root.path)
    assert refused("nope", *at) == f"no run 'nope' in {root.path}; `repa-lab status` lists them"
    assert refused("new", "--root", tmp_path) == "run new has no checkpoint yet"
    assert (
        refused("aligned", "--timesteps", "0.5,x", *at)
        == "--timesteps: expected numbers with commas between them, got '0.5,x'"
    )
    assert (
        refused("aligned", "--precision", "int8", *at)
        == "--precision: unknown precision 'int8'; allowed: auto, fp32, bf16, fp16"
    )
    assert refused("baseline", *at) == "run baseline is compared with no encoder; name one"
    assert (
        refused("aligned", "--samples", 10, *at)
        == "cknna needs 11 or more held-out images, got 10; leave it out of the metrics"
    )
    assert refused("aligned", "--encoder", "{name: dinov2_vits14, size: 3}", *at).startswith(
        "<given>: size: unknown field 'size'; allowed: cache,"
    )
    assert refused("aligned", "--encoder", "[a", *at) == "--encoder: not a YAML value: '[a'"
    assert refused("aligned", "--encoder", "dinov2_vits15", *at).startswith(
        "unknown encoder 'dinov2_vits15'; allowed: efficientnet_lite0,"
    )


def test_missing_weights_of_an_encoder_are_one_line(root, tmp_path):
    missing = f"{{name: dinov2_vits14, image_size: 28, weights: {tmp_path / 'none.pth'}}}"
    line = refused("aligned", "--encoder", missing, "--root", root.path)
    assert line == f"the weights of 'dinov2_vits14', '{tmp_path / 'none.pth'}', are not a file"


@pytest.mark.filterwarnings("error::UserWarning:repa_lab.report.figures")
def test_a_profile_of_one_time_is_drawn(root):
    done = cli("profile", "aligned", "--metrics", "cka", "--timesteps", "0.5", "--root", root.path)
    assert done.returncode == 0, done.stderr
