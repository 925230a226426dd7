"""Runs with a common beginning: found from the schedules, trained once, and bit for bit those that were trained by themselves."""

from __future__ import annotations

import copy
import random

import pytest

from repa_lab import plan, sweep
from repa_lab.align.settings import agreement
from repa_lab.orchestration.scheduler import Task
from repa_lab.orchestration.sharing import RunList, _schedules, share
from repa_lab.runs import RunsRoot, State
from repa_lab.runs.checkpoints import Fork, forkable_steps, written_by
from repa_lab.spec import StopRule
from repa_lab.training.loop import train
from tests.faults.processes import steps_of
from tests.training.conftest import (
    OFF,
    OPTIONS,
    SETTINGS,
    assert_same,
    make_options,
    make_run,
    rows,
    run_steps,
    stop_after,
    weights,
)

CUT = "regularizer.schedule"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def named(name: str, seed: int = 0, **settings):
    """A run under an id of its own."""
    run = make_run(seed, **{"train.steps": 12, **settings})
    return type(run)(name, run.config, run.seed)


def cutoffs(*steps: int | None, seed: int = 0):
    return [named(f"cut{step}-{seed}", seed, **{CUT: {"cutoff_step": step}}) for step in steps]


def trained(runs, forks) -> int:
    """The steps that have to be trained: all but those that a fork takes over."""
    return sum(run.config.train.steps for run in runs) - sum(fork.step for fork in forks.values())


class TestThePlan:
    def test_runs_that_differ_in_the_cutoff_share_what_lies_before_it(self, tmp_path):
        found = share(cutoffs(None, 4, 8), [], RunsRoot(tmp_path))
        assert found == {"cut4-0": Fork("cutNone-0", 4), "cut8-0": Fork("cutNone-0", 8)}

    def test_six_arms_of_a_cutoff_ablation_train_less_than_three_quarters(self, tmp_path):
        runs = cutoffs(None, 2, 4, 6, 8, 10)
        left = trained(runs, share(runs, [], RunsRoot(tmp_path)))
        assert left == 12 + 10 + 8 + 6 + 4 + 2 and left / 72 <= 0.75

    @pytest.mark.parametrize(
        ("evaluate", "step"),
        [
            ({"every": 3}, 6),
            ({"every": 4}, 5),  # the longer run does not measure at step 6
            ({"every": 3, "full": {}}, 5),  # nor by the protocol of milestones, which is for a run's end
            ({"every": 3, "full": {"at": [6]}}, 6),
        ],
    )
    def test_a_run_takes_its_last_step_itself_unless_its_end_is_measured_for_it(self, tmp_path, evaluate, step):
        pair = [
            named(str(steps), **{"train.steps": steps, **{f"evaluate.{k}": v for k, v in evaluate.items()}})
            for steps in (6, 12)
        ]
        assert share(pair, [], RunsRoot(tmp_path)) == {"6": Fork("12", step)}

    def test_nothing_is_shared_by_what_differs_otherwise(self, tmp_path):
        seeds = [named("a", 0), named("b", 1)]
        blocks = [named(str(block), **{"regularizer.block_index": block}) for block in (1, 2)]
        weights_ = [named(str(weight), **{"regularizer.weight": weight}) for weight in (0.5, 0.6)]
        thresholds = [named(str(value), **{CUT: {"similarity_threshold": value}}) for value in (0.5, 0.6)]
        kinds = [named("repa"), named("none", **OFF)]
        for pair in (seeds, blocks, weights_, thresholds, kinds):
            assert share(pair, [], RunsRoot(tmp_path)) == {}

    def test_the_one_step_that_a_warmup_from_zero_has_in_common_is_not_worth_a_checkpoint(self, tmp_path):
        pair = [named(str(weight), **{"regularizer.weight": weight, CUT: {"warmup_steps": 3}}) for weight in (0.5, 0.6)]
        assert agreement(*(_schedules(run.config)[0] for run in pair), 12) == 1
        assert share(pair, [], RunsRoot(tmp_path)) == {}

    def test_runs_of_one_weight_share_a_warmup_whatever_comes_after_it(self, tmp_path):
        shapes = ({"type": "constant"}, {"type": "linear", "decay_steps": 10})
        pair = [named(str(number), **{CUT: {"warmup_steps": 3, **shape}}) for number, shape in enumerate(shapes)]
        found = share(pair, [], RunsRoot(tmp_path))
        assert [fork.step for fork in found.values()] == [agreement(*(_schedules(run.config)[0] for run in pair), 12)]

    def test_the_tree_leaves_the_fewest_steps(self, tmp_path):
        """Against every order in which parents could be chosen, for small groups."""
        for seed in range(20):
            draw = random.Random(seed)
            steps = [draw.choice([None, 2, 3, 5, 7, 9, 11]) for _ in range(5)]
            all_measured = {"evaluate.every": 6}  # a longer run measures the end of a shorter one
            runs = [
                named(str(n), **all_measured, **{CUT: {"cutoff_step": step}, "train.steps": draw.choice([6, 12])})
                for n, step in enumerate(steps)
            ]
            found = share(runs, [], RunsRoot(tmp_path))
            ends = [run.config.train.steps for run in runs]
            # What is trained is the number of distinct (history, step): a trie of the weights.
            histories = {
                tuple(0.5 if cut is None or at < cut else 0.0 for at in range(length))
                for cut, end in zip(steps, ends, strict=True)
                for length in range(1, end + 1)
            }
            assert trained(runs, found) == len(histories)


