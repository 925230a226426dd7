"""Seed groups in a search, without any training: rows are told by hand."""

import math
from collections import Counter

import pytest

from repa_lab import plan
from repa_lab.orchestration.search.group import Aim
from repa_lab.orchestration.search.searches import Searches
from repa_lab.runs import RunsRoot, RunWriter, State
from tests.orchestration.searches import METRIC, finish, searcher, states, take, train, weights


@pytest.fixture
def search(tiny, tmp_path):
    return searcher(tiny, tmp_path)


class TestGroups:
    def test_a_trial_is_a_group_of_seeds_with_one_setting(self, search):
        first, second = take(search())
        assert (first.run.seed, second.run.seed) == (0, 1)
        assert first.run.config == second.run.config

    def test_the_group_is_told_as_the_mean_of_its_seeds(self, search):
        work = search()
        for task, value in zip(take(work), (1.0, 4.0), strict=True):
            list(work.heard(task.run.run_id, {"step": 1, METRIC: value}))
            work.finished(task.run.run_id, State.DONE)
        assert work.study.best_value == 2.5

    def test_a_group_is_judged_only_where_all_its_seeds_have_measured(self, search):
        work = search()
        finish(work, 1.0)
        finish(work, 1.0)
        tasks = take(work)
        assert not list(work.heard(tasks[0].run.run_id, {"step": 3, METRIC: 100.0}))
        assert set(work.heard(tasks[1].run.run_id, {"step": 3, METRIC: 100.0})) == {task.run.run_id for task in tasks}
        for task in tasks:
            work.finished(task.run.run_id, State.PRUNED)
        assert states(work) == ["complete", "complete", "pruned"]

    def test_no_group_is_pruned_in_its_first_third(self, search):
        work = search()
        finish(work, 1.0)
        finish(work, 1.0)
        tasks = take(work)
        assert not [pruned for task in tasks for pruned in work.heard(task.run.run_id, {"step": 1, METRIC: 100.0})]

    def test_a_group_whose_runs_all_ended_before_they_could_be_stopped_is_complete(self, search):
        work = search()
        finish(work, 1.0)
        finish(work, 1.0)
        tasks = take(work)
        for task in tasks:
            list(work.heard(task.run.run_id, {"step": 6, METRIC: 100.0}))
        for task in tasks:
            work.finished(task.run.run_id, State.DONE)
        assert states(work) == ["complete"] * 3 and work.trials[2].record["value"] == 100.0

    def test_one_setting_drawn_twice_is_trained_once(self, search):
        work = search(space={"regularizer.type": {"choice": ["repa"]}}, trials=3, prune="none")
        tasks = take(work)
        assert work.next() is None  # the other two trials wait for the same runs
        for task in tasks:
            list(work.heard(task.run.run_id, {"step": 6, METRIC: 2.0}))
            work.finished(task.run.run_id, State.DONE)
        assert [trial.value for trial in work.study.trials] == [2.0] * 3
        assert len(work.trials) == 1 and work.counts() == (2, 2)


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
        for task in take(work):
            list(work.heard(task.run.run_id, {"step": 3, METRIC: 9.0}))
        for run in work.trials[2].runs:
            work.finished(run.run_id, State.PRUNED)
        assert states(work) == ["complete", "complete", "pruned"]
        assert work.next() is None and search(trials=3).next() is None

    def test_what_a_killed_scheduler_left_open_is_asked_again_with_the_same_runs(self, search):
        lost = [task.run.run_id for task in take(search())]
        again = search()
        assert [task.run.run_id for task in take(again)] == lost
        assert states(again) == ["running"]

    def test_what_ended_while_no_scheduler_looked_is_told_and_not_asked_again(self, search, tmp_path):
        work = search(trials=1)
        for task, value in zip(take(work), (1.0, 4.0), strict=True):
            train(RunsRoot(tmp_path), task, {3: 9.0, 6: value})
        again = search(trials=1)
        assert again.next() is None
        assert [trial.record["value"] for trial in again.trials] == [2.5]

    def test_looking_at_a_search_that_goes_on_does_not_disturb_it(self, search):
        work = search(trials=1)
        tasks = take(work)
        assert search(trials=1).counts()[0] == 0  # as a second process does before it finds the sweep held
        for task in tasks:
            list(work.heard(task.run.run_id, {"step": 6, METRIC: 1.0}))
            work.finished(task.run.run_id, State.DONE)
        assert states(work) == ["complete"]

    def test_failed_groups_do_not_make_a_search_endless_and_are_tried_again_by_a_rerun(self, search):
        work = search(trials=2)
        failed = []
        for _ in range(2):
            for task in take(work):
                failed.append(task.run.run_id)
                work.finished(task.run.run_id, State.FAILED)
        assert work.next() is None
        assert states(work) == ["failed", "failed"]
        again = search(trials=2)
        assert [task.run.run_id for task in take(again) + take(again)] == failed

    def test_a_setting_that_failed_twice_is_queued_once(self, search):
        work = search(trials=3)
        failed = take(work)
        for task in failed:
            work.finished(task.run.run_id, State.FAILED)
        assert take(search(trials=3)) == failed  # and that scheduler was killed
        again = search(trials=3)
        assert take(again) == failed
        assert take(again) != failed
        assert [trial.state.name for trial in again.study.trials] == ["FAIL", "FAIL", "RUNNING", "RUNNING"]


