"""The searched fields of an arm: checked as they are asked for, drawn by Optuna, read back from the spec of a run.

Imports no Optuna, so that `plan` answers at once.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from repa_lab.errors import KeyPath
from repa_lab.metrics.protocol import PROTOCOL_VERSION
from repa_lab.spec import Arm, Experiment, Problem, RunConfig, SearchConfig, SpecError
from repa_lab.spec.document import names_in, value_at
from repa_lab.spec.identity import identify
from repa_lab.spec.options import Interval
from repa_lab.spec.schema import unknown_field
from repa_lab.training.resolve import metric_name

if TYPE_CHECKING:
    import optuna

Settings = dict[str, Any]
ArmProblems = Callable[[Arm], Iterable[Problem]]
STORAGE_VARIABLE = "OPTUNA_STORAGE"
_PLAIN = (str, int, float, bool, type(None))
_MISSING = object()
_MAX_LISTED = 1000


class Space:
    """The searched fields of an arm, in the order of the spec.

    Args:
        arm: the settings that are not searched.
        fields: the searched fields by their dotted paths.
    """

    def __init__(self, arm: Arm, fields: Mapping[str, Interval]) -> None:
        self._arm, self._fields = arm, fields
        self._asked = arm.asked.model_dump(mode="json")

    def value(self, path: str, settings: Mapping[str, Any] = {}) -> Any:
        """Return the value of a setting, searched or the arm's own."""
        return settings[path] if path in settings else value_at(self._asked, path)

    def arm(self, settings: Settings) -> Arm:
        """Return the arm with these settings.

        Raises:
            SpecError: the settings contradict each other.
        """
        return self._arm.with_settings(settings) if settings else self._arm

    @property
    def is_searched(self) -> bool:
        """Whether a searched field makes a difference to the arm; a weight makes none without a regularizer."""

        def content(arm: Arm) -> str:
            """Return a key that is equal for arms with the same runs; files are compared by their names."""
            return identify(arm.config, 0, PROTOCOL_VERSION, str(arm.config.data), {}).run_id

        for settings in (settings for path in self._fields for settings in self.ends(path)):
            with suppress(SpecError):
                if content(self.arm(settings)) != content(self._arm):
                    return True
        return False

    def ends(self, path: str) -> Iterator[Settings]:
        """Yield settings with a field at each choice, or at both ends of its range, under which the field is drawn.

        Yields nothing if the arm's own settings never meet the field's conditions.
        """
        if (needed := self._needed(path)) is not None:
            yield from ({**needed, path: value} for value in self._fields[path].ends)

    def _needed(self, path: str) -> Settings | None:
        """Return settings of other searched fields under which a field is drawn; None if the arm never allows it."""
        settings: Settings = {}
        for other, allowed in self._fields[path].conditions.items():
            if other not in self._fields:
                if self.value(other) not in allowed:
                    return None
            elif fitting := [value for value in allowed if self._fields[other].takes(value)]:
                if (needed := self._needed(other)) is None:
                    return None
                settings |= {**needed, other: fitting[0]}
        return settings

    def listed(self) -> list[Settings] | None:
        """Return all settings of a finite space; None if there are infinitely many, or more than a thousand."""
        settings: list[Settings] = [{}]
        for path, interval in self._fields.items():
            extended: list[Settings] = []
            for known in settings:
                if not self._applies(interval, known):
                    extended.append(known)
                elif interval.values is None or len(extended) + len(interval.values) > _MAX_LISTED:
                    return None
                else:
                    extended += [known | {path: value} for value in interval.values]
            settings = extended
        return settings

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Return what every field is drawn from, as Optuna's distributions."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for path, interval in self._fields.items():
            first, last = interval.ends[0], interval.ends[-1]
            if interval.choice is not None:
                found[path] = CategoricalDistribution([_to_param(interval, choice) for choice in interval.choice])
            elif interval.int_ is not None:
                found[path] = IntDistribution(first, last)
            else:
                found[path] = FloatDistribution(first, last, log=interval.log is not None)
        return found

    def draw(self, param: Callable[[str], Any]) -> Settings:
        """Draw settings field by field from ``param``, which returns a value of Optuna for a field.

        Fields whose conditions do not hold are left out.
        """
        settings: Settings = {}
        for path, interval in self._fields.items():
            if self._applies(interval, settings):
                stored = param(path)
                choices = (choice for choice in interval.choice or () if _to_param(interval, choice) == stored)
                settings[path] = next(choices, stored)
        return settings

    def suggest(self, trial: optuna.Trial) -> Settings:
        """Return the settings that a trial draws; see :meth:`draw`."""
        distributions: dict[str, Any] = self.distributions()

        def suggested(path: str) -> Any:
            interval, drawn_from = self._fields[path], distributions[path]
            if interval.choice is not None:
                return trial.suggest_categorical(path, drawn_from.choices)
            if interval.int_ is not None:
                return trial.suggest_int(path, drawn_from.low, drawn_from.high)
            return trial.suggest_float(path, drawn_from.low, drawn_from.high, log=drawn_from.log)

        return self.draw(suggested)

    def params(self, settings: Settings) -> dict[str, Any]:
        """Return settings as Optuna stores them; a choice that is a list or a mapping is stored as text."""
        return {path: _to_param(self._fields[path], setting) for path, setting in settings.items()}

    def settings(self, params: Mapping[str, Any]) -> Settings | None:
        """Return the settings that Optuna stores as ``params``; None if fields are missing."""
        settings = self.draw(lambda path: params.get(path, _MISSING))
        return None if any(value is _MISSING for value in settings.values()) else settings

    def candidates(self, spec: Mapping[str, Any]) -> Iterator[Settings]:
        """Yield the settings of the space from which the spec of a run may have been made.

        Only the run's id tells whether the rest of the spec is the arm's, and which list or mapping was chosen, because
        a spec holds them with all defaults.
        """
        options: list[list[Any]] = []
        for path, interval in self._fields.items():
            value = value_at(spec, path)
            if interval.choice is not None:
                fitting = [choice for choice in interval.choice if choice == value or not isinstance(choice, _PLAIN)]
            else:
                fitting = [value] if interval.takes(value) else []
            options.append([_to_param(interval, choice) for choice in fitting] or [_MISSING])
        for params in itertools.product(*options):
            if (settings := self.settings(dict(zip(self._fields, params, strict=True)))) is not None:
                yield settings

    def _applies(self, interval: Interval, settings: Settings) -> bool:
        return all(self.value(other, settings) in allowed for other, allowed in interval.conditions.items())


