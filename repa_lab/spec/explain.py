"""Which file set each value of an experiment, and the differences between two experiments or runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from repa_lab.errors import KeyPath, Place, Problem, SpecError, dotted
from repa_lab.registry import did_you_mean
from repa_lab.spec.document import Draft, entries, names_in, paths_in, value_of
from repa_lab.spec.experiment import Experiment
from repa_lab.spec.schema import SECTIONS, RunConfig, SpecFile, unknown_field

DEFAULT = "default"
_RESOLVED = ("base", "use", "axes", "one_at_a_time", "exclude", "include")


@dataclass(frozen=True)
class Setting:
    """One resolved value, as plain data.

    The source is ``file:line:column``, ``default``, or ``--set`` (``<given>`` for a spec from a program). ``arms`` are
    the labels of the arms that have the value; empty if all requested arms have it.
    """

    path: str
    value: Any
    source: str
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A field with different values on two sides; each stands in a tuple of one, and None is a side without the field.

    ``arms`` are the labels of the arms that differ; empty if all common arms do.
    """

    path: str
    left: tuple[Any] | None
    right: tuple[Any] | None
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpecDifference:
    """The differences between two experiments: the arms that only the left or the right side has, and fields."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    fields: tuple[Difference, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return not (self.removed or self.added or self.fields)


def explain(experiment: Experiment, path: str | None = None, arm: str | None = None) -> list[Setting]:
    """Return every resolved value with its source; a value that differs between arms has a row for each variant.

    Args:
        path: a dotted path of a field or a section; None for all.
        arm: the label of one arm; None for all.

    Raises:
        SpecError: there is no such field or arm.
    """
    labels = [candidate.label for candidate in experiment.arms]
    if arm is not None and arm not in labels:
        message = f"no arm '{arm}'; there are: {'; '.join(labels)}{did_you_mean(arm, labels)}"
        raise SpecError([Problem(Place(None), "--arm", message)])
    arms = [candidate for candidate in experiment.arms if arm in (None, candidate.label)]
    draft = experiment.draft
    settings = [
        Setting(dotted(keys), value, _source(draft, draft, keys)) for keys, value in flatten(_outside_arms(experiment))
    ]
    variants: dict[str, dict[tuple[str, str], list[str]]] = {}
    for each in arms:
        for keys, value in flatten(each.config.model_dump(mode="json", by_alias=True)):
            variant = (json.dumps(value), _source(each.draft, draft, keys))
            variants.setdefault(dotted(keys), {}).setdefault(variant, []).append(each.label)
    settings += [
        Setting(name, json.loads(text), source, () if len(having) == len(arms) else tuple(having))
        for name, sources in variants.items()
        for (text, source), having in sources.items()
    ]
    return settings if path is None else _below(settings, path, [draft, *(each.draft for each in arms)])


def compare_specs(left: Experiment, right: Experiment) -> SpecDifference:
    """Return the arms that only one experiment has, and the fields that differ outside and inside the common arms.

    Without a common arm, the sections of the two files are compared.
    """
    left_arms, right_arms = ({arm.label: arm for arm in side.arms} for side in (left, right))
    common = [label for label in left_arms if label in right_arms]
    labels: dict[Difference, list[str]] = {}
    for label in common:
        sides = (arms[label].config.model_dump(mode="json") for arms in (left_arms, right_arms))
        for difference in differences(*sides):
            labels.setdefault(difference, []).append(label)
    inside = [
        replace(difference, arms=() if len(having) == len(common) else tuple(having))
        for difference, having in labels.items()
    ]
    if not common:
        sections = ({key: side.draft.value.get(key, {}) for key in SECTIONS} for side in (left, right))
        inside = differences(*sections)
    return SpecDifference(
        removed=tuple(label for label in left_arms if label not in right_arms),
        added=tuple(label for label in right_arms if label not in left_arms),
        fields=(*differences(_outside_arms(left), _outside_arms(right)), *inside),
    )


def flatten(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the leaves of nested mappings, and of lists of mappings, by path; other lists are leaves."""
    is_leaf = isinstance(value, list) and not all(isinstance(item, Mapping) for item in value)
    inside = {} if is_leaf else entries(value)
    for key, inner in inside.items():
        yield from flatten(inner, (*path, key))
    if not inside:
        yield path, value


def _outside_arms(experiment: Experiment) -> dict[str, Any]:
    """Return the fields outside the arms, defaults included, as plain data."""
    spec = SpecFile.model_validate(experiment.draft.value)
    return spec.model_dump(mode="json", by_alias=True, exclude={*SECTIONS, *_RESOLVED})


def _source(draft: Draft, document: Draft, path: KeyPath) -> str:
    if path[-1] not in entries(value_of(draft.value, path[:-1])):
        return DEFAULT
    place = draft.place(path)
    return "--set" if place.file is None and document.place(()).file is not None else str(place)


def _below(settings: list[Setting], path: str, drafts: list[Draft]) -> list[Setting]:
    """Return the settings at or below a path; for a field inside a null section, the null."""
    top = path.partition(".")[0]
    meant = {dotted(keys) for draft in drafts for keys in paths_in(draft.value, path.split("."))} or {path}
    if top in _RESOLVED:
        message = f"'{top}' is resolved into the rest: ask for a field that it sets"
        raise SpecError([Problem(Place(None), path, message)])
    while True:
        if below := [row for row in settings if any(f"{row.path}.".startswith(f"{known}.") for known in meant)]:
            return below
        names = {name for draft in drafts for name in names_in(draft.value)}
        if unknown := unknown_field(RunConfig if top in SECTIONS else SpecFile, path, names):
            raise SpecError([Problem(Place(None), path, unknown)])
        meant = {known.rpartition(".")[0] for known in meant}


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    """Return the leaves of two settings that differ; a missing field, null and an empty section count as equal."""
    lefts, rights = dict(flatten(left)), dict(flatten(right))
    found = []
    for path in dict.fromkeys([*lefts, *rights]):
        values = [None if side.get(path) == {} else _hashable(side.get(path)) for side in (lefts, rights)]
        if values[0] != values[1]:
            left_side, right_side = ((_hashable(s[path]),) if path in s else None for s in (lefts, rights))
            found.append(Difference(dotted(path), left_side, right_side))
    return found


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _hashable(inner)) for key, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
