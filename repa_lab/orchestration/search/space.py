"""The searched fields of an arm as Optuna's parameters, and settings read back from the spec of a run.

Imports no Optuna, so that `plan` answers at once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from repa_lab.spec import Arm
from repa_lab.spec.document import value_at
from repa_lab.spec.options import Interval

if TYPE_CHECKING:
    import optuna

Settings = dict[str, Any]
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

    def arm(self, settings: Settings) -> Arm:
        """Return the arm with these settings.

        Raises:
            SpecError: the settings contradict each other.
        """
        return self._arm.with_settings(settings) if settings else self._arm

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
            if interval.choice is not None:
                found[path] = CategoricalDistribution([_to_param(interval, choice) for choice in interval.choice])
                continue
            low, high = interval.ends
            if interval.int_ is not None:
                found[path] = IntDistribution(low, high)
            else:
                found[path] = FloatDistribution(low, high, log=interval.log is not None)
        return found

    def draw(self, param: Callable[[str], Any]) -> Settings:
        """Draw settings field by field; fields whose conditions do not hold are left out.

        Args:
            param: returns a value of Optuna for a field.
        """
        return self._draw(lambda path: _to_setting(self._fields[path], param(path)))

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
        stored = {
            path: _to_setting(self._fields[path], param) for path, param in params.items() if path in self._fields
        }
        return self._complete(stored)

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
                fitting = [_to_param(interval, value)] if interval.takes(value) else []
            options.append(fitting or [_MISSING])
        for values in itertools.product(*options):
            if (settings := self._complete(dict(zip(self._fields, values, strict=True)))) is not None:
                yield settings

    def _draw(self, draw: Callable[[str], Any]) -> Settings:
        settings: Settings = {}
        for path, interval in self._fields.items():
            if self._applies(interval, settings):
                settings[path] = draw(path)
        return settings

    def _applies(self, interval: Interval, settings: Settings) -> bool:
        return all(self._value(other, settings) in allowed for other, allowed in interval.conditions.items())

    def _complete(self, values: Mapping[str, Any]) -> Settings | None:
        settings = self._draw(lambda path: values.get(path, _MISSING))
        return None if any(value is _MISSING for value in settings.values()) else settings

    def _value(self, path: str, settings: Settings) -> Any:
        return settings[path] if path in settings else value_at(self._asked, path)


def _to_param(interval: Interval, setting: Any) -> Any:
    if interval.choice is None:
        return int(setting) if interval.int_ is not None else float(setting)
    return setting if isinstance(setting, _PLAIN) else json.dumps(setting, sort_keys=True)


def _to_setting(interval: Interval, param: Any) -> Any:
    return next((choice for choice in interval.choice or () if _to_param(interval, choice) == param), param)
