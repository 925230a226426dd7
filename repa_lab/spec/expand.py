"""From one document to arms: products of axes, stars around the base settings, exclusions and named extra arms."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from repa_lab.spec.component import COMPONENTS
from repa_lab.spec.document import Draft
from repa_lab.spec.errors import Path_, Place, Problem, SpecError, did_you_mean
from repa_lab.spec.grammar import Grammar
from repa_lab.spec.ranges import RangeConfig
from repa_lab.spec.schema import SECTIONS, RunConfig
from repa_lab.spec.validate import validate

_MAX_ARMS = 10_000
_MAX_TOLD = 5  # at one place
_BREAKS = ("Cc", "Zl", "Zp")  # control characters and separators of lines, as Unicode has them


@dataclass(frozen=True)
class Arm:
    """One setting of the varied fields.

    Attributes:
        label: what tells the arm apart from the others, for people.
        levels: its level on every axis, by the axis' name.
        config: the resolved settings, common to all its seeds.
        draft: the same settings with their places, for errors that are found later; fields of other components
            included, for trials that change the component.
    """

    label: str
    levels: Mapping[str, str]
    config: RunConfig
    draft: Draft = field(compare=False, repr=False)

    @property
    def asked(self) -> RunConfig:
        """The settings that comparisons speak of."""
        return self.config

    def has(self, dotted: str) -> bool:
        """Return whether the settings have a field at a dotted path; a section's fields depend on its component."""
        *sections, name = dotted.split(".")
        section = value_at(self.config.model_dump(), tuple(sections))
        return isinstance(section, Mapping) and name in section

    def problem(self, dotted: str, message: str) -> Problem:
        """A problem with one of the arm's settings, at the place that set it."""
        path = tuple(int(step) if step.isdecimal() else step for step in dotted.split("."))
        return Problem(self.draft.place(path), dotted, message)

    def with_settings(self, settings: Mapping[str, Any]) -> Arm:
        """The same arm with some dotted paths set, as a search does."""
        draft = self.draft.copy()
        for dotted, value in settings.items():
            draft.set(dotted, value, Place(None))
        own = [self.label] if self.levels else []
        names = _short_names(settings)
        label = ", ".join(own + [f"{names[path]}={_brief(value)}" for path, value in settings.items()])
        return Arm(label, self.levels, config_of(draft), draft)


@dataclass(frozen=True)
class _Level:
    """One level of an axis, a star or an extra arm: its settings by dotted path, each with its place."""

    axis: str
    name: str
    settings: Mapping[str, tuple[Any, Place]]
    place: Place


_Cell = tuple[_Level, ...]
_Named = Mapping[str, Iterable[str]]


def expand(grammar: Grammar, document: Draft) -> tuple[Arm, ...]:
    """The arms of a document in the order of declaration: the product of the axes, the stars, then the included arms.

    Raises:
        SpecError: with every problem of every arm.
    """
    base = Draft({key: document.value[key] for key in SECTIONS if key in document.value}, dict(document.places))
    axes = _axes(grammar, document)
    extra: list[_Cell] = [(level,) for level in [*_stars(grammar, document), *_included(grammar, document)]]
    if (count := math.prod(map(len, axes)) + len(extra)) > _MAX_ARMS:
        key = "axes" if axes else "one_at_a_time"
        raise SpecError([Problem(document.place((key,)), key, f"{count:,} arms; at most {_MAX_ARMS:,}")])
    named = _named(grammar, base, [*itertools.chain.from_iterable(axes), *(level for (level,) in extra)])
    cells: list[_Cell] = [
        cell for cell in itertools.product(*axes) if not _excluded(cell, base, named, grammar.exclude)
    ]
    levels = [level for levels in axes for level in levels] + [level for (level,) in extra]
    problems = [problem for levels in axes for problem in _repeated([(level,) for level in levels])]
    if not cells + extra:
        problems.append(Problem(document.place(("exclude",)), "exclude", "every arm is excluded"))
    return _build(base, cells + extra, named, [*_broken(levels), *(problems or _repeated(cells + extra))])


