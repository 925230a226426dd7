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
        value = value_at(settings, key.split("."))
        allowed = [wanted, *wanted] if isinstance(wanted, list) else [wanted]
        return (key in levels and levels[key] in allowed) or any(_agrees(value, choice) for choice in allowed)

    return all(entry_holds(key, wanted) for key, wanted in condition.items())


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping) and isinstance(value, Mapping):
        return all(name in value and _agrees(value[name], inner) for name, inner in wanted.items())
    return bool(value == wanted)


def unknown_conditions(spec: SpecFile, document: Draft) -> Iterator[Problem]:
    """Yield conditions on fields or levels that do not exist."""
    axes, names = document.value.get("axes"), names_in(document.value)
    axis_names = axes if isinstance(axes, dict) else {}
    for path, wanted in _conditions(spec):
        key, message = str(path[-1]), None
        if isinstance(levels := spec.axes.get(key), dict):
            unknown_levels = [name for name in (wanted if isinstance(wanted, list) else [wanted]) if name not in levels]
            if unknown_levels:
                hint = did_you_mean(str(unknown_levels[0]), levels)
                message = f"no level {unknown_levels[0]!r}; there are: {', '.join(levels)}{hint}"
        elif key not in axis_names and (unknown := unknown_field(RunConfig, key, names)):
            message = unknown + did_you_mean(key, axis_names)
        if message:
            yield document.problem(path, message)


def impossible_conditions(spec: SpecFile, document: Draft, arms: Sequence[Arm]) -> Iterator[Problem]:
    """Yield conditions on values that the field cannot have, such as a misspelt choice: they would never hold."""
    for path, wanted in _conditions(spec) if arms else ():
        key = str(path[-1])
        if key in spec.axes or unknown_field(RunConfig, key, names_in(document.value)):
            continue
        arm = next((arm for arm in arms if arm.has(key)), arms[0])  # an arm with another component ignores the field
        for value in wanted if isinstance(wanted, list) else [wanted]:
            try:
                arm.with_settings({key: value})
            except SpecError as error:
                for problem in error.problems:
                    if problem.path == key:
                        yield document.problem(path, problem.message)


def _conditions(spec: SpecFile) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the entries of the rules of ``exclude`` and of the baseline, each with its path."""
    for index, rule in enumerate(spec.exclude):
        yield from ((("exclude", index, key), value) for key, value in rule.items())
    yield from ((("compare", "baseline", key), value) for key, value in spec.compare.baseline.items())
