"""Trials of several seeds in a search, without any training: run directories are written by hand."""

import math
import re
import shutil
from collections import Counter

import optuna
import pytest

from repa_lab import plan
from repa_lab.orchestration.search.search import SearchWork
from repa_lab.report.page import write_report
from repa_lab.runs import RunsRoot, RunWriter, State
from tests.orchestration.searches import (
    METRIC,
    directory_of,
    end,
    finish,
    forget,
    measure,
    searcher,
    states,
    study_of,
    take,
    train,
    trials,
    weights,
)

COSTLY = [{"metric": "frechet"}, {"metric": "gpu_hours"}]


@pytest.fixture
def search(tiny, tmp_path):
    return searcher(tiny, tmp_path)


class TestSeeds:
    def test_a_trial_is_one_setting_with_all_seeds_and_its_value_is_their_mean(self, search):
        work = search()
        first, second = take(work)
        assert (first.run.seed, second.run.seed) == (0, 1)
        assert first.run.config == second.run.config
        for task, value in ((first, 1.0), (second, 4.0)):
            measure(work, task, 1, value)
            end(work, task)
        assert study_of(work).best_value == trials(work)[0].value == 2.5

    def test_a_trial_is_judged_only_where_all_its_seeds_have_measured(self, search):
        work = search()
        finish(work, 1.0)
        finish(work, 1.0)
        tasks = take(work)
        assert measure(work, tasks[0], 1, 100.0) == measure(work, tasks[1], 1, 100.0) == []  # the first third
        assert measure(work, tasks[0], 3, 100.0) == []
        assert set(measure(work, tasks[1], 3, 100.0)) == {task.run.run_id for task in tasks}
        for task in tasks:
            end(work, task, State.PRUNED)
        assert states(work) == ["complete", "complete", "pruned"]

    def test_a_trial_whose_runs_all_ended_before_they_could_be_stopped_is_complete(self, search):
        work = search()
        for value in (1.0, 1.0, 100.0):
            finish(work, value)
        assert states(work) == ["complete"] * 3 and trials(work)[2].value == 100.0

    def test_no_setting_is_drawn_twice(self, search):
        work = search(space={"regularizer.loss": {"choice": ["cosine", "nt_xent"]}}, trials=6, prune="none")
        assert work.counts() == (0, 4)
        tasks = list(iter(work.next, None))
        assert Counter(task.run.config.regularizer.loss for task in tasks) == {"cosine": 2, "nt_xent": 2}
        finish(work, 2.0, tasks)
        assert [trial.value for trial in study_of(work).trials] == [2.0] * 2
        assert len(trials(work)) == 2 and work.counts() == (4, 4)

    def test_the_arms_own_setting_is_a_trial_like_the_others(self, search):
        work = search(space={"train.lr": {"choice": [1e-3, 1e-2]}}, trials=6, prune="none")  # 1e-3 is the arm's own
        list(iter(work.next, None))
        assert sorted(trial.params["train.lr"] for trial in trials(work)) == [1e-3, 1e-2]


class TestTrialsInAll:
    def test_trials_complete_to_the_number_that_was_asked_for(self, search):
        work = search(trials=2)
        finish(work, 1.0)
        finish(work, 2.0)
        assert work.next() is None and work.counts() == (4, 4)
        assert search(trials=2).next() is None
        more = search(trials=3)
        finish(more, 0.5)
        assert len(set(weights(more))) == 3

    def test_pruned_ones_count(self, search):
        work = search(trials=3)
        finish(work, 1.0)
        finish(work, 1.0)
        tasks = take(work)
        for task in tasks:
            measure(work, task, 3, 9.0)
        for task in tasks:
            end(work, task, State.PRUNED)
        assert states(work) == ["complete", "complete", "pruned"]
        assert work.next() is None and search(trials=3).next() is None

    def test_what_a_killed_scheduler_left_open_keeps_its_number_and_its_runs(self, search):
        work = search()
        finish(work, 1.0)
        lost = take(work)
        again = search()
        assert take(again) == lost
        assert states(again) == ["complete", "running"]
        assert [trial.state.name for trial in study_of(again).trials] == ["COMPLETE", "RUNNING"]

    def test_what_ended_while_no_scheduler_looked_is_told_and_not_asked_again(self, search):
        work = search(trials=1)
        for task, value in zip(take(work), (1.0, 4.0), strict=True):
            train(work, task, {3: 9.0, 6: value})
        again = search(trials=1)
        assert again.next() is None
        assert [trial.value for trial in trials(again)] == [2.5]

    def test_failed_trials_do_not_make_a_search_endless_and_are_tried_again_by_a_rerun(self, search):
        work = search(trials=2)
        failed = []
        for _ in range(2):
            tasks = take(work)
            failed += tasks
            for task in tasks:
                end(work, task, State.FAILED, "OSError: no space left on device")
        assert work.next() is None
        assert states(work) == ["failed", "failed"]
        assert search(trials=2).next() == failed[0]  # and that scheduler was killed
        again = search(trials=2)
        assert take(again) + take(again) == failed
        assert [trial.state.name for trial in study_of(again).trials] == ["RUNNING", "RUNNING"]


