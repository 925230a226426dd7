"""The space of a search around an arm: drawn field by field, and read back from the specs of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from repa_lab.spec import Arm, SpecError
from repa_lab.spec.expand import value_at
from repa_lab.spec.options import Interval

Settings = dict[str, Any]
_PLAIN = (str, int, float, bool, type(None))


class _MissingError(LookupError):
    """There is no value for a field that is searched."""


@dataclass(frozen=True)
class _Field:
    """A searched field; Optuna stores a choice that is a list or a mapping as text."""

    path: str
    interval: Interval

    @property
    def distribution(self) -> BaseDistribution:
        if self.interval.choice is not None:
            return CategoricalDistribution([self.to_param(choice) for choice in self.interval.choice])
        low, high = self.interval.ends
        if self.interval.int_ is not None:
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log=self.interval.log is not None)

    def suggest(self, trial: optuna.Trial) -> Any:
        kind = self.distribution
        if isinstance(kind, CategoricalDistribution):
            return self.to_setting(trial.suggest_categorical(self.path, kind.choices))
        if isinstance(kind, IntDistribution):
            return trial.suggest_int(self.path, kind.low, kind.high)
        assert isinstance(kind, FloatDistribution)
        return trial.suggest_float(self.path, kind.low, kind.high, log=kind.log)

    def to_param(self, setting: Any) -> Any:
        if self.interval.int_ is not None:
            return int(setting)
        if self.interval.choice is None:
            return float(setting)
        return setting if isinstance(setting, _PLAIN) else json.dumps(setting, sort_keys=True)

    def to_setting(self, param: Any) -> Any:
        choices = self.interval.choice
        return param if choices is None else next((one for one in choices if self.to_param(one) == param), param)


class Space:
    """The searched fields of an arm, in the order of the spec.

    Args:
        arm: the settings that are not searched.
        fields: the searched fields by their dotted paths.
    """

    def __init__(self, arm: Arm, fields: Mapping[str, Interval]) -> None:
        self._arm = arm
        self._own = arm.asked.model_dump(mode="json")
        self._fields = [_Field(path, interval) for path, interval in fields.items()]

    def suggest(self, trial: optuna.Trial) -> Settings:
        """Draw the settings of a trial."""
        return self._walk(lambda field: field.suggest(trial))

    def of_params(self, params: Mapping[str, Any]) -> Settings | None:
        """The settings that Optuna keeps as ``params``; None if some are missing, because a kill came between two of them."""

        def kept(field: _Field) -> Any:
            if field.path not in params:
                raise _MissingError
            return field.to_setting(params[field.path])

        return self._walk_or_none(kept)

    def of_run(self, spec: Mapping[str, Any]) -> Settings | None:
        """The settings with which a run's spec may have been made; None if it lies outside the space.

        Only :func:`identify` can tell that the rest of the spec is the arm's.
        """

        def found(field: _Field) -> Any:
            return self._recover(field, value_at(spec, tuple(field.path.split("."))))

        return self._walk_or_none(found)

    def params(self, settings: Settings) -> dict[str, Any]:
        """Settings as Optuna keeps them."""
        return {field.path: field.to_param(settings[field.path]) for field in self._fields if field.path in settings}

    def arm(self, settings: Settings) -> Arm:
        """The arm with these settings.

        Raises:
            SpecError: they do not go together.
        """
        return self._arm.with_settings(settings) if settings else self._arm

    def _walk(self, draw: Callable[[_Field], Any]) -> Settings:
        settings: Settings = {}
        for field in self._fields:
            if self._is_active(field, settings):
                settings[field.path] = draw(field)
        return settings

    def _walk_or_none(self, draw: Callable[[_Field], Any]) -> Settings | None:
        try:
            return self._walk(draw)
        except _MissingError:
            return None

    def _is_active(self, field: _Field, settings: Settings) -> bool:
        return all(self._value(path, settings) in allowed for path, allowed in field.interval.conditions.items())

    def _value(self, path: str, settings: Settings) -> Any:
        return settings[path] if path in settings else value_at(self._own, tuple(path.split(".")))

    def _recover(self, field: _Field, value: Any) -> Any:
        if field.interval.choice is None:
            if not field.interval.takes(value):
                raise _MissingError
            return field.to_param(value)
        inner = self._inside(field.path)
        for choice in field.interval.choice:
            if value == choice:
                return choice
            if not isinstance(choice, _PLAIN) and _without(value, inner) == _without(
                self._resolved(field.path, choice), inner
            ):
                return choice
        raise _MissingError

    def _inside(self, path: str) -> list[list[str]]:
        """The places within a searched field that are searched for themselves, so that a run may have them as no choice has."""
        fields = (field.path for field in self._fields)
        return [one.removeprefix(f"{path}.").split(".") for one in fields if one.startswith(f"{path}.")]

    def _resolved(self, path: str, choice: Any) -> Any:
        """A list or mapping as the spec of a run holds it, defaults included."""
        try:
            config = self._arm.with_settings({path: choice}).config
        except SpecError:
            return choice
        return value_at(config.model_dump(mode="json"), tuple(path.split(".")))


def _without(value: Any, places: Iterable[Sequence[str]]) -> Any:
    """A mapping but for what stands at some places in it; anything else as it is."""
    for first, *rest in places:
        if isinstance(value, Mapping) and first in value:
            inside = {first: _without(value[first], [rest])} if rest else {}
            value = {**{name: one for name, one in value.items() if name != first}, **inside}
    return value
