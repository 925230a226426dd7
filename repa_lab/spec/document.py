"""A spec as plain data with places: inheritance, overrides, and dotted paths."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from repa_lab.spec.errors import KeyPath, Place, Problem, SpecError, dotted
from repa_lab.spec.schema import COMPONENTS
from repa_lab.spec.yaml import HALF_PAIR, MAX_DEPTH, MAX_DIGITS, MAX_NODES, parse_yaml, read_text, whole_characters

_NO_FILE = Place(None)
# In these sections an entry replaces the entry of its name whole; in all others sections merge field by field.
_ENTRIES_REPLACE = ("axes", "one_at_a_time", "search", "compare")
# These sections are replaced whole.
_REPLACED = ("stop",)
# The fields that name the component whose settings a section holds.
_NAMING_FIELDS = {(section, mark.key) for section, mark in COMPONENTS.items()}


@dataclass
class Draft:
    """Settings that are not validated yet.

    Attributes:
        value: the settings as plain data.
        places: the place that set a value, by its path.
    """

    value: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place:
        """Return the place that set the value at ``path``, or the nearest value around it."""
        known = (path[:end] for end in range(len(path), -1, -1) if path[:end] in self.places)
        return next((self.places[near] for near in known), _NO_FILE)

    def problem(self, path: str | KeyPath, message: str) -> Problem:
        """Return a problem with a value, at the place that set the value.

        Args:
            path: the dotted path, or the keys where a key holds dots itself.
        """
        if isinstance(path, str):
            path = tuple(int(step) if step.isdecimal() else step for step in path.split("."))
        return Problem(self.place(path), dotted(path), message)

    def copy(self) -> Draft:
        """Return an independent copy."""
        return Draft(copy.deepcopy(self.value), dict(self.places))

    def set(self, dotted: str, value: Any, place: Place) -> None:
        """Set the value at a dotted path, by the rules of :meth:`merge`; see :func:`paths_in` for paths into lists.

        Raises:
            SpecError: the path leads through a value that is neither a mapping nor a list of mappings, or to a position
                that a list does not have.
        """
        path = tuple(dotted.split("."))
        if len(path) == 1:
            self.merge({dotted: value}, {path: place})
            return
        if len(path) == 2 and path[0] in _ENTRIES_REPLACE:
            self.merge({path[0]: {path[1]: value}}, {path: place})
            return
        paths = paths_in(self.value, path)
        if not paths:
            raise SpecError([Problem(place, dotted, "the list has no such position; positions begin with 0")])
        for keys in paths:
            self._set(keys, value, place)

    def _set(self, path: KeyPath, value: Any, place: Place) -> None:
        target: Any = self.value
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(target, dict):
                if key not in target:
                    self.places[path[:depth]] = place
                target = target.setdefault(key, {})
            else:
                target = target[key]
            if not isinstance(target, dict) and not isinstance(path[depth], int):
                message = f"'{dotted(path[:depth])}' is a value, so it has no field '{path[depth]}'"
                raise SpecError([Problem(place, dotted(path), message)])
        self._assign(target, path, value, place)

    def merge(self, other: Mapping[str, Any], places: Mapping[KeyPath, Place]) -> None:
        """Lay another document over this one: sections merge, lists and other values replace."""
        for key, value in other.items():
            if key in _REPLACED:
                self.value.pop(key, None)
            if key in _ENTRIES_REPLACE and isinstance(value, Mapping) and isinstance(self.value.get(key), dict):
                for entry in value:
                    self.value[key].pop(entry, None)
                    self._drop((key, entry))
            self._assign(self.value, (key,), value, places.get((key,), _NO_FILE))
        self.places.update(places)

    def _assign(self, target: Any, path: KeyPath, value: Any, place: Place) -> None:
        """Set the last key of a path in ``target``, the mapping or the list of mappings that has it."""
        key: Any = path[-1]
        known = target[key] if isinstance(target, list) else target.get(key)
        if isinstance(value, Mapping) and isinstance(known, dict):
            for inner in sorted(value, key=lambda name: not _names_component((*path, name))):
                self._assign(known, (*path, inner), value[inner], place)
            return
        if _names_component(path) and isinstance(value, str):
            self._drop_fields_of_former_component(target, path[:-1], value)
        target[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)
        self._drop(path)
        self.places[path] = place

    def _drop_fields_of_former_component(self, target: dict[str, Any], section: KeyPath, name: str) -> None:
        """Drop the fields that only the component named before has; the section names another component now."""
        mark = COMPONENTS[str(section[0])]
        former = mark.settings_of(target) if mark.key in target else None
        new = mark.settings_of({mark.key: name})
        if former is None or new is None:
            return
        for dropped in (former.model_fields.keys() - new.model_fields.keys()) & target.keys():
            del target[dropped]
            self._drop((*section, dropped))

    def _drop(self, path: KeyPath) -> None:
        for known in [known for known in self.places if known[: len(path)] == path and known != ()]:
            del self.places[known]


def paths_in(value: Any, path: Sequence[str]) -> list[KeyPath]:
    """Return the paths of the values that a dotted path means, whether or not there are such values yet.

    A step into a list of mappings is a position, or the ``name`` of a member. Any other step means a field of every
    member: ``regularizer.weight`` is the weight of all regularizers of a list.

    Args:
        value: the settings as plain data.
        path: the steps of the dotted path.

    Returns:
        One path with keys and positions; several for a field of every member; none if a position is not in the list.
    """
    if not path:
        return [()]
    step, *rest = path
    if not (isinstance(value, (list, tuple)) and value and all(isinstance(member, Mapping) for member in value)):
        inner = value.get(step) if isinstance(value, Mapping) else None
        return [(step, *keys) for keys in paths_in(inner, rest)]
    positions = [index for index, member in enumerate(value) if step in (str(index), member.get("name"))]
    if positions or step.isdecimal():
        return [(index, *keys) for index in positions for keys in paths_in(value[index], rest)]
    return [(index, *keys) for index, member in enumerate(value) for keys in paths_in(member, path)]


def value_at(value: Any, path: str) -> Any:
    """Return the value at a dotted path; None if there is none, or if members of a list differ in it."""
    found = [value_of(value, keys) for keys in paths_in(value, path.split("."))]
    return found[0] if found and all(other == found[0] for other in found) else None


def names_in(value: Any) -> set[str]:
    """Return the names by which dotted paths may mean the members of lists."""
    if isinstance(value, list):
        names = (member.get("name") for member in value if isinstance(member, Mapping))
        return {name for name in names if isinstance(name, str)}.union(*map(names_in, value))
    return set().union(*map(names_in, value.values())) if isinstance(value, Mapping) else set()


def value_of(value: Any, keys: KeyPath) -> Any:
    """Return the value at keys and positions; None if there is none."""
    return reduce(lambda inner, key: entries(inner).get(key), keys, value)


def entries(value: Any) -> Mapping[Any, Any]:
    """Return the entries of a mapping by key, or of a list by position; a value of another type has none."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


