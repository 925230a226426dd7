"""What differs between two experiments, or between two runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from repa_lab.spec.experiment import Experiment
from repa_lab.spec.explain import dotted, flatten, resolved
from repa_lab.spec.identity import Run


@dataclass(frozen=True)
class Difference:
    """A field with its two values; None where a side has no such field, else a value wrapped in a tuple of one.

    ``arms`` are the labels of the arms it is found in, of those that both sides have; empty where it is found in all.
    """

    path: str
    left: tuple[Any] | None
    right: tuple[Any] | None
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpecDifference:
    """What differs between two experiments: arms that only one of them has, and fields."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    fields: tuple[Difference, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return not (self.removed or self.added or self.fields)


def compare_runs(left: Run, right: Run) -> list[Difference]:
    """The fields in which two runs differ, their seeds among them."""
    return _differences(left.to_json(), right.to_json())


def compare_specs(left: Experiment, right: Experiment) -> SpecDifference:
    """The arms that only one of two experiments has, what differs around the arms, and what differs in those they
    share.

    Where they share none, the settings that stand before anything is varied are compared instead.
    """
    lefts, rights = ({arm.label: arm for arm in one.arms} for one in (left, right))
    shared = [label for label in lefts if label in rights]
    found: dict[Difference, list[str]] = {}
    for label in shared:
        for one in _differences(
            lefts[label].config.model_dump(mode="json"), rights[label].config.model_dump(mode="json")
        ):
            found.setdefault(one, []).append(label)
    inside = [
        Difference(one.path, one.left, one.right, () if len(labels) == len(shared) else tuple(labels))
        for one, labels in found.items()
    ]
    around = _differences(resolved(left), resolved(right))
    if not shared:
        inside = _differences(_base(left), _base(right))
    return SpecDifference(_missing(lefts, rights), _missing(rights, lefts), (*around, *inside))


def _missing(labels: Iterable[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(label for label in labels if label not in known)


def _base(experiment: Experiment) -> dict[str, Any]:
    return {key: experiment.draft.value.get(key, {}) for key in type(experiment.arms[0].config).model_fields}


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    lefts, rights = dict(flatten(left)), dict(flatten(right))
    paths = [path for path in dict.fromkeys([*lefts, *rights]) if _said(lefts, path) != _said(rights, path)]
    return [Difference(dotted(path), _side(lefts, path), _side(rights, path)) for path in paths]


def _said(values: Mapping[Any, Any], path: Any) -> Any:
    """What a side says of a path: no field, a null and an empty section say the same."""
    value = values.get(path)
    return None if value == {} else _frozen(value)


def _side(values: Mapping[Any, Any], path: Any) -> tuple[Any] | None:
    return (_frozen(values[path]),) if path in values else None


def _frozen(value: Any) -> Any:
    """A leaf that can be a key: a list becomes a tuple."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(inner)) for key, inner in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