def _to_param(interval: Interval, setting: Any) -> Any:
    if interval.choice is None:
        return int(setting) if interval.int_ is not None else float(setting)
    return setting if isinstance(setting, _PLAIN) else json.dumps(setting, sort_keys=True)


# ---- what is wrong with how a search is asked for


def search_problems(experiment: Experiment, arm_problems: ArmProblems) -> Iterator[Problem]:
    """Yield the problems of an experiment's search, each with its place in the spec.

    Args:
        experiment: an experiment with a search.
        arm_problems: returns the problems of an arm, without those of files.
    """
    search = experiment.search
    assert search
    spaces, refused = [Space(arm, search.space) for arm in experiment.arms], False
    for dotted, interval in search.space.items():
        for path, allowed in interval.conditions.items():
            if message := _condition_problem(experiment, spaces, search.space, dotted, path, allowed):
                refused = True
                yield experiment.problem(("search", "space", dotted, "when", path), message)
    for dotted in () if refused else search.space:
        messages = (
            _end_problem(arm, space, dotted, arm_problems) for arm, space in zip(experiment.arms, spaces, strict=True)
        )
        if message := next(filter(None, messages), None):
            yield experiment.problem(("search", "space", dotted), message)
    yield from _objective_problems(experiment, search)
    if search.sampler == "cmaes":
        yield from _cmaes_problems(experiment, search)
    url = storage_url(search)
    if url is not None and (message := _storage_problem(url)):
        origin = "" if search.storage else f"{STORAGE_VARIABLE} in the environment: "
        yield experiment.problem(("search", "storage"), f"{origin}{message}")


def storage_url(search: SearchConfig) -> str | None:
    """Return the URL of a study's database: the spec's, or else Optuna's variable; None is the sweep's own file."""
    return search.storage or os.environ.get(STORAGE_VARIABLE) or None


def objective_path(search: SearchConfig, index: int) -> KeyPath:
    """Return the path of an objective's metric in the spec."""
    several = isinstance(search.objective, tuple)
    return ("search", "objective", index, "metric") if several else ("search", "objective", "metric")


def _condition_problem(
    experiment: Experiment,
    spaces: list[Space],
    fields: Mapping[str, Interval],
    dotted: str,
    path: str,
    allowed: list[Any],
) -> str | None:
    """Return why a condition cannot hold, or that it depends on a field that is drawn later."""
    if message := unknown_field(RunConfig, path, names_in(experiment.draft.value)):
        return message
    if path == dotted:
        return f"'{dotted}' cannot depend on itself"
    if path in fields:
        order = list(fields)
        if order.index(path) > order.index(dotted):
            return f"'{path}' is drawn after '{dotted}': put it before, and let it not depend on '{dotted}'"
        if any(fields[path].takes(value) for value in allowed):
            return None
        # Where its own condition does not hold, a searched field keeps the arm's setting.
        if not fields[path].when:
            return f"the space of '{path}' has none of {allowed}"
    if not any(space.value(path) in allowed for space in spaces):
        return f"no arm has '{path}' at any of {allowed}, so '{dotted}' would never be searched"
    return None


def _end_problem(arm: Arm, space: Space, dotted: str, arm_problems: ArmProblems) -> str | None:
    """Return why an arm refuses a choice of a field, or an end of its range."""
    for settings in space.ends(dotted):
        try:
            tried = space.arm(settings)
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


def _cmaes_problems(experiment: Experiment, search: SearchConfig) -> Iterator[Problem]:
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
            yield experiment.problem(("search", "space", dotted), message)
        if interval.when:
            message = "cmaes takes no conditions; use tpe for them"
            yield experiment.problem(("search", "space", dotted, "when"), message)


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