class TestForked:
    """What a fork ends as, against the same run by itself."""

    # Of an average that warms up, every update depends on the number of the step.
    SETTINGS = {"evaluate.every": 4, "train.ema": {"decay": 0.9, "warmup": True}}  # noqa: RUF012

    def directory(self, root: RunsRoot, run, cache, **more):
        assert train(run, root.run(run.run_id), make_options(), cache, **more) is State.DONE
        return root.run(run.run_id)

    @pytest.mark.parametrize("cut", [3, 4])  # between two evaluations, and at one
    def test_ends_bit_for_bit_as_by_itself(self, tmp_path, cache, cut):
        parent, child = (
            named(f"cut{step}", **self.SETTINGS, **{CUT: {"cutoff_step": step}, "train.steps": 6})
            for step in (None, cut)
        )
        alone, shared = RunsRoot(tmp_path / "alone"), RunsRoot(tmp_path / "shared")
        by_itself = [self.directory(alone, run, cache) for run in (parent, child)]
        first = self.directory(shared, parent, cache, kept=frozenset({cut}))
        assert forkable_steps(first)[0] == cut
        second = self.directory(shared, child, cache, fork=Fork(parent.run_id, cut))
        for ours, theirs in zip((first, second), by_itself, strict=True):
            assert rows(ours) == rows(theirs)
            assert_same(weights(ours), weights(theirs))
            assert list(ours.sample_grids()) == list(theirs.sample_grids())
            assert [p.read_bytes() for p in ours.sample_grids().values()] == [
                p.read_bytes() for p in theirs.sample_grids().values()
            ]
        assert [event["event"] for event in second.events()][:2] == ["forked", "resumed"]

    def test_a_longer_run_does_not_inherit_the_last_measurement_of_a_shorter_one(self, tmp_path, cache):
        short, long = (named(str(steps), **self.SETTINGS, **{"train.steps": steps}) for steps in (5, 7))
        alone, shared = RunsRoot(tmp_path / "alone"), RunsRoot(tmp_path / "shared")
        expected = self.directory(alone, long, cache)
        self.directory(shared, short, cache)
        found = self.directory(shared, long, cache, fork=Fork("5", 5))  # from the checkpoint that is left of it
        assert rows(found) == rows(expected)
        assert_same(weights(found), weights(expected))
        assert list(found.sample_grids()) == [4, 7]

    def test_a_damaged_or_missing_beginning_is_trained_anew(self, tmp_path, cache):
        parent, child = (named(f"cut{step}", **{CUT: {"cutoff_step": step}, "train.steps": 4}) for step in (None, 2))
        root = RunsRoot(tmp_path / "shared")
        expected = self.directory(RunsRoot(tmp_path / "alone"), child, cache)
        self.directory(root, parent, cache, kept=frozenset({2}))
        (file,) = (root.run("cutNone").forks / "step-00000002").glob("denoiser.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        found = self.directory(root, child, cache, fork=Fork("cutNone", 2))
        assert_same(weights(found), weights(expected))
        assert [event["event"] for event in found.events()] == ["running", "done"]

    @pytest.mark.parametrize(
        ("after", "forked"), [(4, [4]), (2, [])]
    )  # of a finished run the last two checkpoints are left
    def test_a_rule_is_asked_of_what_is_inherited(self, tmp_path, cache, after, forked):
        """A run of 6 steps is done; a longer one comes with a rule that would have ended it on the way."""
        short, long = (named(str(steps), **{"train.steps": steps, "evaluate.every": 2}) for steps in (6, 8))
        rule = StopRule(metric="frechet:efficientnet_lite0@16/ode2", above=0, after=after)
        alone, shared = RunsRoot(tmp_path / "alone").run("8"), RunsRoot(tmp_path / "shared")
        assert train(long, alone, make_options(), cache, is_enough=rule.holds) is State.STOPPED
        assert alone.state.step == after
        self.directory(shared, short, cache)
        found = shared.run("8")
        assert train(long, found, make_options(), cache, fork=Fork("6", 6), is_enough=rule.holds) is State.STOPPED
        assert [event["step"] for event in found.events() if event["event"] == "forked"] == forked
        assert (found.state.step, rows(found)) == (after, rows(alone))
        assert_same(weights(found), weights(alone))
        assert train(long, found, make_options(), cache) is State.DONE  # without the rule it goes on
        assert steps_of(found) == list(range(1, 9))

    def test_what_a_parent_got_to_before_it_ended_early_is_not_trained_again(self, tmp_path, cache):
        parent, child = (named(f"cut{step}", **{"evaluate.every": 2, CUT: {"cutoff_step": step}}) for step in (None, 5))
        root, ends = RunsRoot(tmp_path), stop_after(3)
        assert train(parent, root.run(parent.run_id), make_options(), cache, should_stop=ends) is State.INTERRUPTED
        found = root.run(child.run_id)
        assert (
            train(child, found, make_options(), cache, fork=Fork(parent.run_id, 5), should_stop=stop_after(4))
            is State.INTERRUPTED
        )
        assert [(event["event"], event["step"]) for event in found.events()][:2] == [("forked", 3), ("resumed", 3)]
        alone = run_steps(child, RunsRoot(tmp_path / "alone").run("alone"), cache, steps=7)
        assert rows(found) == rows(alone)
        assert_same(weights(found), weights(alone))

    def test_rows_of_another_rhythm_are_left_out(self):
        of_training, of_measuring = {"step": 6, "loss/total": 1.0}, {"step": 6, "heldout/cka": 1.0}
        assert written_by(of_training, 10, 4, 3, 100)  # saved at
        assert written_by(of_training, 10, 4, 4, 2)  # logged at
        assert not written_by(of_training, 10, 4, 4, 5)
        assert not written_by(of_measuring, 10, 4, 3, 2)
        assert written_by(of_measuring, 6, 4, 4, 5)


class TestTheWork:
    def work(self, tmp_path, *steps):
        runs, root = cutoffs(*steps), RunsRoot(tmp_path)
        return RunList([Task(run, run.run_id) for run in runs], root, share(runs, [], root)), root

    def keep(self, root, run_id, step):
        folder = root.run(run_id).forks / f"step-{step:08d}"
        folder.mkdir(parents=True)

    def test_a_run_waits_until_its_beginning_is_there(self, tmp_path):
        work, root = self.work(tmp_path, None, 4, 8)
        assert work.next().run.run_id == "cutNone-0"
        assert work.next() is None
        self.keep(root, "cutNone-0", 4)
        assert work.next().run.run_id == "cut4-0"
        assert work.next() is None
        self.keep(root, "cutNone-0", 8)
        assert work.next().run.run_id == "cut8-0"
        assert work.counts() == (0, 3)

    def test_a_run_whose_parent_died_does_not_wait(self, tmp_path):
        work, _ = self.work(tmp_path, None, 4)
        work.next()
        work.finished("cutNone-0", State.FAILED)
        assert work.next().run.run_id == "cut4-0"

    def test_what_was_kept_goes_with_the_last_that_needs_it(self, tmp_path):
        work, root = self.work(tmp_path, None, 4, 8)
        for step in (4, 8):
            self.keep(root, "cutNone-0", step)
        for run_id in ("cutNone-0", "cut4-0"):
            work.next()
            work.finished(run_id, State.DONE)
        assert forkable_steps(root.run("cutNone-0")) == [4, 8]
        work.finished("cut8-0", State.DONE)
        assert forkable_steps(root.run("cutNone-0")) == []
        assert not root.run("cutNone-0").forks.exists()


class TestTheSweep:
    def spec(self, **run):
        settings = copy.deepcopy(SETTINGS)
        settings["train"]["steps"], settings["evaluate"]["every"] = 6, 4
        axis = {"never": {}, "early": {f"{CUT}.cutoff_step": 2}, "late": {f"{CUT}.cutoff_step": 5}}
        return {"name": "cut", **settings, "axes": {"cut": axis}, "seeds": 2, "run": {**OPTIONS, **run}}

    def test_a_shared_sweep_is_the_same_bit_for_bit_and_leaves_nothing_behind(self, tmp_path):
        planned = plan(self.spec(), tmp_path / "shared")
        assert planned.steps == {"asked": 36, "trained": 2 * (6 + 4 + 1)}
        shared = sweep(self.spec(), tmp_path / "shared", workers=2)
        alone = sweep(self.spec(share=False), tmp_path / "alone", workers=2)
        assert (shared.trained, shared.failures, alone.trained) == (6, {}, 6)
        forked = 0
        for ours in RunsRoot(tmp_path / "shared").runs():
            theirs = RunsRoot(tmp_path / "alone").run(ours.run_id)
            assert rows(ours) == rows(theirs)
            assert_same(weights(ours), weights(theirs))
            forked += "forked" in [event["event"] for event in ours.events()]
            assert not ours.forks.exists()
        assert forked == 4

    @pytest.mark.slow
    def test_a_shorter_run_whose_end_the_longer_one_does_not_measure_is_measured(self, tmp_path):
        axes, evaluate = {"train.steps": [9, 6]}, {"every": 4, "full": {"samples": 24}}
        spec = {**self.spec(), "axes": axes, "seeds": 1, "compare": {"baseline": {"train.steps": 9}}}
        spec["evaluate"] |= evaluate
        assert plan(spec, tmp_path / "shared").steps["trained"] == 9 + 1
        sweep(spec, tmp_path / "shared", workers=1)
        alone = sweep({**spec, "run": {**OPTIONS, "share": False}}, tmp_path / "alone", workers=1)
        for arm in alone.directory.manifest.arms:
            ours, theirs = (RunsRoot(tmp_path / name).run(arm.runs[0].run_id) for name in ("shared", "alone"))
            assert rows(ours) == rows(theirs)
            assert (
                len(
                    [
                        row
                        for row in rows(ours)
                        if "loss/total" not in row and row["step"] == ours.spec["train"]["steps"]
                    ]
                )
                == 2
            )

    @pytest.mark.slow
    def test_a_longer_run_goes_on_where_a_finished_shorter_one_ended(self, tmp_path):
        one = {**self.spec(), "axes": {}, "seeds": 1}
        sweep(one, tmp_path / "runs")
        longer = {**one, "train": {**one["train"], "steps": 9}}
        planned = plan(longer, tmp_path / "runs")
        assert planned.steps == {"asked": 9, "trained": 3}
        sweep(longer, tmp_path / "runs")
        alone = sweep({**longer, "run": {**OPTIONS, "share": False}}, tmp_path / "alone")
        (arm,) = alone.directory.manifest.arms
        run_id = arm.runs[0].run_id
        ours, theirs = (RunsRoot(tmp_path / name).run(run_id) for name in ("runs", "alone"))
        assert rows(ours) == rows(theirs)
        assert_same(weights(ours), weights(theirs))
