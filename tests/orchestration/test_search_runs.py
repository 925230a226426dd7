"""Searches that train: real workers, real SQLite, and run directories that outlive the study."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import yaml

from repa_lab import load_spec, plan, sweep
from repa_lab.orchestration.plan import make_plan
from repa_lab.orchestration.rehearsal import rehearse_experiment
from repa_lab.orchestration.search.search import SearchWork
from repa_lab.orchestration.search.study import StorageError, open_storage
from repa_lab.runs import RunsRoot, RunWriter, State
from repa_lab.spec import SpecError

METRIC = "frechet:efficientnet_lite0@16/ode2"
SEARCH = {"space": {"regularizer.weight": {"log": [0.1, 1.0]}}, "trials": 3, "prune": "median", "sampler": "random"}


def spec_of(tiny, **search):
    return tiny(axes={}, search={**SEARCH, **search})


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory):
    """A finished search of three trials with two seeds each: its root, its trials."""
    root = tmp_path_factory.mktemp("searched") / "runs"
    outcome = sweep(spec_of(tiny), root, workers=1)
    assert not outcome.failures
    return root, outcome.directory.manifest.search.trials


@pytest.fixture
def root(searched, tmp_path):
    """A copy of the search's root, to be damaged at will."""
    shutil.copytree(searched[0], tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def histories(root):
    """What every run's history holds, from which any further training would show."""
    return {path.parent.name: path.read_text() for path in root.glob("by-id/*/events.jsonl")}


def told(trials):
    return {trial.params["regularizer.weight"]: (trial.state, trial.value) for trial in trials}


def test_a_lost_study_is_rebuilt_and_nothing_is_trained_again(tiny, root, searched):
    before = histories(root)
    (root / "tiny" / "study.db").unlink()
    outcome = sweep(spec_of(tiny), root, workers=1)
    assert (outcome.trained, outcome.failures) == (0, {})
    assert histories(root) == before
    assert told(outcome.directory.manifest.search.trials) == told(searched[1])


def test_a_lost_folder_is_rebuilt_too_and_a_run_that_was_begun_goes_on(tiny, root, searched):
    """All that is left is by-id; one run was interrupted after its first measurement."""
    shutil.rmtree(root / "tiny")
    victim = next(run for run in RunsRoot(root).runs() if run.state.state is State.DONE)
    _interrupt(victim)
    outcome = sweep(spec_of(tiny, prune="none"), root, workers=1)
    assert (outcome.trained, outcome.failures) == (1, {})
    again = told(outcome.directory.manifest.search.trials)
    assert {weight: value for weight, (_, value) in again.items()} == pytest.approx(
        {weight: value for weight, (_, value) in told(searched[1]).items()}
    )
    assert [row["step"] for row in victim.rows() if METRIC in row] == [3, 6]


def _interrupt(run):
    """Take a run back to its checkpoint of step 3, as a kill soon after it would have left it."""
    shutil.rmtree(run.checkpoints / "step-00000006")
    with RunWriter(run) as writer:
        writer.rewind(3)
        writer.state(State.INTERRUPTED, 3)


def test_a_changed_space_keeps_the_trials_that_fit_and_trains_only_what_is_new(tiny, root, searched):
    before = histories(root)
    lowest = sorted(told(searched[1]))[1]
    changed = spec_of(tiny, space={"regularizer.weight": {"uniform": [lowest, 1.5]}}, trials=3)
    outcome = sweep(changed, root, workers=1)
    assert (outcome.trained, outcome.failures) == (2, {})
    assert {run: text for run, text in histories(root).items() if run in before} == before
    new = told(outcome.directory.manifest.search.trials)
    old = told(searched[1])
    assert len(new) == 3 and {weight: new[weight] for weight in sorted(old)[1:]} == {w: old[w] for w in sorted(old)[1:]}


def test_a_search_shares_the_runs_of_a_sweep_over_values_in_its_space(tiny, root, searched):
    weight = next(iter(told(searched[1])))
    outcome = sweep(tiny(name="other", axes={"regularizer.weight": [weight]}), root, workers=1)
    assert outcome.trained == 0


def test_settings_that_diverge_are_the_worst_of_all_and_no_failures_and_are_not_tried_again(tiny, tmp_path):
    space = {"train.lr": {"choice": [1e-3, 1e30, 2e30]}}
    spec = spec_of(tiny, space=space, trials=12, prune="none") | {"seeds": 1}
    spec["run"] = {**spec["run"], "max_failures": 1}
    outcome = sweep(spec, tmp_path, workers=1)
    assert (outcome.trained, outcome.failures, outcome.stopped) == (1, {}, None)
    assert ["DivergedError" in reason for reason in outcome.diverged.values()] == [True, True]
    trials = {trial.params["train.lr"]: trial for trial in outcome.directory.manifest.search.trials}
    assert {rate: trial.state for rate, trial in trials.items()} == {
        1e-3: "complete",
        1e30: "diverged",
        2e30: "diverged",
    }
    assert (trials[1e30].value, trials[2e30].value) == (None, None)
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{outcome.path / 'study.db'}")
    assert study.n_trials == 3 and study.best_trial.params == {"train.lr": 1e-3}
    assert "DivergedError" in (outcome.path / "report.md").read_text()
    before = histories(tmp_path)
    again = sweep(spec, tmp_path, workers=1)
    assert (again.trained, again.failures, histories(tmp_path)) == (0, {}, before)


def test_distance_against_cost_in_a_database_of_ones_own(tiny, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    objectives = [{"metric": "frechet"}, {"metric": "gpu_hours"}]
    spec = spec_of(
        tiny, space={"train.batch_size": {"int": [4, 32]}}, objective=objectives, prune="none", storage=url, trials=3
    ) | {"seeds": 1}
    outcome = sweep(spec, tmp_path / "runs", workers=1)
    search = outcome.directory.manifest.search
    assert [(aim.metric, aim.goal) for aim in search.objectives] == [(METRIC, "min"), ("gpu_hours", "min")]
    points = {}
    for arm in outcome.directory.manifest.arms:
        last = RunsRoot(tmp_path / "runs").run(arm.runs[0].run_id).rows()[-1]
        points[arm.label] = (last[METRIC], last["seconds"] / 3600)
    assert {trial.arm: tuple(trial.values.values()) for trial in search.trials} == {
        arm: pytest.approx(point) for arm, point in points.items()
    }
    front = {a for a, p in points.items() if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.values())}
    assert set(search.pareto) == front
    assert not (outcome.path / "study.db").exists()
    (study,) = optuna.get_all_study_summaries(url)
    assert study.n_trials == 3 and study.study_name.startswith("tiny, all [")
    assert sweep(spec, tmp_path / "runs", workers=1).trained == 0


def test_a_database_that_cannot_be_opened_is_one_line(tiny, tmp_path):
    url = f"sqlite:///{tmp_path / 'no' / 'such' / 'folder' / 'study.db'}"
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec_of(tiny, storage=url), sort_keys=False))
    with pytest.raises(SpecError) as caught:
        SearchWork(plan(file, tmp_path / "runs"), RunsRoot(tmp_path / "runs").sweep("tiny"))
    (line,) = str(caught.value).splitlines()
    number = 1 + next(i for i, text in enumerate(file.read_text().splitlines()) if "storage:" in text)
    assert line.startswith(f"{file}:{number}:3: search.storage: cannot use sqlite:///") and "unable to open" in line


