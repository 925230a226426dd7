"""What is wrong with how a search is asked for; imports no Optuna, so that `plan` answers at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from repa_lab.orchestration.search.reach import Space, ends, own_value
from repa_lab.spec import Arm, Experiment, Problem, RunConfig, SearchConfig, SpecError
from repa_lab.spec.errors import KeyPath
from repa_lab.spec.validate import unknown_field
from repa_lab.training.resolve import metric_name

ArmProblems = Callable[[Arm], Iterable[Problem]]
_SPACE: KeyPath = ("search", "space")


def search_problems(experiment: Experiment, arm_problems: ArmProblems) -> Iterator[Problem]:
    """Problems of an experiment's search, each at its place in the spec.

    Args:
        experiment: one with a search.
        arm_problems: what is wrong with an arm, files apart.
    """
    assert experiment.search
    refused = list(_condition_problems(experiment, experiment.search.space))
    yield from refused
    if not refused:
        yield from _end_problems(experiment, experiment.search.space, arm_problems)
    yield from _objective_problems(experiment, experiment.search)
    yield from _sampler_problems(experiment, experiment.search)
    if experiment.search.storage is not None and (message := _storage_problem(experiment.search.storage)):
        yield experiment.problem(("search", "storage"), message)


def objective_path(search: SearchConfig, index: int) -> KeyPath:
    """Where the metric of an objective stands."""
    several = isinstance(search.objective, tuple)
    return ("search", "objective", index, "metric") if several else ("search", "objective", "metric")


def _condition_problems(experiment: Experiment, space: Space) -> Iterator[Problem]:
    """A condition speaks of a field that is drawn before, or of the arms' own settings, and can hold."""
    drawn: set[str] = set()
    for dotted, interval in space.items():
        for path, allowed in interval.conditions.items():
            if message := _condition_problem(experiment, dotted, path, allowed, drawn):
                yield experiment.problem((*_SPACE, dotted, "when", path), message)
        drawn.add(dotted)


def _condition_problem(
    experiment: Experiment, dotted: str, path: str, allowed: list[Any], drawn: set[str]
) -> str | None:
    assert experiment.search
    space = experiment.search.space
    if message := unknown_field(RunConfig, path):
        return message
    if path == dotted:
        return f"'{dotted}' cannot depend on itself"
    if path in space and path not in drawn:
        return f"'{path}' is drawn after '{dotted}': put it before, and let it not depend on '{dotted}'"
    if path in space and any(space[path].takes(value) for value in allowed):
        return None
    # A field that is searched under a condition keeps the arm's own setting elsewhere.
    if path in space and not space[path].when:
        return f"the space of '{path}' has none of {allowed}"
    if not any(own_value(arm, path) in allowed for arm in experiment.arms):
        return f"no arm has '{path}' at any of {allowed}, so '{dotted}' would never be searched"
    return None


def _end_problems(experiment: Experiment, space: Space, arm_problems: ArmProblems) -> Iterator[Problem]:
    """Every searched field must exist and take its choices, or the ends of its range, in every arm that searches it."""
    for dotted in space:
        found = (_end_problem(arm, space, dotted, arm_problems) for arm in experiment.arms)
        if message := next((one for one in found if one), None):
            yield experiment.problem((*_SPACE, dotted), message)


def _end_problem(arm: Arm, space: Space, dotted: str, arm_problems: ArmProblems) -> str | None:
    for settings in ends(arm, space, dotted):
        try:
            tried = arm.with_settings(settings)
        except SpecError as error:
            return error.problems[0].message
        if metric_name(tried.config) != metric_name(arm.config):
            return f"changes how {metric_name(arm.config)} is measured, so that trials could not be compared"
        known = {problem.message for problem in arm_problems(arm)}
        if new := [problem for problem in arm_problems(tried) if problem.message not in known]:
            return f"at {settings[dotted]}: {new[0].path}: {new[0].message}"
    return None


def _objective_problems(experiment: Experiment, search: SearchConfig) -> Iterator[Problem]:
    names = [objective.metric for objective in search.objectives]
    measured = [index for index, objective in enumerate(search.objectives) if not objective.is_cost]
    if not measured:
        message = f"{names[0]} is a cost, and something has to be measured for it: add an objective such as frechet"
        yield experiment.problem(objective_path(search, 0), message)
    if len(measured) > 1:  # a run measures one Frechet distance
        message = f"'{names[measured[0]]}' is measured already: the other objectives are costs, seconds or gpu_hours"
        yield experiment.problem(objective_path(search, measured[1]), message)
    for index, name in enumerate(names):
        if name in names[:index] and index not in measured:
            yield experiment.problem(objective_path(search, index), f"'{name}' is an objective already")
    if len(names) > 1 and search.prune != "none":
        message = f"trials with several objectives cannot be pruned: use none, not {search.prune}"
        yield experiment.problem(("search", "prune"), message)


def _sampler_problems(experiment: Experiment, search: SearchConfig) -> Iterator[Problem]:
    if search.sampler != "cmaes":
        return
    place = ("search", "sampler")
    if importlib.util.find_spec("cmaes") is None:
        yield experiment.problem(place, "cmaes needs the package cmaes: pip install cmaes, or use tpe, random or qmc")
    if len(search.objectives) > 1:
        yield experiment.problem(place, "cmaes takes one objective: use tpe for several")
    if len(search.space) == 1:
        yield experiment.problem(place, "cmaes needs two or more fields: use tpe for one")
    for dotted, interval in search.space.items():
        if interval.choice is not None:
            yield experiment.problem(
                (*_SPACE, dotted), "cmaes takes no choice, only log, uniform and int; use tpe for it"
            )
        if interval.when:
            yield experiment.problem((*_SPACE, dotted, "when"), "cmaes takes no conditions; use tpe for them")


def _storage_problem(url: str) -> str | None:
    """What can be told of a database without opening it; the URL is not repeated, for it may hold a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except ImportError as error:
        return f"needs another package: {error}"
    except ArgumentError as error:
        known = "not the URL of a database, such as sqlite:///study.db or postgresql://user@host/name"
        return known if "parse" in str(error) else f"{str(error).splitlines()[0]}; such as sqlite:///study.db"
    return None
