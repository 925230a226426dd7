"""What samplers draw, what pruners prune, and fields that are drawn under conditions."""

import math

import pytest

from repa_lab.runs import RunsRoot, State
from tests.orchestration.searches import METRIC, by_value, finish_one, first_weight, searcher, train, weights


@pytest.fixture
def search(tiny, tmp_path):
    return searcher(tiny, tmp_path)


class TestSamplersAndPruners:
    SPACE = {"regularizer.weight": {"uniform": [0, 1]}, "train.lr": {"log": [1e-4, 1e-2]}}  # noqa: RUF012

    @pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cmaes"])
    def test_a_seed_draws_the_same_whether_or_not_the_search_was_interrupted(self, search, sampler, tmp_path):
        how = {"sampler": sampler, "space": self.SPACE, "trials": 14, "prune": "none", "seeds": (0,)}
        drawn = []
        for interrupted in (False, True):
            (tmp_path / "study.db").unlink(missing_ok=True)
            work = search(**how)
            for number in range(14):
                if interrupted and number in (3, 12):
                    work = search(**how)
                task = work.next()
                value = 100 * (task.run.config.regularizer.weight - 0.7) ** 2
                list(work.heard(task.run.run_id, {"step": 6, METRIC: value}))
                work.finished(task.run.run_id, State.DONE)
            drawn.append(weights(work))
        assert drawn[0] == drawn[1]
        assert len(set(drawn[0])) == 14
        (tmp_path / "study.db").unlink()
        assert first_weight(search(**how, seed=1)) != drawn[0][0]

    @pytest.mark.parametrize(("sampler", "within"), [("tpe", 0.2), ("cmaes", 0.2)])
    def test_those_that_learn_find_the_optimum_of_a_bowl(self, search, sampler, within):
        work = search(sampler=sampler, space=self.SPACE, trials=60, prune="none", seeds=(0,))
        for _ in range(60):
            task = work.next()
            config = task.run.config
            value = (config.regularizer.weight - 0.7) ** 2 + (math.log10(config.train.lr) + 3) ** 2
            list(work.heard(task.run.run_id, {"step": 6, METRIC: value}))
            work.finished(task.run.run_id, State.DONE)
        last = weights(work)[-15:]
        assert sorted(abs(weight - 0.7) for weight in last)[7] < within  # a random one: 0.35

    def test_quasi_monte_carlo_fills_the_space_more_evenly_than_chance(self, search, tmp_path):
        space = {"regularizer.weight": {"uniform": [0, 1]}, "regularizer.manifold_weight": {"uniform": [0, 1]}}
        work = search(sampler="qmc", space=space, trials=17, prune="none", seeds=(0,))
        # repa has no use for the manifold weight: settings that differ in nothing else are one run
        drawn = [work._draw()[0].params["regularizer.weight"] for _ in range(17)]
        boxes = {int(16 * weight) for weight in drawn[1:]}  # the first comes before the sequence
        assert boxes == set(range(16))

    @pytest.mark.parametrize("prune", ["asha", "hyperband"])
    def test_halving_keeps_the_best_third_at_a_ninth_of_a_run(self, search, prune):
        spec = {"train": {"steps": 9, "batch_size": 8, "lr": 1e-3}}
        work = search(prune=prune, trials=30, spec=spec, seeds=(0,))
        pruned = {}
        for number in range(30):
            task = work.next()
            for step in range(1, 10):
                if list(work.heard(task.run.run_id, {"step": step, METRIC: float(number)})):
                    pruned[number] = step
                    break
            work.finished(task.run.run_id, State.PRUNED if number in pruned else State.DONE)
        # Every trial is worse than all before it; with asha the first is kept, and the second and third are at once the worst.
        assert set(pruned.values()) <= {1, 3, 9}
        if prune == "asha":
            assert pruned[1] == pruned[2] == 1
        else:  # brackets begin to prune at 1, 3 and 9 steps
            assert {1, 3} <= set(pruned.values())

    def test_no_pruner_prunes_nothing(self, search):
        work = search(prune="none", trials=6, seeds=(0,))
        for number in range(6):
            task = work.next()
            assert not [p for step in (3, 6) for p in work.heard(task.run.run_id, {"step": step, METRIC: 10.0**number})]
            work.finished(task.run.run_id, State.DONE)


class TestConditions:
    SPACE = {  # noqa: RUF012
        "regularizer.loss": {"choice": ["cosine", "nt_xent"]},
        "regularizer.temperature": {"log": [0.05, 0.5], "when": {"regularizer.loss": "nt_xent"}},
        "regularizer.weight": {"uniform": [0.1, 1.0], "when": {"regularizer.type": ["repa", "urepa"]}},
        "regularizer.manifold_weight": {"uniform": [0, 5], "when": {"regularizer.type": "urepa"}},
    }

    def test_a_field_is_drawn_only_where_its_condition_holds(self, search):
        work = search(space=self.SPACE, trials=12, prune="none", seeds=(0,))
        for _ in range(12):
            finish_one(work, 1.0)
        losses = set()
        for trial in work.trials:
            params, config = trial.record["params"], trial.runs[0].config
            losses.add(params["regularizer.loss"])
            assert ("regularizer.temperature" in params) == (params["regularizer.loss"] == "nt_xent")
            assert "regularizer.weight" in params and "regularizer.manifold_weight" not in params
            assert config.regularizer.temperature == params.get("regularizer.temperature", 0.1)  # the arm's own setting
        assert losses == {"cosine", "nt_xent"}

    def test_conditional_trials_are_restored_from_their_runs(self, search, tmp_path):
        work = search(space=self.SPACE, trials=6, prune="none", seeds=(0,))
        for number in range(6):
            task = work.next()
            train(RunsRoot(tmp_path), task, {6: float(number)})
            list(work.heard(task.run.run_id, {"step": 6, METRIC: float(number)}))
            work.finished(task.run.run_id, State.DONE)
        (tmp_path / "study.db").unlink()
        again = search(space=self.SPACE, trials=6, prune="none", seeds=(0,))
        assert again.next() is None
        assert by_value(again) == by_value(work)