def _build(base: Draft, cells: list[_Cell], named: _Named, problems: list[Problem]) -> tuple[Arm, ...]:
    arms: list[Arm] = []
    for cell in cells:
        try:
            draft = _apply(base, cell)
            arms.append(Arm(_label(cell), {level.axis: level.name for level in cell}, config_of(draft, named), draft))
        except SpecError as error:
            problems = problems + error.problems
    if problems:
        raise SpecError(_gathered(problems))
    return tuple(arms)


def _named(grammar: Grammar, base: Draft, levels: Iterable[_Level]) -> _Named:
    """Return the components that the arms name or a search tries, by the section that has their fields."""
    drafts = [base.value, *(_nested(level.settings) for level in levels)]
    space = grammar.search.space if grammar.search else {}
    found: dict[str, set[str]] = {}
    for section, mark in COMPONENTS.items():
        tried = space.get(f"{section}.{mark.key}")
        names = [*(value_at(draft, (section, mark.key)) for draft in drafts), *((tried and tried.choice) or ())]
        found[section] = {name for name in names if isinstance(name, str)}
    return found


def config_of(draft: Draft, named: _Named | None = None) -> RunConfig:
    """Return an arm's settings without the fields that only other components have, for the arms of a sweep share one
    base.

    Args:
        draft: the arm.
        named: the components of the sweep, whose fields are ignored; None ignores those of all. The regularizer
            ``none`` ignores the fields of every other, so that any arm can be turned off.

    Raises:
        SpecError: with every problem.
    """
    draft = draft.copy()
    for name, mark in COMPONENTS.items():
        section = draft.value.get(name)
        if not isinstance(section, dict) or mark.key not in section or (own := mark.settings_of(section)) is None:
            continue
        chosen = section[mark.key]
        others = mark.registry.names if named is None or chosen == "none" else named[name]
        found = (mark.settings_of({mark.key: other}) for other in others)
        foreign = {known for other in found if other for known in settable(other)} - set(settable(own))
        for dropped in foreign & section.keys():
            del section[dropped]
    return validate(RunConfig, draft)


def settable(settings: type[BaseModel]) -> tuple[str, ...]:
    """Return the fields of a section that a spec may set."""
    return tuple(name for name, field in settings.model_fields.items() if not field.exclude)


