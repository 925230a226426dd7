"""Studies that were lost or whose space has changed: run directories tell what was tried."""

import sqlite3
from contextlib import closing

import optuna
import pytest

from repa_lab.runs import RunWriter, State
from repa_lab.spec import SpecError
from tests.orchestration.searches import (
    by_value,
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


@pytest.fixture
def search(tiny, tmp_path):
    return searcher(tiny, tmp_path)


class TestLostStudy:
    def test_every_kind_of_trial_is_restored_and_what_was_begun_goes_on(self, search):
        work = search(prune="none")
        complete, pruned, diverged, begun = (take(work) for _ in range(4))
        for task, value in zip(complete, (1.0, 3.0), strict=True):
            train(work, task, {3: 9.0, 6: value})
        (directory_of(work, complete[0]).path / "provenance.json").write_text("{")  # costs the run nothing
        for task in pruned:
            train(work, task, {3: 7.0}, State.PRUNED)
        train(work, diverged[0], {}, State.FAILED, "DivergedError: the loss is nan at step 1", is_diverged=True)
        train(work, begun[0], {6: 4.0})
        train(work, begun[1], {3: 4.0}, State.INTERRUPTED)
        drawn = weights(work)
        forget(work)
        again = search(prune="none")
        assert {trial.state: trial.params["regularizer.weight"] for trial in trials(again)} == dict(
            zip(["complete", "pruned", "diverged", "waiting"], drawn, strict=True)
        )
        assert [trial.value for trial in trials(again) if trial.state == "complete"] == [2.0]
        assert {3: 9.0, 6: 2.0} in [trial.intermediate_values for trial in study_of(again).trials]
        assert again.counts() == (6, 10)
        # Of the begun trial only the run that is left is handed out, and its other seed is not forgotten.
        task = again.next()
        assert task == begun[1]
        measure(again, task, 6, 8.0)
        end(again, task)
        assert by_value(again)[6.0] == {"regularizer.weight": drawn[3]}
        assert len(take(again)) == 2  # the fifth is new
        assert len(set(weights(again))) == 5

    def test_a_failure_is_tried_again(self, search):
        work = search(trials=1)
        tasks = take(work)
        train(work, tasks[0], {6: 1.0})
        train(work, tasks[1], {3: 1.0}, State.FAILED, "the worker died (signal 9)")
        forget(work)
        assert search(trials=1).next() == tasks[1]

    def test_a_run_that_another_sweep_has_in_hand_is_left_alone(self, search):
        work = search(trials=1)
        tasks = take(work)
        train(work, tasks[0], {3: 1.0}, State.RUNNING)
        forget(work)
        assert states(search(trials=1, seed=5)) == ["waiting"]  # its manifest names the run
        forget(work)
        (work._directory.path / "sweep.json").unlink()
        with RunWriter(directory_of(work, tasks[0])):
            assert states(search(trials=1, seed=5)) == []
        forget(work)
        assert states(search(trials=1, seed=5)) == ["waiting"]  # that sweep was killed

    def test_a_study_that_cannot_be_read_is_put_aside_and_rebuilt(self, search):
        work = search(trials=1)
        finish(work, 1.0)
        work._directory.study.write_bytes(b"this is no database" * 1000)
        again = search(trials=1)
        assert states(again) == ["complete"] and again.next() is None
        assert work._directory.study.with_name("study.db.damaged").read_bytes().startswith(b"this is no")

    def test_a_study_that_somebody_else_holds_is_not_taken_for_a_damaged_one(self, search, monkeypatch):
        monkeypatch.setattr("repa_lab.orchestration.search.study._SQLITE", {"connect_args": {"timeout": 0.1}})
        study = search()._directory.study
        study.unlink()
        with closing(sqlite3.connect(study)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(SpecError, match=r"study\.db: database is locked"):
                search()
        assert not study.with_name("study.db.damaged").exists()

    def test_a_rebuild_that_was_killed_is_done_again_without_doubles(self, search, monkeypatch):
        work = search(trials=3, prune="none")
        for _ in range(3):
            finish(work, 1.0)
        forget(work)
        told, tell = [], optuna.Study.tell

        def killed(study, *args, **kwargs):
            told.append(args)
            if len(told) == 2:
                raise KeyboardInterrupt
            return tell(study, *args, **kwargs)

        monkeypatch.setattr(optuna.Study, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            search(trials=3, prune="none")
        monkeypatch.setattr(optuna.Study, "tell", tell)
        again = search(trials=3, prune="none")
        assert again.next() is None
        assert states(again) == ["complete"] * 3
        assert [trial.state.name for trial in study_of(again).trials] == ["COMPLETE"] * 3


class TestChangedSpace:
    @pytest.fixture
    def tried(self, search):
        """Two fields and six trials of which all is told by their runs; the settings, best first."""
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=1)
        for number in range(6):
            finish(work, float(number))
        return by_value(work)

    def test_a_narrower_space_keeps_what_lies_in_it(self, search, tried):
        low = sorted(params["regularizer.weight"] for params in tried.values())[2]
        space = {"regularizer.weight": {"log": [low, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=1)
        assert by_value(work) == {
            value: params for value, params in tried.items() if params["regularizer.weight"] >= low
        }
        assert work.counts() == (4, 6)

    def test_a_field_that_is_no_longer_searched_must_stand_at_the_arms_setting(self, search, tried):
        work = search(space={"regularizer.weight": {"log": [0.1, 1.0]}}, trials=6, prune="none", seeds=1)
        kept = {v: {"regularizer.weight": p["regularizer.weight"]} for v, p in tried.items() if p["train.lr"] == 1e-3}
        assert by_value(work) == kept and 0 < len(kept) < 6

    def test_a_choice_more_or_a_field_more_keeps_all(self, search, tried):
        space = {
            "regularizer.weight": {"uniform": [0.05, 2.0]},
            "train.lr": {"choice": [1e-3, 3e-3, 1e-2]},
            "regularizer.temperature": {"uniform": [0.05, 0.5]},
        }
        work = search(space=space, trials=6, prune="none", seeds=1)
        assert by_value(work) == {value: {**params, "regularizer.temperature": 0.1} for value, params in tried.items()}
        assert work.next() is None

    def test_another_length_of_training_is_another_study(self, search, tried):
        spec = {"train": {"steps": 12, "batch_size": 8, "lr": 1e-3}}
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        assert search(space=space, trials=6, seeds=1, spec=spec).counts() == (0, 6)

    def test_more_seeds_give_the_same_settings_the_seeds_that_are_missing(self, search, tried):
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=2)
        tasks = [work.next() for _ in range(6)]
        assert {task.run.seed for task in tasks} == {1}
        assert {task.run.config.regularizer.weight for task in tasks} == {
            p["regularizer.weight"] for p in tried.values()
        }

    def test_the_old_space_finds_its_old_study(self, search, tried):
        search(space={"regularizer.weight": {"log": [0.2, 0.9]}}, trials=1, seeds=1)
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=1)
        assert by_value(work) == tried

    def test_a_field_that_is_searched_inside_a_choice_is_told_from_it(self, search):
        shapes = [{"type": "constant"}, {"type": "cosine"}]
        space = {"regularizer.schedule": {"choice": shapes}, "regularizer.schedule.cutoff_step": {"int": [1, 5]}}
        work = search(space=space, trials=4, prune="none", seeds=1)
        told = {}
        for value in (1.0, 2.0, 3.0):
            finish(work, value)
            told = by_value(work)
        assert {params["regularizer.schedule"]["type"] for params in told.values()} == {"constant", "cosine"}
        forget(work)
        assert by_value(search(space=space, trials=4, prune="none", seeds=1)) == told

    def test_choices_that_are_mappings_are_recognised(self, search):
        encoders = [{"name": "efficientnet_lite0", "image_size": size} for size in (32, 64)]
        space = {"regularizer.encoder": {"choice": encoders}}
        work = search(space=space, trials=2, prune="none", seeds=1, sampler="qmc")
        for _ in range(2):
            if task := work.next():
                finish(work, 1.0, [task])
        tried = [trial.params for trial in trials(work)]
        forget(work)
        again = search(space=space, trials=2, prune="none", seeds=1, sampler="qmc")
        assert {str(trial.params) for trial in trials(again)} == {str(params) for params in tried}
