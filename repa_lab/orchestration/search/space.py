"""The searched fields of an arm as Optuna's parameters, and settings read back from the spec of a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna

from repa_lab.spec import Arm
from repa_lab.spec.document import value_at
from repa_lab.spec.options import Interval

Settings = dict[str, Any]
_PLAIN = (str, int, float, bool, type(None))
_MISSING = object()


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

    def suggest(self, trial: optuna.Trial) -> Settings:
        """Draw the settings of a trial, field by field; fields whose conditions do not hold are left out."""

        def draw(path: str) -> Any:
            interval = self._fields[path]
            if interval.choice is not None:
                params = [_to_param(interval, choice) for choice in interval.choice]
                return _to_setting(interval, trial.suggest_categorical(path, params))
            low, high = interval.ends
            if interval.int_ is not None:
                return trial.suggest_int(path, low, high)
            return trial.suggest_float(path, low, high, log=interval.log is not None)

        return self._draw(draw)

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
            conditions = interval.conditions.items()
            if all(self._value(other, settings) in allowed for other, allowed in conditions):
                settings[path] = draw(path)
        return settings

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