def _gathered(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems, but where a range has many wrong values at its one place, the first of them and how many more there are."""
    groups: dict[tuple[Place, str], list[Problem]] = {}
    for problem in dict.fromkeys(problems):
        groups.setdefault((problem.place, problem.path), []).append(problem)
    for group in groups.values():
        if len(group) <= _MAX_TOLD:
            yield from group
        else:
            yield replace(group[0], message=f"{group[0].message}; and {len(group) - 1:,} more of the kind here")


def _label(cell: _Cell) -> str:
    return ", ".join(level.name for level in cell) or "all"


def _broken(levels: Iterable[_Level]) -> Iterator[Problem]:
    """Names that do not fit on a line, which would take what is printed of their arms apart."""
    for level in levels:
        if any(unicodedata.category(character) in _BREAKS for character in level.name):
            yield Problem(level.place, level.axis, f"an arm is called by one line of text, got {level.name!r}")


def _repeated(cells: Iterable[_Cell]) -> Iterator[Problem]:
    """What cannot be told apart, at the place of the latter of the two."""
    seen: set[str] = set()
    for cell in cells:
        if (label := _label(cell)) in seen:
            yield Problem(cell[-1].place, cell[-1].axis, f"two arms are called '{label}'")
        seen.add(label)


def _apply(base: Draft, cell: _Cell) -> Draft:
    draft = base.copy()
    for level in cell:
        for dotted, (value, place) in level.settings.items():
            if dotted.split(".")[0] not in SECTIONS:
                hint = did_you_mean(dotted.split(".")[0], SECTIONS)
                message = f"an arm varies fields of {', '.join(SECTIONS)}, got '{dotted}'{hint}"
                raise SpecError([Problem(place, dotted, message)])
            draft.set(dotted, value, place)
    return draft


def _axes(grammar: Grammar, document: Draft) -> list[list[_Level]]:
    return [
        [_level(axis, name, value or {}, document, ("axes", axis, name)) for name, value in levels.items()]
        if isinstance(levels, dict)
        else _listed(axis, levels, document, "axes", _names(grammar)[axis])
        for axis, levels in grammar.axes.items()
    ]


def _level(axis: str, name: str, settings: Mapping[str, Any], document: Draft, path: Path_) -> _Level:
    placed = {dotted: (value, document.place((*path, dotted))) for dotted, value in settings.items()}
    return _Level(axis, name, placed, document.place(path))


def _listed(axis: str, values: list[Any] | RangeConfig, document: Draft, key: str, called: str) -> list[_Level]:
    levels = []
    form = values.form if isinstance(values, RangeConfig) else None
    for index, value in enumerate(values.values if isinstance(values, RangeConfig) else values):
        place = document.place((key, axis, form or index))
        levels.append(_Level(axis, f"{called}={_plain(value)}", {axis: (value, place)}, place))
    return levels


def _stars(grammar: Grammar, document: Draft) -> list[_Level]:
    names = _names(grammar)
    listed = (
        _listed(axis, values, document, "one_at_a_time", names[axis]) for axis, values in grammar.one_at_a_time.items()
    )
    return [level for levels in listed for level in levels]


def _included(grammar: Grammar, document: Draft) -> list[_Level]:
    return [
        _level("include", extra.label, extra.set, document, ("include", index, "set"))
        for index, extra in enumerate(grammar.include)
    ]


def _excluded(cell: _Cell, base: Draft, named: _Named, rules: list[dict[str, Any]]) -> bool:
    """Whether a rule fits."""
    if not rules:
        return False
    levels, settings = {level.axis: level.name for level in cell}, _resolved(base, cell, named)
    return any(holds(rule, levels, settings) for rule in rules)


def _resolved(base: Draft, cell: _Cell, named: _Named) -> Mapping[str, Any]:
    """The settings of a cell, defaults included; of one that is not valid, what is given: its problems are told elsewhere."""
    settings: Mapping[str, Any] = {}
    try:
        settings = (draft := _apply(base, cell)).value
        settings = config_of(draft, named).model_dump(mode="json")  # a list as the file has it
    except SpecError:
        pass
    return settings


def holds(condition: Mapping[str, Any], levels: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
    """Whether all entries of a condition hold of an arm's levels and its resolved settings.

    An entry names an axis and a level, or a dotted path and a value; a list means any of what it holds, and a mapping
    speaks of the fields that it names.
    """

    def is_so(key: str, wanted: Any) -> bool:
        value = value_at(settings, tuple(key.split(".")))
        allowed = [wanted, *wanted] if isinstance(wanted, list) else [wanted]
        return (key in levels and levels[key] in allowed) or any(_agrees(value, one) for one in allowed)

    return all(is_so(key, wanted) for key, wanted in condition.items())


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping) and isinstance(value, Mapping):
        return all(name in value and _agrees(value[name], part) for name, part in wanted.items())
    return bool(value == wanted)


def value_at(value: Any, path: Path_) -> Any:
    """The value at a path of nested mappings, None where there is nothing."""
    for step in path:
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    return value


def _nested(settings: Mapping[str, tuple[Any, Place]]) -> dict[str, Any]:
    """Return settings by dotted path as nested mappings."""
    draft = Draft()
    for dotted, (value, place) in settings.items():
        draft.set(dotted, value, place)
    return draft.value


def _names(grammar: Grammar) -> dict[str, str]:
    return _short_names(dict.fromkeys([*grammar.axes, *grammar.one_at_a_time]))


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """Every path's last step, or as many of its last steps as tell it apart from the others."""
    known = list(paths)
    tails = {path: [path.split(".", start)[-1] for start in range(path.count("."), -1, -1)] for path in known}

    def is_own(path: str, tail: str) -> bool:
        return not any(other != path and (other == tail or other.endswith(f".{tail}")) for other in known)

    return {path: next((tail for tail in tails[path] if is_own(path, tail)), path) for path in known}


def _brief(value: Any) -> str:
    """A sampled value for people: six digits tell any two trials apart."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> str:
    """A value for people: floats in four digits where those are the number."""
    if isinstance(value, float) and float(f"{value:.4g}") == value:
        return f"{value:.4g}"
    return str(value)
