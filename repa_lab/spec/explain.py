"""Who set what: every resolved value of an experiment with the place that set it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from repa_lab.spec.document import Draft
from repa_lab.spec.errors import Path_, Place, Problem, SpecError, did_you_mean
from repa_lab.spec.expand import Arm
from repa_lab.spec.experiment import Experiment
from repa_lab.spec.grammar import Grammar
from repa_lab.spec.schema import SECTIONS, RunConfig
from repa_lab.spec.validate import unknown_field

DEFAULT = "default"
_RESOLVED = ("base", "use", "axes", "one_at_a_time", "exclude", "include")


@dataclass(frozen=True)
class Setting:
    """One resolved value.

    Attributes:
        path: its dotted path.
        value: as plain data.
        source: ``file:line:column``, ``default``, or ``--set`` (``<given>`` where the spec came from a program).
        arms: labels of the arms it holds for; empty where it holds for all that were asked for.
    """

    path: str
    value: Any
    source: str
    arms: tuple[str, ...] = ()


def explain(experiment: Experiment, path: str | None = None, arm: str | None = None) -> list[Setting]:
    """Every resolved value and who set it; what differs between arms has a row for each of its values.

    Args:
        experiment: what to explain.
        path: a dotted path of a field or a section; None takes all.
        arm: the label of one arm; None takes all.

    Raises:
        SpecError: there is no such field or arm.
    """
    arms = _chosen(experiment, arm)
    settings = [*_around(experiment), *_varied(experiment, arms)]
    return settings if path is None else _below(settings, path)


def resolved(experiment: Experiment) -> dict[str, Any]:
    """What a spec says outside its arms, defaults included, as plain data."""
    stop = [rule.model_dump(mode="json") for rule in experiment.stop]
    is_single = isinstance(experiment.draft.value.get("stop"), dict)
    sections = {name: getattr(experiment, name) for name in ("search", "compare", "budget", "run", "published")}
    return {
        "name": experiment.name,
        "question": experiment.question,
        "plugins": list(experiment.plugins),
        "seeds": experiment.draft.value.get("seeds", len(experiment.seeds)),
        **{name: value and value.model_dump(mode="json", by_alias=True) for name, value in sections.items()},
        "stop": stop[0] if is_single else stop or None,
    }


def flatten(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """The leaves of nested mappings, and of lists of mappings, by path; other lists are leaves."""
    inside: Mapping[Any, Any] = value if isinstance(value, Mapping) else {}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        inside = dict(enumerate(value))
    for key, inner in inside.items():
        yield from flatten(inner, (*path, key))
    if not inside:
        yield path, value


def dotted(path: Path_) -> str:
    """A path as people write it."""
    return ".".join(map(str, path))


def _chosen(experiment: Experiment, label: str | None) -> list[Arm]:
    labels = [arm.label for arm in experiment.arms]
    if label is None:
        return list(experiment.arms)
    if label not in labels:
        message = f"no arm '{label}'; there are: {'; '.join(labels)}{did_you_mean(label, labels)}"
        raise SpecError([Problem(Place(None), "--arm", message)])
    return [experiment.arms[labels.index(label)]]


def _around(experiment: Experiment) -> Iterator[Setting]:
    for path, value in flatten(resolved(experiment)):
        yield Setting(dotted(path), value, _source(experiment.draft, experiment.draft, path))


def _varied(experiment: Experiment, arms: list[Arm]) -> Iterator[Setting]:
    """The settings of the arms: those that agree on value and source are one."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for arm in arms:
        for path, value in flatten(arm.config.model_dump(mode="json", by_alias=True)):
            key = (json.dumps(value), _source(arm.draft, experiment.draft, path))
            found.setdefault(dotted(path), {}).setdefault(key, []).append(arm.label)
    for path_, ways in found.items():
        for (text, source), labels in ways.items():
            yield Setting(path_, json.loads(text), source, () if len(labels) == len(arms) else tuple(labels))


def _source(draft: Draft, document: Draft, path: Path_) -> str:
    if not _is_given(draft.value, path):
        return DEFAULT
    place = draft.place(path)
    is_of_file = document.place(()).file is not None
    return "--set" if place.file is None and is_of_file else str(place)


def _is_given(value: Any, path: Path_) -> bool:
    for step in path:
        inside = dict(enumerate(value)) if isinstance(value, list) else value
        if not isinstance(inside, Mapping) or step not in inside:
            return False
        value = inside[step]
    return True


def _below(settings: list[Setting], path: str) -> list[Setting]:
    """The settings at a path; of a field inside a value that is null, the null."""
    top, known = path.partition(".")[0], path
    if top in _RESOLVED:
        raise SpecError(
            [Problem(Place(None), path, f"'{top}' is resolved into the rest: ask for a field that it sets")]
        )
    while True:
        if found := [one for one in settings if one.path == known or one.path.startswith(f"{known}.")]:
            return found
        if message := unknown_field(RunConfig if top in SECTIONS else Grammar, path):
            raise SpecError([Problem(Place(None), path, message)])
        known = known.rpartition(".")[0]
