"""Check how a search is asked for. Imports no Optuna, so that `plan` answers at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from repa_lab.errors import KeyPath
from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.spec import Arm, Experiment, Problem, RunConfig, SearchConfig, SpecError
from repa_lab.spec.document import names_in, value_at
from repa_lab.spec.identity import identify
from repa_lab.spec.options import Interval
from repa_lab.spec.schema import unknown_field
from repa_lab.training.resolve import metric_name

ArmProblems = Callable[[Arm], Iterable[Problem]]
Fields = Mapping[str, Interval]
STORAGE_VARIABLE = "OPTUNA_STORAGE"
_SPACE: KeyPath = ("search", "space")


def search_problems(experiment: Experiment, arm_problems: ArmProblems) -> Iterator[Problem]:
    """Yield the problems of an experiment's search, each with its place in the spec.

    Args:
        experiment: an experiment with a search.
        arm_problems: returns the problems of an arm, without those of files.
    """
    assert experiment.search
    refused = list(_condition_problems(experiment, experiment.search.space))
    yield from refused
    if not refused:
        yield from _end_problems(experiment, experiment.search.space, arm_problems)
    yield from _objective_problems(experiment, experiment.search)
    yield from _sampler_problems(experiment, experiment.search)
    url = storage_url(experiment.search)
    if url is not None and (message := _storage_problem(url)):
        origin = "" if experiment.search.storage else f"{STORAGE_VARIABLE} in the environment: "
        yield experiment.problem(("search", "storage"), f"{origin}{message}")


def storage_url(search: SearchConfig) -> str | None:
    """Return the URL of a study's database: the spec's, or else Optuna's variable; None is the sweep's own file."""
    return search.storage or os.environ.get(STORAGE_VARIABLE) or None


def objective_path(search: SearchConfig, index: int) -> KeyPath:
    """Return the path of an objective's metric in the spec."""
    several = isinstance(search.objective, tuple)
    return ("search", "objective", index, "metric") if several else ("search", "objective", "metric")


def is_searched(arm: Arm, fields: Fields) -> bool:
    """Return whether a searched field makes a difference to an arm; a weight makes none without a regularizer."""

    def content(arm: Arm) -> str:
        """Return a key that is equal for arms with the same runs; files are compared by their names."""
        return identify(arm.config, 0, PROTOCOL_VERSION, str(arm.config.data), {}).run_id

    own = content(arm)
    for settings in (settings for dotted in fields for settings in _ends(arm, fields, dotted)):
        try:
            if content(arm.with_settings(settings)) != own:
                return True
        except SpecError:
            continue
    return False


def _condition_problems(experiment: Experiment, fields: Fields) -> Iterator[Problem]:
    """Yield the conditions that cannot hold, or that depend on a field that is drawn later."""
    drawn: set[str] = set()
    for dotted, interval in fields.items():
        for path, allowed in interval.conditions.items():
            if message := _condition_problem(experiment, fields, dotted, path, allowed, drawn):
                yield experiment.problem((*_SPACE, dotted, "when", path), message)
        drawn.add(dotted)


def _condition_problem(
    experiment: Experiment, fields: Fields, dotted: str, path: str, allowed: list[Any], drawn: set[str]
) -> str | None:
    if message := unknown_field(RunConfig, path, names_in(experiment.draft.value)):
        return message
    if path == dotted:
        return f"'{dotted}' cannot depend on itself"
    if path in fields and path not in drawn:
        return f"'{path}' is drawn after '{dotted}': put it before, and let it not depend on '{dotted}'"
    if path in fields and any(fields[path].takes(value) for value in allowed):
        return None
    # Where its own condition does not hold, a searched field keeps the arm's setting.
    if path in fields and not fields[path].when:
        return f"the space of '{path}' has none of {allowed}"
    if not any(_own_value(arm, path) in allowed for arm in experiment.arms):
        return f"no arm has '{path}' at any of {allowed}, so '{dotted}' would never be searched"
    return None


def _end_problems(experiment: Experiment, fields: Fields, arm_problems: ArmProblems) -> Iterator[Problem]:
    """Yield the fields of which an arm refuses a choice or an end of the range."""
    for dotted in fields:
        messages = (_end_problem(arm, fields, dotted, arm_problems) for arm in experiment.arms)
        if message := next(filter(None, messages), None):
            yield experiment.problem((*_SPACE, dotted), message)


def _end_problem(arm: Arm, fields: Fields, dotted: str, arm_problems: ArmProblems) -> str | None:
    for settings in _ends(arm, fields, dotted):
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


def _ends(arm: Arm, fields: Fields, dotted: str) -> Iterator[dict[str, Any]]:
    """Yield settings with a field at each choice, or at both ends of its range, under which the field is drawn.

    Yields nothing if the arm's own settings never meet the field's conditions.
    """
    if all(_own_value(arm, path) in allowed for path, allowed in _own_conditions(fields, dotted)):
        needed = _needed(fields, dotted)
        yield from ({**needed, dotted: value} for value in fields[dotted].ends)


def _own_value(arm: Arm, path: str) -> Any:
    return value_at(arm.asked.model_dump(mode="json"), path)


def _needed(fields: Fields, dotted: str) -> dict[str, Any]:
    """Return settings of searched fields under which a field is drawn."""
    settings: dict[str, Any] = {}
    for path, allowed in fields[dotted].conditions.items():
        if path in fields and (fitting := [value for value in allowed if fields[path].takes(value)]):
            settings |= {**_needed(fields, path), path: fitting[0]}
    return settings


def _own_conditions(fields: Fields, dotted: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield the conditions of a field, and of the fields it depends on, that only the arm's own settings can meet."""
    for path, allowed in fields[dotted].conditions.items():
        if path not in fields:
            yield path, allowed
        elif any(fields[path].takes(value) for value in allowed):
            yield from _own_conditions(fields, path)


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
            message = "cmaes takes no choice, only log, uniform and int; use tpe for it"
            yield experiment.problem((*_SPACE, dotted), message)
        if interval.when:
            yield experiment.problem((*_SPACE, dotted, "when"), "cmaes takes no conditions; use tpe for them")


def _storage_problem(url: str) -> str | None:
    """Return why a database cannot be used, without opening it and without the URL, which may hold a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url).get_dialect().import_dbapi()
    except ImportError as error:
        return f"needs another package: {error}"
    except ArgumentError as error:
        known = "not the URL of a database, such as sqlite:///study.db or postgresql://user@host/name"
        return known if "parse" in str(error) else f"{str(error).splitlines()[0]}; such as sqlite:///study.db"
    return None
