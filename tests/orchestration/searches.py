"""Searches whose rows are told by hand: their groups, without any training."""

from repa_lab.orchestration.plan import identify_arm
from repa_lab.orchestration.search.group import Aim
from repa_lab.orchestration.search.study import open_storage, open_study, study_name
from repa_lab.orchestration.search.trials import Search
from repa_lab.orchestration.search.work import SearchWork
from repa_lab.runs import RunsRoot, RunWriter, State
from repa_lab.spec import load_spec

METRIC = "m"
DISTANCE = (Aim(METRIC, "min"),)


def searcher(tiny, folder):
    """Makes a search over the weight, with its study and its runs in a folder."""

    def make(aims=DISTANCE, seeds=(0, 1), begun=frozenset(), spec=None, **changes):
        config = {
            "space": {"regularizer.weight": {"log": [0.1, 1.0]}},
            "trials": 5,
            "prune": "median",
            "sampler": "random",
        }
        experiment = load_spec(tiny(axes={}, search={**config, **changes}, **(spec or {})))
        arm = experiment.arms[0]
        asked = Search(arm, experiment.search, aims, seeds, identify_arm, RunsRoot(folder))
        storage = open_storage(None, folder / "study.db")
        name = study_name("tiny", arm.label, asked.content())
        return SearchWork(asked, open_study(storage, name, experiment.search, aims, arm.config.train.steps), begun)

    return make


def take(work):
    """The tasks of the next group."""
    first = work.next()
    return [first, *(work.next() for _ in range(len(work._search.seeds) - 1))]


def finish(work, value):
    """Hand out a group, let both its runs measure `value` at steps 3 and 6 of 6, and end them."""
    tasks = take(work)
    for step in (3, 6):
        for task in tasks:
            assert not list(work.heard(task.run.run_id, {"step": step, METRIC: value}))
    for task in tasks:
        work.finished(task.run.run_id, State.DONE)
    return tasks


def train(root, task, values, state=State.DONE, error=None, seconds=None, is_diverged=False):
    """Write a run's directory as training does: its rows by step, and how it ended."""
    with RunWriter(root.run(task.run.run_id)) as writer:
        writer.describe(task.run.to_json(), {"time": "2026-01-01T00:00:00Z", "processes": 2})
        for step, value in values.items():
            writer.row({"step": step, METRIC: value, **({"seconds": seconds} if seconds else {})})
        writer.state(state, max(values, default=0), error, is_diverged)


def states(work):
    return [trial.record["state"] for trial in work.trials]


def weights(work):
    return [trial.record["params"]["regularizer.weight"] for trial in work.trials]


def finish_one(work, value):
    """Hand out a run, let it measure `value` at its last step, and end it."""
    finish_as(work, work.next(), value)


def by_value(work):
    return {trial.record["value"]: trial.record["params"] for trial in work.trials}


def finish_as(work, task, value=1.0):
    """Let a run measure `value` at its last step, and end it."""
    list(work.heard(task.run.run_id, {"step": 6, METRIC: value}))
    work.finished(task.run.run_id, State.DONE)


def first_weight(work):
    """The weight of the first trial."""
    return work.next().run.config.regularizer.weight