def test_a_message_of_a_database_holds_no_password(tmp_path):
    with pytest.raises(StorageError) as caught:
        open_storage("mysql+pymysql://me:secret@nowhere.invalid/db", tmp_path / "study.db")
    assert "secret" not in str(caught.value) and "me:***@nowhere.invalid" in str(caught.value)


REHEARSED = {
    "space": {
        "regularizer.loss": {"choice": ["cosine", "nt_xent"]},
        "regularizer.temperature": {"log": [0.05, 0.5], "when": {"regularizer.loss": "nt_xent"}},
    },
    "objective": [{"metric": "seconds"}, {"metric": "fid", "goal": "min"}],
    "prune": "none",
    "trials": 9,
    "storage": "sqlite:///results.db",
}


def test_a_rehearsed_search_has_two_trials_a_metric_that_is_measured_and_a_study_of_its_own(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = RunsRoot(tmp_path / "runs")
    rehearsed = make_plan(rehearse_experiment(load_spec(spec_of(tiny, **REHEARSED)), root.path), root)
    search = rehearsed.experiment.search
    assert ([objective.metric for objective in search.objectives], search.trials) == (["seconds", "frechet"], 2)
    folder = root.sweep("tiny-rehearsal")
    folder.path.mkdir(parents=True)
    SearchWork(rehearsed, folder)
    assert (folder.path / "study.db").exists() and not Path("results.db").exists()


@pytest.mark.slow
def test_a_rehearsal_goes_through_several_objectives_and_conditions(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # for the workers
    monkeypatch.chdir(tmp_path)
    spec = spec_of(tiny, **REHEARSED) | {"evaluate": {**tiny()["evaluate"], "extractor": {"name": "inception"}}}
    outcome = sweep(spec, tmp_path / "runs", workers=1, rehearse=True)
    assert not outcome.failures
    trials = outcome.directory.manifest.search.trials
    assert trials and all(len(trial.values) == 2 for trial in trials)
    assert not Path("results.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prune", ["asha", "hyperband"])
def test_real_runs_are_pruned_at_a_rung_and_stay_pruned(tiny, tmp_path, prune):
    train = {"steps": 18, "batch_size": 8, "lr": 1e-3, "ema": 0.5}
    spec = spec_of(tiny, space={"train.lr": {"log": [1e-5, 1e-1]}}, prune=prune, trials=8, sampler="qmc")
    spec |= {"train": train, "evaluate": {**spec["evaluate"], "every": 2}, "seeds": 1}
    outcome = sweep(spec, tmp_path, workers=1)
    assert not outcome.failures
    trials = outcome.directory.manifest.search.trials
    assert len(trials) == 8
    arms = {arm.label: arm.runs[0].run_id for arm in outcome.directory.manifest.arms}
    pruned = [RunsRoot(tmp_path).run(arms[trial.arm]) for trial in trials if trial.state == "pruned"]
    assert pruned and all(run.state.state is State.PRUNED and run.state.step < 18 for run in pruned)
    assert sweep(spec, tmp_path, workers=1).trained == 0


@pytest.mark.slow
def test_a_killed_scheduler_loses_nothing(tiny, tmp_path):
    spec = spec_of(tiny, prune="none", sampler="tpe") | {"train": {"steps": 40, "batch_size": 8, "lr": 1e-3}}
    spec["evaluate"] = {**spec["evaluate"], "every": 10}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    code = f"import repa_lab; repa_lab.sweep({str(file)!r}, {str(tmp_path / 'runs')!r}, workers=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    root = RunsRoot(tmp_path / "runs")
    while sum(any(METRIC in row for row in run.rows()) for run in root.runs()) < 4:  # within the second trial
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    begun = {run.run_id for run in root.runs()}
    done = {run.run_id: histories(root.path)[run.run_id] for run in root.runs() if run.state.state is State.DONE}
    while any(run.state.state is State.RUNNING for run in root.runs()):
        time.sleep(0.1)  # the worker ends by itself, with a checkpoint
    outcome = sweep(file, root.path, workers=1)
    assert not outcome.failures and len(root.runs()) == 6
    assert {run.run_id for run in root.runs()} >= begun
    assert all(histories(root.path)[run] == text for run, text in done.items())
    for run in root.runs():
        assert [row["step"] for row in run.rows() if METRIC in row] == [10, 20, 30, 40]
    assert {trial.state for trial in outcome.directory.manifest.search.trials} == {"complete"}


@pytest.mark.slow
def test_optuna_dashboard_shows_the_study(searched):
    pytest.importorskip("optuna_dashboard")
    url = f"sqlite:///{searched[0] / 'tiny' / 'study.db'}"
    code = f"from optuna_dashboard import run_server; run_server({url!r}, host='127.0.0.1', port=8976)"
    server = subprocess.Popen([sys.executable, "-c", code])
    try:
        (study,) = _fetch("http://127.0.0.1:8976/api/studies")["study_summaries"]
        assert study["study_name"].startswith("tiny, all [")
        trials = _fetch(f"http://127.0.0.1:8976/api/studies/{study['study_id']}?after=0")["trials"]
        shown = {float(trial["params"][0]["param_internal_value"]): trial.state.lower() for trial in trials}
        assert shown == pytest.approx({weight: state for weight, (state, _) in told(searched[1]).items()})
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.wait()


def _fetch(url):
    while True:
        try:
            with closing(urllib.request.urlopen(url)) as answer:
                return json.load(answer)
        except OSError:  # the server has not come up yet
            time.sleep(0.2)
