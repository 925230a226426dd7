"""Seed groups in a search, without any training: rows are told by hand."""

import pytest

from repa_lab.runs import State
from repa_lab.spec import load_spec
from repa_lab.sweep.plan import identify_arm
from repa_lab.sweep.search import SearchWork

METRIC = "m"


@pytest.fixture
def search(tiny, tmp_path):
    """Makes a search over the weight, with its study in the test's folder."""

    def make(**changes):
        config = {"space": {"regularizer.weight": {"log": [0.1, 1.0]}}, "trials": 5, "prune": "median", "sampler": "random"}
        experiment = load_spec(tiny(axes={}, search={**config, **changes}))
        return SearchWork(experiment.arms[0], experiment.search, METRIC, (0, 1), identify_arm, tmp_path / "study.db")

    return make


def finish(work, value):
    """Hand out a group, let both its runs measure `value` at steps 3 and 6 of 6, and end them."""
    tasks = [work.next(), work.next()]
    for step in (3, 6):
        for task in tasks:
            assert not list(work.heard(task.run.run_id, {"step": step, METRIC: value}))
    for task in tasks:
        work.finished(task.run.run_id, State.DONE)


def test_a_trial_is_a_group_of_seeds_with_one_setting(search):
    work = search()
    first, second = work.next(), work.next()
    assert (first.run.seed, second.run.seed) == (0, 1)
    assert first.run.config == second.run.config


def test_the_group_is_told_as_the_mean_of_its_seeds(search):
    work = search()
    tasks = [work.next(), work.next()]
    for task, value in zip(tasks, (1.0, 4.0), strict=True):
        list(work.heard(task.run.run_id, {"step": 1, METRIC: value}))
        work.finished(task.run.run_id, State.DONE)
    assert work.study.best_value == 2.5


def test_a_group_is_judged_only_where_all_its_seeds_have_measured(search):
    work = search()
    finish(work, 1.0)
    finish(work, 1.0)
    tasks = [work.next(), work.next()]
    assert not list(work.heard(tasks[0].run.run_id, {"step": 3, METRIC: 100.0}))
    assert set(work.heard(tasks[1].run.run_id, {"step": 3, METRIC: 100.0})) == {task.run.run_id for task in tasks}
    for task in tasks:
        work.finished(task.run.run_id, State.PRUNED)
    assert [record["state"] for *_, record in work.trials] == ["complete", "complete", "pruned"]


def test_trials_complete_to_the_number_that_was_asked_for(search):
    work = search(trials=2)
    finish(work, 1.0)
    finish(work, 2.0)
    assert work.next() is None and work.counts() == (4, 4)
    assert search(trials=2).next() is None
    more = search(trials=3)
    finish(more, 0.5)
    assert len({record["params"]["regularizer.weight"] for *_, record in more.trials}) == 3


def test_what_a_killed_scheduler_left_open_is_asked_again_with_the_same_runs(search):
    lost = [search().next().run.run_id]
    again = search()
    assert [again.next().run.run_id] == lost


def test_failed_groups_do_not_make_a_search_endless(search):
    work = search(trials=2)
    for _ in range(2):
        for task in (work.next(), work.next()):
            work.finished(task.run.run_id, State.FAILED)
    assert work.next() is None
    assert search(trials=2).next() is not None


def test_no_group_is_pruned_in_its_first_third(search):
    work = search()
    finish(work, 1.0)
    finish(work, 1.0)
    tasks = [work.next(), work.next()]
    assert not [pruned for task in tasks for pruned in work.heard(task.run.run_id, {"step": 1, METRIC: 100.0})]
