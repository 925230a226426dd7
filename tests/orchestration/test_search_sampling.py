"""What samplers draw, what pruners prune, and fields that are drawn under conditions."""

import math
import shutil
from collections import Counter

import pytest

from repa_lab.orchestration.cost import estimate
from repa_lab.orchestration.display import sentences
from repa_lab.orchestration.plan import make_plan
from repa_lab.report.page import write_report
from repa_lab.runs import RunsRoot, State
from repa_lab.spec import SpecError, load_spec
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

ENCODER = {"name": "efficientnet_lite0", "image_size": 64}


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


class TestFiniteSpaces:
    """Every setting is tried once, and then the search says that it is done."""

    NINE = {  # noqa: RUF012
        "train.batch_size": {"int": [4, 6]},
        "regularizer.loss": {"choice": ["cosine", "nt_xent"]},
        "regularizer.temperature": {"choice": [0.05, 0.5], "when": {"regularizer.loss": "nt_xent"}},
    }

    @pytest.mark.parametrize("sampler, seed", [("tpe", 0), ("random", 0), ("random", 1), ("random", 2), ("qmc", 0)])
    def test_three_choices_and_three_trials_are_three_settings(self, search, sampler, seed):
        space = {"regularizer.weight": {"choice": [0.1, 0.5, 1.0]}}
        work = search(space=space, trials=3, prune="none", sampler=sampler, seed=seed)
        for value in (3.0, 1.0, 2.0):
            finish(work, value)
        assert work.next() is None and sorted(weights(work)) == [0.1, 0.5, 1.0]
        assert [trial.state.name for trial in study_of(work).trials] == ["COMPLETE"] * 3
        assert work._directory.manifest.search.exhausted == {"all": 3}

    @pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
    def test_integers_and_conditions_are_gone_through_too(self, search, sampler):
        work = search(space=self.NINE, trials=20, prune="none", sampler=sampler, seeds=1)
        assert work.counts() == (0, 9)
        for number in range(9):
            assert work._directory.manifest.search.exhausted == {}
            finish(work, float(number))
        assert work.next() is None and work.counts() == (9, 9)
        drawn = {tuple(trial.params.values()) for trial in trials(work)}
        assert drawn == {
            (size, *rest) for size in (4, 5, 6) for rest in (("cosine",), ("nt_xent", 0.05), ("nt_xent", 0.5))
        }
        assert len(study_of(work).trials) == len(trials(work)) == 9
        text = write_report(work._directory).markdown.read_text()
        assert "Best of 9 completed trials (9 in all)" in text
        assert "The space is exhausted: all 9 settings around all were tried." in text

    def test_integers_of_cma_es(self, search):
        space = {"train.batch_size": {"int": [4, 5]}, "train.steps": {"int": [6, 8]}}
        work = search(space=space, trials=20, prune="none", sampler="cmaes", seeds=1)
        for number in range(6):
            finish(work, float(number))
        assert work.next() is None and len({tuple(trial.params.values()) for trial in trials(work)}) == 6

    @pytest.mark.parametrize("sampler", ["tpe", "qmc"])
    def test_a_search_that_was_killed_goes_through_the_rest_in_the_same_order(self, search, sampler, tmp_path):
        how, drawn = {"space": self.NINE, "trials": 9, "prune": "none", "sampler": sampler, "seeds": 1}, []
        for kills in ((), (0, 4, 8)):
            work = search(**how)
            for number in range(9):
                if number in kills:
                    work.next()  # and then the scheduler was killed
                    work = search(**how)
                finish(work, float(number % 4))
            drawn.append([trial.params for trial in trials(work)])
            assert len(study_of(work).trials) == 9
            forget(work)
            shutil.rmtree(tmp_path / "by-id")
        assert drawn[0] == drawn[1]

    def test_more_trials_than_before_take_what_is_left(self, search):
        first = search(space=self.NINE, trials=4, prune="none", seeds=1)
        for number in range(4):
            finish(first, float(number))
        assert first.next() is None and first._directory.manifest.search.exhausted == {}
        forget(first)  # the study is rebuilt from the runs
        more = search(space=self.NINE, trials=100, prune="none", seeds=1)
        assert more.counts() == (4, 9)
        for number in range(5):
            finish(more, float(number))
        assert more.next() is None and more._directory.manifest.search.exhausted == {"all": 9}

    def test_settings_that_contradict_each_other_are_left_out(self, search):
        space = {
            "regularizer.schedule.type": {"choice": ["constant", "cosine"]},
            "regularizer.schedule.decay_steps": {"int": [1, 3]},
        }
        warm = {"regularizer": {"type": "repa", "encoder": ENCODER, "schedule": {"warmup_steps": 2}}}
        work = search(space=space, trials=20, prune="none", seeds=1, spec=warm)
        tasks = list(iter(work.next, None))  # a decay that ends after 1 or 2 steps would end within the warm-up
        shapes = [task.run.config.regularizer.schedule for task in tasks]
        assert {(shape.type, shape.decay_steps) for shape in shapes} == {
            ("cosine", 3),
            *(("constant", end) for end in (1, 2, 3)),
        }
        assert len(study_of(work).trials) == len(trials(work)) == len(tasks)

    def test_a_setting_without_effect_is_no_other_setting(self, search):
        """Without a regularizer there is no weight, so the type is tried once among as many weights as there are."""
        space = {"regularizer.type": {"choice": ["none", "repa"]}, "regularizer.weight": {"log": [0.1, 1.0]}}
        work = search(space=space, trials=12, prune="none", seeds=1)
        tasks = list(iter(work.next, None))
        kinds = Counter(task.run.config.regularizer.type for task in tasks)
        assert kinds == {"none": 1, "repa": 11} and len(study_of(work).trials) == 12

    def test_a_draw_that_cannot_but_repeat_is_shown_as_such_and_ends_the_search(self, search):
        space = {"regularizer.type": {"choice": ["none"]}, "regularizer.weight": {"log": [0.1, 1.0]}}
        how = {"space": space, "trials": 12, "prune": "none", "seeds": 1}
        work = search(**how)
        finish(work, 2.0)
        for again in (work, search(**how)):
            assert again.next() is None and again.counts() == (1, 1)
            assert [(trial.state, trial.value) for trial in trials(again)] == [("complete", 2.0), ("repeated", None)]
            first, second = study_of(again).trials
            assert (first.state.name, second.state.name, second.user_attrs) == ("COMPLETE", "FAIL", {"repeats": 0})
            assert again._directory.manifest.search.exhausted == {"all": 1}
            assert len(again._directory.manifest.arms) == 1
        text = write_report(work._directory).markdown.read_text()
        assert "Best of 1 completed trials (2 in all, 1 of them a draw of settings that another has)" in text

    def test_a_space_of_refused_settings_is_refused_again_and_takes_no_trial(self, search):
        """Each bound alone is valid: a warm-up of 4 or 5 steps, and a decay that ends after 1 to 3."""
        train = {"steps": 6, "batch_size": 8, "lr": 1e-3, "lr_schedule": {"type": "linear"}}
        space = {"train.lr_schedule.warmup_steps": {"int": [4, 5]}, "train.lr_schedule.decay_steps": {"int": [1, 3]}}
        space |= {"train.lr": {"log": [1e-3, 1e-2]}}
        for _ in range(4):
            work = search(space=space, trials=2, prune="none", seeds=1, spec={"train": train})
            with pytest.raises(SpecError, match=r"100 settings in a row cannot be, the last for train.lr_schedule"):
                work.next()
            assert work.counts() == (0, 2)

    def test_a_study_that_holds_repeats_from_before_is_cleared_of_them(self, search):
        space = {"regularizer.weight": {"choice": [0.1, 0.5, 1.0]}}
        work = search(space=space, trials=3, prune="none", seeds=1)
        finish(work, 2.0)
        study = study_of(work)
        study.add_trial(study.trials[0])
        again = search(space=space, trials=3, prune="none", seeds=1)
        assert [trial.value for trial in study_of(again).trials] == [2.0] and again.counts() == (1, 3)

    def test_plan_counts_the_settings_of_the_space(self, tiny, tmp_path):
        search = {"space": self.NINE, "trials": 20, "sampler": "random"}
        alone = {"space": {"regularizer.weight": {"log": [0.1, 1.0]}}, "trials": 20}
        for asked, runs, sentence in (
            (search, 18, "9 trials with 2 seeds each, all settings of the space"),
            (alone, 40, "20 trials with 2 seeds each"),
        ):
            estimated = estimate(make_plan(load_spec(tiny(axes={}, search=asked)), RunsRoot(tmp_path)))
            assert estimated.total.runs == runs and sentences(estimated)[0].endswith(f" around each arm: {sentence}")


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
