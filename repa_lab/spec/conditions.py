"""The conditions of a spec (the rules of ``exclude`` and the baseline): whether they hold, and mistakes in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repa_lab.registry import did_you_mean
from repa_lab.spec.document import Draft, names_in, value_at
from repa_lab.spec.errors import KeyPath, Problem, SpecError
from repa_lab.spec.schema import RunConfig, SpecFile
from repa_lab.spec.validate import unknown_field

if TYPE_CHECKING:
    from repa_lab.spec.experiment import Arm


def holds(condition: Mapping[str, Any], levels: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
    """Return whether every entry of a condition holds for an arm.

    Args:
        condition: an axis to a level, or a dotted path to a value. A list holds if any of its values does; a mapping
            compares only the fields that it names.
        levels: the arm's level on every axis.
        settings: the arm's settings as plain data.
    """

    def entry_holds(key: str, wanted: Any) -> bool:
        value = value_at(settings, key)
        allowed = [wanted, *wanted] if isinstance(wanted, list) else [wanted]
        return (key in levels and levels[key] in allowed) or any(_agrees(value, choice) for choice in allowed)

    return all(entry_holds(key, wanted) for key, wanted in condition.items())


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping) and isinstance(value, Mapping):
        return all(name in value and _agrees(value[name], inner) for name, inner in wanted.items())
    return bool(value == wanted)


def condition_problems(spec: SpecFile, document: Draft, arms: Sequence[Arm]) -> Iterator[Problem]:
    """Yield conditions that would never hold: on fields, levels or values that do not exist.

    Args:
        spec: the spec file.
        document: the spec file with its places.
        arms: the arms; without any, values are not checked.
    """
    axes, names = document.value.get("axes"), names_in(document.value)
    axis_names = axes if isinstance(axes, dict) else {}
    for path, wanted in _conditions(spec):
        key, values = str(path[-1]), wanted if isinstance(wanted, list) else [wanted]
        if isinstance(levels := spec.axes.get(key), dict):
            for value in [value for value in values if value not in list(levels)][:1]:
                hint = did_you_mean(str(value), levels)
                yield document.problem(path, f"no level {value!r}; there are: {', '.join(levels)}{hint}")
        elif unknown := unknown_field(RunConfig, key, names):
            if key not in axis_names:
                yield document.problem(path, unknown + did_you_mean(key, axis_names))
        elif arms and key not in spec.axes:
            arm = next((arm for arm in arms if arm.has(key)), arms[0])  # an arm with another component ignores a field
            for message in (message for value in values for message in _refusals(arm, key, value)):
                yield document.problem(path, message)


def _refusals(arm: Arm, path: str, value: Any) -> Iterator[str]:
    """Yield why a field cannot have a value, such as a misspelt choice."""
    try:
        arm.with_settings({path: value})
    except SpecError as error:
        yield from (problem.message for problem in error.problems if problem.path == path)


def _conditions(spec: SpecFile) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the entries of the rules of ``exclude`` and of the baseline, each with its path."""
    for index, rule in enumerate(spec.exclude):
        yield from ((("exclude", index, key), value) for key, value in rule.items())
    yield from ((("compare", "baseline", key), value) for key, value in spec.compare.baseline.items())