def _names_component(path: KeyPath) -> bool:
    """Return whether the value at a path names the component whose settings a section holds."""
    return tuple(key for key in path if not isinstance(key, int)) in _NAMING_FIELDS


def plain(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of a program's settings as a file could hold them; tuples become lists.

    Raises:
        SpecError: a value has a type that a file cannot hold, a key is not text, or the nesting has no end.
    """
    value: dict[str, Any] = _plain(source, (), itertools.count(1))
    return value


def _plain(value: Any, path: KeyPath, count: Iterator[int]) -> Any:
    message = ""
    if len(path) > MAX_DEPTH or next(count) > MAX_NODES:
        message = f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels"
    elif isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str) or whole_characters(key) is None]:
            message = f"a key must be text, got {type(wrong[0]).__name__}"
        else:
            return {key: _plain(inner, (*path, key), count) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        return [_plain(inner, (*path, index), count) for index, inner in enumerate(value)]
    elif not isinstance(value, str | int | float | None):
        allowed = "text, a number, true, false, null, a list or a mapping"
        message = f"expected {allowed}, got {type(value).__name__}"
    elif isinstance(value, str) and whole_characters(value) is None:
        message = HALF_PAIR
    elif isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        message = f"a number of more than {MAX_DIGITS} digits"
    else:
        return value
    raise SpecError([Problem(_NO_FILE, dotted(path), message)])


def load_draft(file: Path) -> Draft:
    """Read a spec file and the files that it names: ``base`` at the bottom, then ``use``, then the file itself.

    Raises:
        SpecError: a file cannot be read, or ``base`` runs in a circle.
    """
    draft = Draft()
    for document in reversed(list(_lineage(file))):
        sections = {key: value for key, value in document.value.items() if key not in ("base", "use")}
        draft.merge(sections, document.places)
    for key in ("base", "use"):
        draft.places.pop((key,), None)
    return draft


def lay_over(draft: Draft, file: Path) -> None:
    """Lay a fragment over a draft: any part of a spec, without ``base`` and ``use``.

    Raises:
        SpecError: the file cannot be read, or names further files.
    """
    fragment = _read_fragment(file)
    draft.merge(fragment.value, fragment.places)


def read_file(file: Path) -> Draft:
    """Read one YAML file whose top is a mapping; the plugins that it names, relative to itself, become absolute.

    Raises:
        SpecError: the file is missing, too large, not YAML, or has duplicate keys.
    """
    value, places = parse_yaml(read_text(file), file)
    if not isinstance(value, dict):
        raise SpecError([Problem(Place(file), "", "a spec must be a mapping of fields, such as 'name: my_question'")])
    if isinstance(plugins := value.get("plugins"), list):
        value["plugins"] = [str((file.parent / it).resolve()) if isinstance(it, str) else it for it in plugins]
    return Draft(value, places)


def _lineage(file: Path) -> Iterator[Draft]:
    """Yield a spec file, its fragments from the last to the first, then the same for its base, and so on."""
    seen: list[Path | None] = []
    place, path = _NO_FILE, ""
    while True:
        resolved = _resolve(file)
        if resolved in seen:
            raise SpecError([Problem(place, path, f"'{file}' is already among the bases: base runs in a circle")])
        if seen and resolved is None:
            raise SpecError([Problem(place, path, f"no file '{file}'; base is relative to the file that names it")])
        seen.append(resolved)
        document = read_file(file)
        yield document
        yield from reversed(list(_fragments(document, file.parent)))
        base = document.value.get("base")
        if base is None:
            return
        place, path = document.places[("base",)], "base"
        if not isinstance(base, str):
            raise SpecError([Problem(place, path, f"expected the path of a spec file, got {base!r}")])
        file = file.parent / base


def _fragments(document: Draft, folder: Path) -> Iterator[Draft]:
    """Yield the fragments that a file names with ``use``, in order."""
    names = [] if document.value.get("use") is None else document.value["use"]
    for index, name in enumerate(names if isinstance(names, list) else [names]):
        if not isinstance(name, str) or _resolve(folder / name) is None:
            message = f"no file {name!r}; use lists files relative to the file that names them"
            raise SpecError([Problem(document.place(("use", index)), "use", message)])
        yield _read_fragment(folder / name)


def _read_fragment(file: Path) -> Draft:
    fragment = read_file(file)
    names = [key for key in ("base", "use") if key in fragment.value]
    if names:
        raise SpecError([Problem(fragment.places[(key,)], key, "a fragment names no further files") for key in names])
    return fragment


def _resolve(file: Path) -> Path | None:
    """Return the real path of a file; None if there is no such file."""
    try:
        return file.resolve(strict=True) if file.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None
