"""What samplers draw, what pruners prune, and fields that are drawn under conditions."""

import math
import shutil

import pytest

from repa_lab.runs import RunsRoot, State
from tests.orchestration.searches import (
    by_value,
    end,
    finish,
    forget,
    measure,
    searcher,
    study_of,
    trials,
    weights,
)


@pytest.fixture
def search(tiny, tmp_path):
    return searcher(tiny, tmp_path)


class TestSamplersAndPruners:
    SPACE = {"regularizer.weight": {"uniform": [0, 1]}, "train.lr": {"log": [1e-4, 1e-2]}}  # noqa: RUF012

    @pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cmaes"])
    def test_a_seed_draws_the_same_whether_or_not_the_search_was_interrupted(self, search, sampler, tmp_path):
        how = {"sampler": sampler, "space": self.SPACE, "trials": 14, "prune": "none", "seeds": 1}
        drawn = []
        for interrupted in (False, True):
            work = search(**how)
            for number in range(14):
                if interrupted and number in (3, 12):
                    work.next()  # and then the scheduler was killed
                    work = search(**how)
                task = work.next()
                finish(work, 100 * (task.run.config.regularizer.weight - 0.7) ** 2, [task])
            drawn.append(weights(work))
            forget(work)
            shutil.rmtree(tmp_path / "by-id")
        assert drawn[0] == drawn[1]
        assert len(set(drawn[0])) == 14
        assert search(**how, seed=1).next().run.config.regularizer.weight != drawn[0][0]

    @pytest.mark.parametrize(("sampler", "within"), [("tpe", 0.2), ("cmaes", 0.2)])
    def test_those_that_learn_find_the_optimum_of_a_bowl(self, search, sampler, within):
        work = search(sampler=sampler, space=self.SPACE, trials=60, prune="none", seeds=1)
        for _ in range(60):
            task = work.next()
            config = task.run.config
            value = (config.regularizer.weight - 0.7) ** 2 + (math.log10(config.train.lr) + 3) ** 2
            measure(work, task, 6, value)
            end(work, task)
        last = weights(work)[-15:]
        assert sorted(abs(weight - 0.7) for weight in last)[7] < within  # a random one: 0.35

    def test_quasi_monte_carlo_fills_the_space_more_evenly_than_chance(self, search):
        space = {"regularizer.weight": {"uniform": [0, 1]}, "regularizer.temperature": {"uniform": [0.1, 1]}}
        work = search(sampler="qmc", space=space, trials=17, prune="none", seeds=1)
        tasks = list(iter(work.next, None))
        boxes = {int(16 * task.run.config.regularizer.weight) for task in tasks[1:]}  # the first precedes the sequence
        assert boxes == set(range(16))

    @pytest.mark.parametrize("prune", ["asha", "hyperband"])
    def test_halving_keeps_the_best_third_at_a_ninth_of_a_run(self, search, prune):
        spec = {"train": {"steps": 9, "batch_size": 8, "lr": 1e-3}}
        work = search(prune=prune, trials=30, spec=spec, seeds=1)
        pruned = {}
        for number in range(30):
            task = work.next()
            for step in range(1, 10):
                if measure(work, task, step, float(number)):
                    pruned[number] = step
                    break
            end(work, task, State.PRUNED if number in pruned else State.DONE)
        # Every trial is worse than all before it; with asha the first is kept, and the second and third are at once the worst.
        assert set(pruned.values()) <= {1, 3, 9}
        if prune == "asha":
            assert pruned[1] == pruned[2] == 1
        else:  # brackets begin to prune at 1, 3 and 9 steps
            assert {1, 3} <= set(pruned.values())

    def test_no_pruner_prunes_nothing(self, search):
        work = search(prune="none", trials=6, seeds=1)
        for number in range(6):
            task = work.next()
            assert not [run for step in (3, 6) for run in measure(work, task, step, 10.0**number)]
            end(work, task)


class TestConditions:
    SPACE = {  # noqa: RUF012
        "regularizer.loss": {"choice": ["cosine", "nt_xent"]},
        "regularizer.temperature": {"log": [0.05, 0.5], "when": {"regularizer.loss": "nt_xent"}},
        "regularizer.weight": {"uniform": [0.1, 1.0], "when": {"regularizer.type": "repa"}},
        "regularizer.block_index": {"int": [0, 1], "when": {"regularizer.loss": ["nt_xent"]}},
    }

    def test_a_field_is_drawn_only_where_its_condition_holds_and_restored_so(self, search, tmp_path):
        work = search(space=self.SPACE, trials=12, prune="none", seeds=1)
        for number in range(12):
            finish(work, float(number))
        losses = set()
        root = RunsRoot(tmp_path)
        for trial, arm in zip(trials(work), work._directory.manifest.arms, strict=True):
            losses.add(trial.params["regularizer.loss"])
            is_drawn = trial.params["regularizer.loss"] == "nt_xent"
            assert ("regularizer.temperature" in trial.params) == is_drawn
            assert ("regularizer.block_index" in trial.params) == is_drawn
            recorded = root.run(arm.runs[0].run_id).spec["regularizer"]
            assert recorded["temperature"] == trial.params.get("regularizer.temperature", 0.1)  # the arm's own setting
            assert recorded["weight"] == trial.params["regularizer.weight"]
        assert losses == {"cosine", "nt_xent"}
        told = by_value(work)
        forget(work)
        again = search(space=self.SPACE, trials=12, prune="none", seeds=1)
        assert again.next() is None
        assert by_value(again) == told and len(study_of(again).trials) == 12