class TestDiverged:
    def test_a_group_with_a_diverged_run_is_the_worst_and_not_lost(self, search, tmp_path):
        work = search(trials=2)
        first, second = take(work)
        train(
            RunsRoot(tmp_path),
            first,
            {3: 5.0},
            State.FAILED,
            "DivergedError: the loss is nan at step 4",
            is_diverged=True,
        )
        work.finished(first.run.run_id, State.FAILED)
        assert list(work.heard(second.run.run_id, {"step": 3, METRIC: 5.0})) == [second.run.run_id]
        work.finished(second.run.run_id, State.PRUNED)
        assert states(work) == ["diverged"]
        assert work.study.trials[0].value == math.inf and work.trials[0].record["value"] is None
        finish(work, 7.0)
        assert work.next() is None  # it counts, and is not tried again
        assert work.study.best_value == 7.0
        assert search(trials=2).next() is None

    def test_its_other_seeds_are_not_begun(self, search, tmp_path):
        work = search(trials=1)
        first = work.next()
        train(RunsRoot(tmp_path), first, {}, State.FAILED, "DivergedError: the loss is nan at step 1", is_diverged=True)
        work.finished(first.run.run_id, State.FAILED)
        assert work.next() is None and states(work) == ["diverged"]

    def test_a_metric_that_is_not_finite_diverges(self, search):
        work = search(trials=1)
        tasks = take(work)
        assert set(work.heard(tasks[0].run.run_id, {"step": 3, METRIC: None})) == {task.run.run_id for task in tasks}
        for task in tasks:
            work.finished(task.run.run_id, State.PRUNED)
        assert states(work) == ["diverged"]

    def test_the_worst_of_what_is_maximized_is_the_least(self, search):
        work = search(aims=(Aim(METRIC, "max"),), trials=1)
        tasks = take(work)
        list(work.heard(tasks[0].run.run_id, {"step": 3, METRIC: None}))
        for task in tasks:
            work.finished(task.run.run_id, State.DONE)
        assert work.study.trials[0].value == -math.inf

    @pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
    def test_samplers_go_on_with_diverged_trials_among_the_others(self, search, sampler):
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"log": [1e-4, 1e-2]}}
        work = search(trials=24, prune="none", sampler=sampler, space=space)
        for number in range(24):
            for task in take(work):
                list(work.heard(task.run.run_id, {"step": 6, METRIC: None if number % 3 == 0 else float(number)}))
                work.finished(task.run.run_id, State.DONE)
        assert states(work).count("diverged") == 8 and len(set(weights(work))) == 24


