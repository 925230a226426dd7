"""An experiment: a spec file that was read and validated, and its arms.

The arms are the product of the axes, without what ``exclude`` names, then the ablation star, then the included arms.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from repa_lab.errors import KeyPath, Place, Problem, SpecError
from repa_lab.registry import PluginError, did_you_mean, load_plugins
from repa_lab.settings import SettingsOf, settings_in
from repa_lab.spec import options
from repa_lab.spec.document import (
    COMPONENTS,
    Draft,
    entries,
    load_draft,
    names_in,
    paths_in,
    plain,
    read_fragment,
    value_at,
    value_of,
)
from repa_lab.spec.schema import (
    SECTIONS,
    RunConfig,
    SpecFile,
    fields_of,
    unknown_field,
    unknown_field_message,
    validate,
)

_IGNORED = "x-"  # begins the top-level keys that hold what other parts of a file merge with `<<`
_MAX_ARMS = 10_000
_MAX_PROBLEMS = 5  # reported for one value
_LINE_BREAKS = ("Cc", "Zl", "Zp")  # Unicode's categories of control characters and line separators


@dataclass(frozen=True)
class Arm:
    """One setting of the varied fields, common to all seeds.

    Attributes:
        levels: the arm's level on every axis, by axis.
        draft: the settings with their places, for errors that are found later. A search may change a component, so the
            draft also keeps the fields of other components.
    """

    label: str
    levels: Mapping[str, str]
    config: RunConfig
    draft: Draft = field(compare=False, repr=False)

    @property
    def asked(self) -> RunConfig:
        """The settings of the spec, to which conditions and comparisons refer."""
        return self.config

    @property
    def used(self) -> dict[str, Any]:
        """The settings of the spec as plain data, without those that have no effect beside the others."""
        used = self.asked.model_dump(mode="json")
        for path, section in settings_in(self.asked):
            if fields := value_of(used, path):  # None inside a section that was left out
                for name in section.unused_fields():
                    fields.pop(name, None)
        return used

    def has(self, path: str) -> bool:
        """Return whether the settings have a field at a dotted path; a section's fields depend on its component."""
        settings = self.config.model_dump()
        return any(keys[-1] in entries(value_of(settings, keys[:-1])) for keys in paths_in(settings, path.split(".")))

    def problem(self, path: str, message: str) -> Problem:
        """Return a problem with one of the arm's settings, at the place that set it."""
        return self.draft.problem(path, message)

    def with_settings(self, settings: Mapping[str, Any]) -> Arm:
        """Return the arm with some dotted paths set, as a search does."""
        draft = self.draft.copy()
        for path, value in settings.items():
            draft.set(path, value, Place(None))
        names = _short_names(settings)
        texts = {path: f"{value:.6g}" if isinstance(value, float) else value for path, value in settings.items()}
        label = [self.label] if self.levels else []
        label += [f"{names[path]}={text}" for path, text in texts.items()]
        return Arm(", ".join(label), self.levels, config_of(draft), draft)