class TestDiverged:
    ERROR = "DivergedError: the loss is nan at step 4"

    def test_a_trial_with_a_diverged_run_is_the_worst_and_not_lost(self, search):
        work = search(trials=2)
        first, second = take(work)
        measure(work, first, 3, 5.0)
        end(work, first, State.FAILED, self.ERROR, is_diverged=True)
        assert measure(work, second, 3, 5.0) == [second.run.run_id]
        end(work, second, State.PRUNED)
        assert states(work) == ["diverged"]
        assert study_of(work).trials[0].value == math.inf and trials(work)[0].value is None
        finish(work, 7.0)
        assert work.next() is None  # it counts, and is not tried again
        assert study_of(work).best_value == 7.0
        assert search(trials=2).next() is None

    def test_its_other_seeds_are_not_begun(self, search):
        work = search(trials=1)
        end(work, work.next(), State.FAILED, self.ERROR, is_diverged=True)
        assert work.next() is None and states(work) == ["diverged"]

    def test_a_metric_that_is_not_finite_diverges(self, search):
        work = search(trials=1)
        tasks = take(work)
        assert set(measure(work, tasks[0], 3, None)) == {task.run.run_id for task in tasks}
        for task in tasks:
            end(work, task, State.PRUNED)
        assert states(work) == ["diverged"]

    def test_the_worst_of_what_is_maximized_is_the_least(self, search, tiny):
        metrics = {"evaluate": {**tiny()["evaluate"], "metrics": ["frechet", "precision_recall"]}}
        work = search(objective={"metric": "precision", "goal": "max"}, trials=1, spec=metrics, seeds=1)
        task, metric = work.next(), METRIC.replace("frechet", "precision")
        measure(work, task, 6, 1.0, **{metric: None})
        end(work, task)
        assert study_of(work).trials[0].value == -math.inf

    @pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
    def test_samplers_go_on_with_diverged_trials_among_the_others(self, search, sampler):
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"log": [1e-4, 1e-2]}}
        work = search(trials=24, prune="none", sampler=sampler, space=space, seeds=1)
        for number in range(24):
            finish(work, None if number % 3 == 0 else float(number))
        assert states(work).count("diverged") == 8 and len(set(weights(work))) == 24


class TestSeveralObjectives:
    def test_the_front_holds_what_nothing_else_beats_in_both(self, search):
        work = search(objective=COSTLY, trials=4, prune="none")
        # Distance and seconds on two GPUs each: the third is worse than the first in both, the fourth diverged at once.
        for distance, seconds in ((3.0, 1800), (1.0, 5400), (4.0, 3600), (None, 1)):
            tasks = take(work)
            for task in tasks:
                measure(work, task, 6, distance, seconds=seconds)
            for task in tasks:
                end(work, task)
        records = trials(work)
        assert [record.values for record in records] == [
            {METRIC: 3.0, "gpu_hours": 1.0},
            {METRIC: 1.0, "gpu_hours": 3.0},
            {METRIC: 4.0, "gpu_hours": 2.0},
            {},
        ]
        assert [record.state for record in records] == ["complete", "complete", "complete", "diverged"]
        front = work._directory.manifest.search.pareto
        assert sorted(front) == sorted(record.arm for record in records[:2])
        forget(work)
        again = search(objective=COSTLY, trials=4, prune="none")
        assert sorted(again._directory.manifest.search.pareto) == sorted(front)

    @pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
    def test_samplers_go_on_with_diverged_trials_among_the_others(self, search, sampler):
        work = search(objective=COSTLY, trials=24, prune="none", sampler=sampler, seeds=1)
        for number in range(24):
            task = work.next()
            measure(work, task, 6, None if number % 4 == 0 else 100.0 - number, seconds=60.0 * number)
            end(work, task)
        assert states(work).count("diverged") == 6 and len(set(weights(work))) == 24


