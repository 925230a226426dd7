"""Searches whose runs are written by hand, without any training."""

import optuna

from repa_lab import plan
from repa_lab.orchestration.search.search import SearchWork
from repa_lab.orchestration.search.study import file_url
from repa_lab.runs import RunWriter, State

METRIC = "frechet:efficientnet_lite0@16/ode2"
SPACE = {"regularizer.weight": {"log": [0.1, 1.0]}}


def searcher(tiny, root):
    """Makes the work of a search over the weight, with its study and its runs in a root."""

    def make(seeds=2, spec=None, axes=None, **changes):
        search = {"space": SPACE, "trials": 5, "prune": "median", "sampler": "random", **changes}
        planned = plan(tiny(axes=axes or {}, search=search, seeds=seeds, **(spec or {})), root)
        directory = planned.root.sweep("tiny")
        directory.path.mkdir(parents=True, exist_ok=True)
        return SearchWork(planned, directory)

    return make


def take(work):
    """The tasks of the next trial."""
    return [work.next() for _ in work._plan.experiment.seeds]


def directory_of(work, task):
    return work._plan.root.run(task.run.run_id)


def measure(work, task, step, value, **more):
    """Let a run write a row; the runs that are to be pruned for it."""
    with RunWriter(directory_of(work, task)) as writer:
        writer.describe(task.run.to_json(), {"time": "2026-01-01T00:00:00Z", "processes": 2})
        row = {"step": step, METRIC: value, **more}
        writer.row(row)
    return list(work.heard(task.run.run_id, row))


def end(work, task, state=State.DONE, error=None, is_diverged=False):
    """Let a run end."""
    record(work, task, state, error, is_diverged)
    work.finished(task.run.run_id, state)


def record(work, task, state=State.DONE, error=None, is_diverged=False):
    """Let a run end while no scheduler looks."""
    with RunWriter(directory_of(work, task)) as writer:
        writer.describe(task.run.to_json(), {"time": "2026-01-01T00:00:00Z", "processes": 2})
        writer.state(state, 6, error, is_diverged)


def train(work, task, values, state=State.DONE, error=None, is_diverged=False):
    """Write a run while no scheduler looks: its values by step, and how it ended."""
    for step, value in values.items():
        with RunWriter(directory_of(work, task)) as writer:
            writer.describe(task.run.to_json(), {"time": "2026-01-01T00:00:00Z"})
            writer.row({"step": step, METRIC: value})
    record(work, task, state, error, is_diverged)


def finish(work, value, tasks=None):
    """Let all runs of the next trial measure ``value`` at steps 3 and 6 of 6, and end."""
    tasks = tasks or take(work)
    for step in (3, 6):
        for task in tasks:
            measure(work, task, step, value)
    for task in tasks:
        end(work, task)
    return tasks


def trials(work):
    """The trials as the sweep's manifest has them."""
    return work._directory.manifest.search.trials


def states(work):
    return [trial.state for trial in trials(work)]


def weights(work):
    return [trial.params["regularizer.weight"] for trial in trials(work)]


def by_value(work):
    return {trial.value: trial.params for trial in trials(work)}


def study_of(work):
    """The only study of the sweep, as Optuna reads it."""
    return optuna.load_study(study_name=None, storage=file_url(work._directory.study))


def forget(work):
    """Delete the sweep's database."""
    work._directory.study.unlink()
