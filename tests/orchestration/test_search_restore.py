"""Studies that were lost or whose space has changed: run directories tell what was tried."""

import sqlite3
from contextlib import closing

import optuna
import pytest

from repa_lab.orchestration.search.study import StorageError
from repa_lab.runs import RunsRoot, RunWriter, State
from tests.orchestration.searches import METRIC, by_value, finish_as, searcher, states, take, train, weights


@pytest.fixture
def search(tiny, tmp_path):
    return searcher(tiny, tmp_path)


class TestLostStudy:
    def test_a_run_whose_provenance_is_damaged_counts_all_the_same(self, search, tmp_path):
        root, work = RunsRoot(tmp_path), search(trials=2, prune="none")
        tasks = take(work)
        for task, value in zip(tasks, (1.0, 3.0), strict=True):
            train(root, task, {3: 9.0, 6: value})
        (root.run(tasks[0].run.run_id).path / "provenance.json").write_text("{")
        (tmp_path / "study.db").unlink()
        again = search(trials=2, prune="none")
        assert [trial.record["value"] for trial in again.trials] == [2.0]

    def test_every_kind_of_trial_is_restored_and_what_was_begun_goes_on(self, search, tmp_path):
        root = RunsRoot(tmp_path)
        work = search(trials=5, prune="none")
        groups = [take(work) for _ in range(4)]
        for task, value in zip(groups[0], (1.0, 3.0), strict=True):
            train(root, task, {3: 9.0, 6: value})
        for task in groups[1]:
            train(root, task, {3: 7.0}, State.PRUNED)
        train(root, groups[2][0], {}, State.FAILED, "DivergedError: the loss is nan at step 1", is_diverged=True)
        train(root, groups[3][0], {6: 4.0})
        train(root, groups[3][1], {3: 4.0}, State.INTERRUPTED)
        drawn = weights(work)
        (tmp_path / "study.db").unlink()
        again = search(trials=5, prune="none")
        assert {trial.record["state"]: trial.record["params"]["regularizer.weight"] for trial in again.trials} == dict(
            zip(["complete", "pruned", "diverged", "waiting"], drawn, strict=True)
        )
        assert [trial.record["value"] for trial in again.trials if trial.record["state"] == "complete"] == [2.0]
        assert again.study.trials[0].intermediate_values in ({3: 9.0, 6: 2.0}, {3: 7.0}, {})
        assert again.counts() == (6, 10)
        # Of the begun group only what is left is handed out, and its other seed is not forgotten.
        task = again.next()
        assert task.run.run_id == groups[3][1].run.run_id
        list(again.heard(task.run.run_id, {"step": 6, METRIC: 8.0}))
        again.finished(task.run.run_id, State.DONE)
        assert by_value(again)[6.0] == {"regularizer.weight": drawn[3]}
        assert len(take(again)) == 2  # the fifth is new
        assert len(set(weights(again))) == 5

    def test_a_failure_is_tried_again(self, search, tmp_path):
        work = search(trials=1)
        tasks = take(work)
        train(RunsRoot(tmp_path), tasks[0], {6: 1.0})
        train(RunsRoot(tmp_path), tasks[1], {3: 1.0}, State.FAILED, "the worker died (signal 9)")
        (tmp_path / "study.db").unlink()
        assert search(trials=1).next().run.run_id == tasks[1].run.run_id

    def test_a_run_that_another_sweep_has_in_hand_is_left_alone(self, search, tmp_path):
        work = search(trials=1)
        tasks = take(work)
        train(RunsRoot(tmp_path), tasks[0], {3: 1.0}, State.RUNNING)
        (tmp_path / "study.db").unlink()
        mine = search(trials=1, begun={tasks[0].run.run_id}, seed=5)
        assert states(mine) == ["waiting"]
        (tmp_path / "study.db").unlink()
        with RunWriter(RunsRoot(tmp_path).run(tasks[0].run.run_id)):
            assert states(search(trials=1, seed=5)) == []
        (tmp_path / "study.db").unlink()
        assert states(search(trials=1, seed=5)) == ["waiting"]  # that sweep was killed

    def test_a_study_that_cannot_be_read_is_put_aside_and_rebuilt(self, search, tmp_path):
        work = search(trials=1)
        for task in take(work):
            train(RunsRoot(tmp_path), task, {6: 1.0})
        (tmp_path / "study.db").write_bytes(b"this is no database" * 1000)
        again = search(trials=1)
        assert states(again) == ["complete"] and again.next() is None
        assert (tmp_path / "study.db.damaged").read_bytes().startswith(b"this is no")

    def test_a_study_that_somebody_else_holds_is_not_taken_for_a_damaged_one(self, search, tmp_path, monkeypatch):
        monkeypatch.setattr("repa_lab.orchestration.search.study._SQLITE", {"connect_args": {"timeout": 0.1}})
        with closing(sqlite3.connect(tmp_path / "study.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StorageError, match=r"study\.db: database is locked"):
                search()
        assert not (tmp_path / "study.db.damaged").exists()

    def test_a_rebuild_that_was_killed_is_done_again_without_doubles(self, search, tmp_path, monkeypatch):
        work = search(trials=3, prune="none")
        for _ in range(3):
            for task in take(work):
                train(RunsRoot(tmp_path), task, {6: 1.0})
        (tmp_path / "study.db").unlink()
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
        finished = [trial for trial in again.study.trials if trial.state.name == "COMPLETE"]
        assert len(finished) == len({trial.params["regularizer.weight"] for trial in finished}) == 3


class TestChangedSpace:
    @pytest.fixture
    def tried(self, search, tmp_path):
        """Two fields and six trials of which all is told by their runs; the settings, best first."""
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=(0,))
        for number in range(6):
            task = work.next()
            train(RunsRoot(tmp_path), task, {6: float(number)})
            list(work.heard(task.run.run_id, {"step": 6, METRIC: float(number)}))
            work.finished(task.run.run_id, State.DONE)
        return by_value(work)

    def test_a_narrower_space_keeps_what_lies_in_it(self, search, tried):
        low = sorted(params["regularizer.weight"] for params in tried.values())[2]
        space = {"regularizer.weight": {"log": [low, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=(0,))
        assert by_value(work) == {
            value: params for value, params in tried.items() if params["regularizer.weight"] >= low
        }
        assert work.counts() == (4, 6)

    def test_a_field_that_is_no_longer_searched_must_stand_at_the_arms_setting(self, search, tried):
        work = search(space={"regularizer.weight": {"log": [0.1, 1.0]}}, trials=6, prune="none", seeds=(0,))
        kept = {v: {"regularizer.weight": p["regularizer.weight"]} for v, p in tried.items() if p["train.lr"] == 1e-3}
        assert by_value(work) == kept and 0 < len(kept) < 6

    def test_a_choice_more_or_a_field_more_keeps_all(self, search, tried):
        space = {
            "regularizer.weight": {"uniform": [0.05, 2.0]},
            "train.lr": {"choice": [1e-3, 3e-3, 1e-2]},
            "regularizer.temperature": {"uniform": [0.05, 0.5]},
        }
        work = search(space=space, trials=6, prune="none", seeds=(0,))
        assert by_value(work) == {value: {**params, "regularizer.temperature": 0.1} for value, params in tried.items()}
        assert work.next() is None

    def test_another_length_of_training_is_another_study(self, search, tried):
        spec = {"train": {"steps": 12, "batch_size": 8, "lr": 1e-3}}
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        assert search(space=space, trials=6, seeds=(0,), spec=spec).counts() == (0, 6)

    def test_more_seeds_give_the_same_settings_the_seeds_that_are_missing(self, search, tried, tmp_path):
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        begun = {run.run_id for run in RunsRoot(tmp_path).runs()}
        work = search(space=space, trials=6, prune="none", seeds=(0, 1), begun=begun)
        tasks = [work.next() for _ in range(6)]
        assert {task.run.seed for task in tasks} == {1}
        assert {task.run.config.regularizer.weight for task in tasks} == {
            p["regularizer.weight"] for p in tried.values()
        }

    def test_the_old_space_finds_its_old_study(self, search, tried):
        search(space={"regularizer.weight": {"log": [0.2, 0.9]}}, trials=1, seeds=(0,))
        space = {"regularizer.weight": {"log": [0.1, 1.0]}, "train.lr": {"choice": [1e-3, 1e-2]}}
        work = search(space=space, trials=6, prune="none", seeds=(0,))
        assert len(work.study.trials) == 6 and by_value(work) == tried

    def test_a_field_that_is_searched_inside_a_choice_is_told_from_it(self, search, tmp_path):
        shapes = [{"type": "constant"}, {"type": "cosine"}]
        space = {"regularizer.schedule": {"choice": shapes}, "regularizer.schedule.cutoff_step": {"int": [1, 5]}}
        work = search(space=space, trials=4, prune="none", seeds=(0,))
        told = {}
        for value in (1.0, 2.0, 3.0):
            task = work.next()
            train(RunsRoot(tmp_path), task, {6: value})
            finish_as(work, task, value)
            told = by_value(work)
        assert {params["regularizer.schedule"]["type"] for params in told.values()} == {"constant", "cosine"}
        (tmp_path / "study.db").unlink()
        assert by_value(search(space=space, trials=4, prune="none", seeds=(0,))) == told

    def test_choices_that_are_mappings_are_recognised(self, search, tmp_path):
        encoders = [{"name": "efficientnet_lite0", "image_size": size} for size in (32, 64)]
        space = {"regularizer.encoder": {"choice": encoders}}
        work = search(space=space, trials=2, prune="none", seeds=(0,), sampler="qmc")
        for _ in range(2):
            if task := work.next():
                train(RunsRoot(tmp_path), task, {6: 1.0})
                finish_as(work, task)
        tried = [trial.record["params"] for trial in work.trials]
        (tmp_path / "study.db").unlink()
        again = search(space=space, trials=2, prune="none", seeds=(0,), sampler="qmc")
        assert {str(trial.record["params"]) for trial in again.trials} == {str(params) for params in tried}