class TestLostRuns:
    """The run directories are the truth: no trial has a value that no run holds."""

    @pytest.fixture
    def finished(self, search):
        """A finished search of three trials, and its tasks."""
        work = search(trials=3, prune="none")
        return work, [finish(work, value) for value in (3.0, 1.0, 2.0)]

    @pytest.mark.parametrize("whole_trial", [True, False])
    def test_a_trial_whose_runs_were_deleted_is_trained_again_under_its_number(self, search, finished, whole_trial):
        work, tasks = finished
        lost = tasks[1] if whole_trial else tasks[1][1:]
        for task in lost:
            shutil.rmtree(directory_of(work, task).path)
        again = search(trials=3, prune="none")
        assert [(trial.state, trial.value) for trial in trials(again)] == [
            ("complete", 3.0),
            ("waiting", None),
            ("complete", 2.0),
        ]
        study = study_of(again)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "WAITING", "COMPLETE"]
        assert study.best_value == 2.0
        assert again.counts() == (4, 6)
        assert [again.next() for _ in lost] == lost and again.next() is None
        finish(again, 5.0, lost)
        assert again.counts() == (6, 6)
        assert [trial.value for trial in trials(again)] == [3.0, 5.0 if whole_trial else 3.0, 2.0]
        assert len(study_of(again).trials) == 3
        assert search(trials=3, prune="none").next() is None

    def test_the_report_tells_no_value_of_a_trial_whose_runs_are_gone(self, search, finished):
        work, tasks = finished
        for task in tasks[1]:
            shutil.rmtree(directory_of(work, task).path)
        text = write_report(work._directory).markdown.read_text()
        best = next(line for line in text.splitlines() if "Best of" in line)
        assert "Best of 2 completed trials (3 in all)" in best and f"{METRIC} = 2.0" in best

    def test_a_run_that_is_wanted_again_is_trained_again_and_its_trial_told_anew(self, search, finished):
        work, tasks = finished
        with RunWriter(directory_of(work, tasks[0][1])) as writer:  # as `repa-lab retry --from-scratch`
            writer.start_over()
            writer.state(State.NEW, 0)
        again = search(trials=3, prune="none")
        assert again.next() == tasks[0][1] and again.next() is None
        finish(again, 7.0, tasks[0][1:])
        assert [trial.value for trial in trials(again)] == [5.0, 1.0, 2.0]

    def test_a_value_that_changed_while_no_scheduler_looked_is_told_as_the_runs_have_it(self, search, finished):
        work, tasks = finished
        for task in tasks[2]:
            with RunWriter(directory_of(work, task)) as writer:
                writer.start_over()
            train(work, task, {6: 0.5})
        again = search(trials=3, prune="none")
        assert [trial.value for trial in trials(again)] == [3.0, 1.0, 0.5]
        assert (again.next(), study_of(again).best_value) == (None, 0.5)

    def test_what_others_noted_in_the_study_stays(self, search, finished):
        work, tasks = finished
        study_of(work).set_user_attr("note", "mine")
        shutil.rmtree(directory_of(work, tasks[0][0]).path)
        again = study_of(search(trials=3, prune="none"))
        assert again.user_attrs["note"] == "mine" and again.metric_names == [METRIC]


@pytest.mark.parametrize(
    "when", [{}, {"when": {"regularizer.loss": "nt_xent"}}], ids=["changes nothing", "is never drawn"]
)
def test_an_arm_that_nothing_searched_makes_a_difference_to_is_trained_once(tiny, tmp_path, when):
    arms = {"baseline": {"regularizer.type": "none"}, "aligned": {"regularizer.loss": "nt_xent"}}
    search = {"space": {"regularizer.weight": {"log": [0.1, 1.0], **when}}, "trials": 3, "sampler": "random"}
    planned = plan(tiny(axes={"alignment": arms}, search=search), tmp_path)
    directory = RunsRoot(tmp_path).sweep("tiny")
    directory.path.mkdir()
    work = SearchWork(planned, directory)
    tasks = list(iter(work.next, None))
    assert Counter(task.run.config.regularizer.type for task in tasks) == {"none": 2, "repa": 3 * 2}
    assert len({task.run.run_id for task in tasks}) == 8
    assert work.counts() == (0, 8)


def test_a_root_may_have_any_characters_in_its_path(tiny, tmp_path):
    """Such as are special in URLs and in format strings."""
    roots = [tmp_path / name for name in ("what?", "what?x=1", "100%20", "{a}#b", "a b+c")]
    for root in roots:
        work = searcher(tiny, root)(trials=1, seeds=1)
        finish(work, 1.0)
        assert states(searcher(tiny, root)(trials=1, seeds=1)) == ["complete"]
        assert sorted(path.name for path in (root / "tiny").iterdir()) == ["runs", "study.db", "sweep.json"]
    assert sorted(tmp_path.iterdir()) == sorted(roots)


def test_the_database_may_be_named_by_optunas_variable(search, tmp_path, monkeypatch):
    urls = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("environment", "spec")}
    monkeypatch.setenv("OPTUNA_STORAGE", urls["environment"])
    for name, storage in (("environment", None), ("spec", urls["spec"])):
        work = search(storage=storage)
        names = optuna.get_all_study_names(urls[name])
        assert [study.startswith("tiny, all [") for study in names] == [True]
        assert not work._directory.study.exists()
        said = "the study is kept in sqlite:///.*/environment.db, by OPTUNA_STORAGE in the environment"
        assert [bool(re.fullmatch(said, text)) for text in work._plan.warnings] == [True] * (storage is None)
    monkeypatch.setenv("OPTUNA_STORAGE", "")
    assert search()._directory.study.is_file()