class TestSeveralObjectives:
    AIMS = (Aim(METRIC, "min"), Aim("gpu_hours", "min"))

    def test_the_front_holds_what_nothing_else_beats_in_both(self, search, tmp_path):
        work = search(aims=self.AIMS, trials=4, prune="none")
        # Distance and seconds on two GPUs each: the third is worse than the first in both, the fourth diverged at once.
        for distance, seconds in ((3.0, 1800), (1.0, 5400), (4.0, 3600), (None, 1)):
            for task in take(work):
                train(RunsRoot(tmp_path), task, {6: distance}, seconds=seconds)
                list(work.heard(task.run.run_id, {"step": 6, "seconds": seconds, METRIC: distance}))
                work.finished(task.run.run_id, State.DONE)
        records = [trial.record for trial in work.trials]
        assert [record["values"] for record in records] == [
            {METRIC: 3.0, "gpu_hours": 1.0},
            {METRIC: 1.0, "gpu_hours": 3.0},
            {METRIC: 4.0, "gpu_hours": 2.0},
            {},
        ]
        assert [record["state"] for record in records] == ["complete", "complete", "complete", "diverged"]
        assert sorted(work.front) == sorted(trial.arm.label for trial in work.trials[:2])
        (tmp_path / "study.db").unlink()
        assert sorted(search(aims=self.AIMS, trials=4, prune="none").front) == sorted(work.front)

    @pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
    def test_samplers_go_on_with_diverged_trials_among_the_others(self, search, sampler):
        work = search(aims=self.AIMS, trials=24, prune="none", sampler=sampler, seeds=(0,))
        for number in range(24):
            task = work.next()
            row = {"step": 6, "seconds": 60.0 * number, METRIC: None if number % 4 == 0 else 100.0 - number}
            list(work.heard(task.run.run_id, row))
            work.finished(task.run.run_id, State.DONE)
        assert states(work).count("diverged") == 6 and len(set(weights(work))) == 24


def test_a_run_of_a_settled_trial_that_is_wanted_again_is_trained_and_its_trial_stays(tiny, tmp_path):
    make, root = searcher(tiny, tmp_path), RunsRoot(tmp_path)
    work = make(trials=1)
    tasks = finish(work, 1.0)
    for task in tasks:
        train(root, task, {6: 1.0})
    assert (make(trials=1).next(), make(trials=1).counts()) == (None, (2, 2))
    with RunWriter(root.run(tasks[1].run.run_id)) as writer:  # as `repa-lab retry --from-scratch`
        writer.start_over()
        writer.state(State.NEW, 0)
    again = make(trials=1)
    assert again.counts() == (1, 2)
    assert again.next() == tasks[1] and again.next() is None
    again.finished(tasks[1].run.run_id, State.DONE)
    assert (again.counts(), states(again)) == ((2, 2), ["complete"])


@pytest.mark.parametrize(
    "when", [{}, {"when": {"regularizer.loss": "nt_xent"}}], ids=["changes nothing", "is never drawn"]
)
def test_an_arm_that_nothing_searched_makes_a_difference_to_is_trained_once(tiny, tmp_path, when):
    arms = {"baseline": {"regularizer.type": "none"}, "aligned": {"regularizer.loss": "nt_xent"}}
    search = {"space": {"regularizer.weight": {"log": [0.1, 1.0], **when}}, "trials": 3, "sampler": "random"}
    planned = plan(tiny(axes={"alignment": arms}, search=search), tmp_path)
    directory = RunsRoot(tmp_path).sweep("tiny")
    directory.path.mkdir()
    work = Searches(planned, directory)
    tasks = list(iter(work.next, None))
    assert Counter(task.run.config.regularizer.type for task in tasks) == {"none": 2, "repa": 3 * 2}
    assert len({task.run.run_id for task in tasks}) == 8
    assert work.counts() == (0, 8)