@dataclass(frozen=True)
class Experiment:
    """One question: the fields of :class:`SpecFile`, resolved.

    Attributes:
        arms: the arms that the sections, axes and rules of the file make.
        seeds: the seeds with which every arm is trained.
        stop: rules that end a run early.
        draft: the settings with their places, for errors that are found later.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    compare: options.CompareConfig
    search: options.SearchConfig | None
    run: options.RunOptions
    budget: options.BudgetConfig
    stop: tuple[options.StopRule, ...]
    published: options.PublishedConfig | None
    plugins: tuple[str, ...]
    draft: Draft = field(compare=False, repr=False)

    def problem(self, path: str | KeyPath, message: str) -> Problem:
        """Return a problem with a field outside the arms, at the place that set it; see :meth:`Draft.problem`."""
        return self.draft.problem(path, message)


def load_spec(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    fragments: Sequence[str | Path] = (),
) -> Experiment:
    """Read and validate an experiment.

    Args:
        source: a YAML file, or the same fields as a mapping.
        overrides: dotted paths to values, laid over the file and the fragments, as ``--set`` does.
        fragments: YAML files laid over the file one after another, as ``--with`` does.

    Raises:
        SpecError: every problem, each at its file, line and column.
    """
    document = Draft(plain(source)) if isinstance(source, Mapping) else load_draft(Path(source))
    for fragment in fragments:
        document.merge(read_fragment(Path(fragment)))
    for path, value in plain(overrides or {}).items():
        document.set(path, value, Place(None))
    document.value = {key: value for key, value in document.value.items() if not key.startswith(_IGNORED)}
    _load_plugins(document)
    problems, arms = list[Problem](), tuple[Arm, ...]()
    try:
        spec = validate(SpecFile, document)
    except SpecError as error:
        problems += error.problems
        # Wrong fields are left out, so that the arms are validated too.
        wrong = {problem.path.split(".")[0] for problem in error.problems}
        valid = {k: v for k, v in document.value.items() if k in SpecFile.model_fields and k not in wrong}
        spec = SpecFile.model_validate({"name": "unnamed", **valid})
    try:
        arms = _expand(spec, document)
    except SpecError as error:
        problems += error.problems
    problems += [*_seeds_and_search(spec, document), *_condition_problems(spec, document, arms)]
    if problems:
        raise SpecError(problems)
    return Experiment(
        name=spec.name,
        question=spec.question,
        arms=arms,
        seeds=tuple(range(spec.seeds)) if isinstance(spec.seeds, int) else tuple(spec.seeds),
        compare=spec.compare,
        search=spec.search,
        run=spec.run,
        budget=spec.budget,
        stop=(spec.stop,) if isinstance(spec.stop, options.StopRule) else tuple(spec.stop or ()),
        published=spec.published,
        plugins=spec.plugins,
        draft=document,
    )


def _load_plugins(document: Draft) -> None:
    """Load the plugins before anything is validated that they may extend."""
    plugins = document.value.get("plugins")
    if not isinstance(plugins, list):
        return
    for index, file in enumerate(plugins):
        if not isinstance(file, str) or not Path(file).is_file():
            raise SpecError([document.problem(("plugins", index), f"no Python file {file!r}")])
    try:
        load_plugins([Path(file) for file in plugins])
    except PluginError as error:
        raise SpecError([Problem(Place(Path(error.file), error.line), "", error.message)]) from None


def _seeds_and_search(spec: SpecFile, document: Draft) -> Iterator[Problem]:
    """Yield repeated seeds, and searched fields that do not exist."""
    seeds = spec.seeds if isinstance(spec.seeds, list) else []
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            yield document.problem(("seeds", index), f"the seed {seed} is given twice")
    for key in spec.search.space if spec.search else ():
        if message := unknown_field(RunConfig, key, names_in(document.value)):
            yield document.problem(("search", "space", key), message)


# ---- arms


@dataclass(frozen=True)
class _Level:
    """One level of an axis, one value of the star, or one included arm; settings by dotted path, with their places."""

    axis: str
    name: str
    settings: Mapping[str, tuple[Any, Place]]
    place: Place


_Cell = tuple[_Level, ...]
_ComponentNames = Mapping[KeyPath, Iterable[str]]  # the names of components by the path of their section


def _expand(spec: SpecFile, document: Draft) -> tuple[Arm, ...]:
    """Return the arms of a document: the product of the axes, then the star, then the included arms.

    Raises:
        SpecError: every problem of every arm.
    """
    base = Draft({key: document.value[key] for key in SECTIONS if key in document.value}, document.places)
    names = _short_names([*spec.axes, *spec.one_at_a_time])
    axes = [_levels("axes", axis, values, document, names[axis]) for axis, values in spec.axes.items()]
    extra = [
        level
        for axis, values in spec.one_at_a_time.items()
        for level in _levels("one_at_a_time", axis, values, document, names[axis])
    ]
    extra += [
        _named_level("include", arm.label, arm.set, document, ("include", index, "set"))
        for index, arm in enumerate(spec.include)
    ]
    size = math.prod(map(len, axes))
    if (count := size + len(extra)) > _MAX_ARMS:
        key = "axes" if axes else "one_at_a_time"
        raise SpecError([document.problem(key, f"{count:,} arms; at most {_MAX_ARMS:,}")])
    levels = [*itertools.chain.from_iterable(axes), *extra]
    components = _components(spec, base, levels)
    problems = [
        Problem(level.place, level.axis, f"an arm is called by one line of text, got {level.name!r}")
        for level in levels
        if any(unicodedata.category(character) in _LINE_BREAKS for character in level.name)
    ]
    cells, arms = list[_Cell](), list[Arm]()
    for index, cell in enumerate([*itertools.product(*axes), *((level,) for level in extra)]):
        levels_by_axis = {level.axis: level.name for level in cell}
        settings: Mapping[str, Any] = {}  # of an invalid arm those that are given
        invalid: list[Problem] = []
        arm = None
        try:
            draft = _apply(base, cell)
            settings = draft.value
            arm = Arm(_label(cell), levels_by_axis, config_of(draft, components), draft)
            settings = arm.config.model_dump(mode="json") if spec.exclude else {}  # lists, as a file has them
        except SpecError as error:
            invalid = error.problems
        if index < size and any(holds(rule, levels_by_axis, settings) for rule in spec.exclude):
            continue
        cells.append(cell)
        arms += [arm] if arm else []
        problems += invalid
    repeated = [problem for axis in axes for problem in _repeated_labels([(level,) for level in axis])]
    if not cells:
        repeated.append(document.problem("exclude", "every arm is excluded"))
    problems += repeated or _repeated_labels(cells)
    if problems:
        raise SpecError(_limited(problems))
    return tuple(arms)


def config_of(draft: Draft, components: _ComponentNames | None = None) -> RunConfig:
    """Return an arm's settings without the fields of other components: the arms of a sweep share their sections.

    Args:
        components: the components of the sweep by section, whose fields are ignored; None ignores the fields of every
            component. ``none`` always ignores the fields of all others, so that any arm can be turned off.

    Raises:
        SpecError: every problem.
    """
    draft, problems = draft.copy(), []
    for path, section, mark in _component_sections(draft):
        if mark.key not in section or (settings := mark.settings_of(section)) is None:
            continue
        in_sweep = (mark.settings_of({mark.key: other}) for other in (components or {}).get(path, ()))
        siblings = [settings, *(other for other in in_sweep if other)]
        ignored = siblings if components and section[mark.key] != "none" else mark.choices
        for key in section.keys() - fields_of(settings):
            if not any(key in fields_of(other) for other in ignored):
                problems.append(draft.problem((*path, key), unknown_field_message(key, siblings)))
            del section[key]
    try:
        config = validate(RunConfig, draft)
    except SpecError as error:
        raise SpecError(problems + error.problems) from None
    if problems:
        raise SpecError(problems)
    return config


def _named_level(axis: str, name: str, settings: Mapping[str, Any], document: Draft, path: KeyPath) -> _Level:
    placed = {setting: (value, document.place((*path, setting))) for setting, value in settings.items()}
    return _Level(axis, name, placed, document.place(path))


def _levels(
    section: str, axis: str, values: options.RangeConfig | list[Any] | options.Levels, document: Draft, short_name: str
) -> list[_Level]:
    """Return the levels of an entry of ``axes`` or ``one_at_a_time``."""
    if isinstance(values, dict):
        named = values.items()
        return [_named_level(axis, name, given or {}, document, (section, axis, name)) for name, given in named]
    levels = []
    form = values.form if isinstance(values, options.RangeConfig) else None
    for index, value in enumerate(values.values if isinstance(values, options.RangeConfig) else values):
        place = document.place((section, axis, form or index))
        is_short = isinstance(value, float) and float(f"{value:.4g}") == value
        name = f"{short_name}={value:.4g}" if is_short else f"{short_name}={value}"
        levels.append(_Level(axis, name, {axis: (value, place)}, place))
    return levels


def _component_sections(draft: Draft) -> Iterator[tuple[KeyPath, dict[str, Any], SettingsOf]]:
    """Yield every section that holds the settings of a component, with its path."""
    for name, mark in COMPONENTS.items():
        section = draft.value.get(name)
        is_list = isinstance(section, list)
        for index, value in enumerate(section if isinstance(section, list) else [section]):
            if isinstance(value, dict):
                yield (name, index) if is_list else (name,), value, mark


def _components(spec: SpecFile, base: Draft, levels: Iterable[_Level]) -> _ComponentNames:
    """Return the components that the arms name or that a search tries, by the path of their section."""
    components: dict[KeyPath, set[str]] = {}
    cells: list[_Cell] = [(), *((level,) for level in levels)]
    for cell in cells:
        try:
            draft = _apply(base, cell)
        except SpecError:  # reported when the arms are built
            continue
        for path, section, mark in _component_sections(draft):
            if isinstance(name := section.get(mark.key), str):
                components.setdefault(path, set()).add(name)
    for setting, interval in spec.search.space.items() if spec.search else ():
        for keys in paths_in(base.value, setting.split(".")):
            components.setdefault(keys[:-1], set()).update(
                name for name in interval.choice or () if isinstance(name, str)
            )
    return components


def _apply(base: Draft, cell: _Cell) -> Draft:
    draft = base.copy()
    for level in cell:
        for path, (value, place) in level.settings.items():
            if (section := path.partition(".")[0]) not in SECTIONS:
                message = f"an arm varies fields of {', '.join(SECTIONS)}, got '{path}'"
                raise SpecError([Problem(place, path, message + did_you_mean(section, SECTIONS))])
            draft.set(path, value, place)
    return draft


def _label(cell: _Cell) -> str:
    return ", ".join(level.name for level in cell) or "all"


def _repeated_labels(cells: Iterable[_Cell]) -> list[Problem]:
    """Return a problem for every label that an earlier cell has."""
    seen: set[str] = set()
    problems = []
    for cell in cells:
        if (label := _label(cell)) in seen:
            problems.append(Problem(cell[-1].place, cell[-1].axis, f"two arms are called '{label}'"))
        seen.add(label)
    return problems


def _limited(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yield the problems; of many problems of one value, such as a range, the first and the number of the others."""
    groups: dict[tuple[Place, str], list[Problem]] = {}
    for problem in dict.fromkeys(problems):
        groups.setdefault((problem.place, problem.path), []).append(problem)
    for group in groups.values():
        if len(group) <= _MAX_PROBLEMS:
            yield from group
        else:
            yield replace(group[0], message=f"{group[0].message}; and {len(group) - 1:,} more of the kind here")


def _short_names(paths: Collection[str]) -> dict[str, str]:
    """Return for every dotted path its last step, or as many of its last steps as tell it apart from the others."""
    names = {}
    for path in paths:
        others = [f".{other}" for other in paths if other != path]
        tails = (path.split(".", start)[-1] for start in range(path.count("."), -1, -1))
        names[path] = next((tail for tail in tails if not any(it.endswith(f".{tail}") for it in others)), path)
    return names


# ---- conditions: the rules of `exclude` and the baseline


def holds(condition: Mapping[str, Any], levels: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
    """Return whether every entry of a condition holds for an arm.

    Args:
        condition: an axis to a level, or a dotted path to a value. A list holds if any of its values does; a mapping
            compares only the fields that it names.
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


def _condition_problems(spec: SpecFile, document: Draft, arms: Sequence[Arm]) -> Iterator[Problem]:
    """Yield entries of ``exclude`` and of the baseline that would never hold: no such field, level or value.

    Args:
        arms: the arms; without any, values are not checked.
    """
    conditions: list[tuple[KeyPath, Any]] = [
        (("exclude", index, key), wanted) for index, rule in enumerate(spec.exclude) for key, wanted in rule.items()
    ]
    conditions += [(("compare", "baseline", key), wanted) for key, wanted in spec.compare.baseline.items()]
    axes, names = document.value.get("axes"), names_in(document.value)
    axis_names = axes if isinstance(axes, dict) else {}
    for path, wanted in conditions:
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
            for value in values:
                try:
                    arm.with_settings({key: value})
                except SpecError as error:  # such as a misspelt choice
                    yield from (document.problem(path, it.message) for it in error.problems if it.path == key)
