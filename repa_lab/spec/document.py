"""A spec as plain data with places: inheritance, overrides, and dotted paths."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_lab.spec.component import COMPONENTS
from repa_lab.spec.errors import Path_, Place, Problem, SpecError
from repa_lab.spec.yaml import MAX_DEPTH, MAX_DIGITS, MAX_NODES, Document, is_text, read_yaml

_PROGRAM = Place(None)
# Sections merge all the way down. In these a child's entry replaces its parent's whole: an axis, a space, a baseline.
_SHALLOW = ("axes", "one_at_a_time", "search", "compare")
# The fields that name the component whose fields a section has.
_NAMES = {(section, named.key) for section, named in COMPONENTS.items()}
# Rules of a child replace those of its parent, whichever there were.
_WHOLE = ("stop",)


@dataclass
class Draft:
    """Settings on their way to being validated, each with the place that set it."""

    value: dict[str, Any] = field(default_factory=dict)
    places: dict[Path_, Place] = field(default_factory=dict)

    def place(self, path: Path_) -> Place:
        """Where the value at ``path`` was set, or the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return _PROGRAM

    def copy(self) -> Draft:
        """An independent draft."""
        return Draft(copy.deepcopy(self.value), dict(self.places))

    def set(self, dotted: str, value: Any, place: Place) -> None:
        """Set a dotted path; mappings merge into what is there, but for what a file would replace whole.

        Raises:
            SpecError: the path runs through something that is not a mapping.
        """
        path = tuple(dotted.split("."))
        if len(path) == 1:
            self.merge({dotted: value}, {path: place})
            return
        if len(path) == 2 and path[0] in _SHALLOW:
            self.merge({path[0]: {path[1]: value}}, {path: place})
            return
        target = self.value
        for depth, key in enumerate(path[:-1], start=1):
            if key not in target:
                target[key] = {}
                self.places[path[:depth]] = place
            target = target[key]
            if not isinstance(target, dict):
                parent = ".".join(path[:depth])
                raise SpecError([Problem(place, dotted, f"'{parent}' is a value, so it has no field '{path[depth]}'")])
        self._assign(target, path, value, place)

    def merge(self, other: Mapping[str, Any], places: Mapping[Path_, Place]) -> None:
        """Lay another document over this one: sections merge, an axis replaces the axis of its name, lists replace lists."""
        for key, value in other.items():
            if key in _WHOLE:
                self.value.pop(key, None)
            if key in _SHALLOW and isinstance(value, Mapping) and isinstance(self.value.get(key), dict):
                for entry in value:
                    self.value[key].pop(entry, None)
                    self._drop((key, entry))
            self._assign(self.value, (key,), value, places.get((key,), _PROGRAM))
        self.places.update(places)

    def _assign(self, target: dict[str, Any], path: Path_, value: Any, place: Place) -> None:
        key = str(path[-1])
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            for inner, inner_value in sorted(value.items(), key=lambda item: (*path, item[0]) not in _NAMES):
                self._assign(target[key], (*path, inner), inner_value, place)
            return
        if path in _NAMES and isinstance(value, str):
            self._drop_fields_of_former(target, str(path[0]), value)
        target[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)
        self._drop(path)
        self.places[path] = place

    def _drop_fields_of_former(self, target: dict[str, Any], section: str, name: str) -> None:
        """Drop the fields that only the former component of a section has, for another one is named now."""
        named = COMPONENTS[section]
        former = named.settings_of(target) if named.key in target else None
        new = named.settings_of({named.key: name})
        if former is None or new is None:
            return
        for dropped in (former.model_fields.keys() - new.model_fields.keys()) & target.keys():
            del target[dropped]
            self._drop((section, dropped))

    def _drop(self, path: Path_) -> None:
        for known in [known for known in self.places if known[: len(path)] == path and known != ()]:
            del self.places[known]


def plain(source: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a program's settings as a file could hold them; tuples become lists, and no part is shared.

    Raises:
        SpecError: at the first thing a file could not say: another type, a key that is not text, endless nesting.
    """
    value: dict[str, Any] = _plain(source, (), itertools.count(1))
    return value


def _plain(value: Any, path: Path_, count: Iterator[int]) -> Any:
    if len(path) > MAX_DEPTH or next(count) > MAX_NODES:
        raise _not_plain(path, f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not is_text(key):
                raise _not_plain(path, f"a key must be text, got {type(key).__name__}")
        return {key: _plain(inner, (*path, key), count) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, (*path, index), count) for index, inner in enumerate(value)]
    if not isinstance(value, (str, int, float, type(None))):
        name = type(value).__name__
        raise _not_plain(path, f"expected text, a number, true, false, null, a list or a mapping, got {name}")
    if isinstance(value, str) and not is_text(value):
        raise _not_plain(path, "half a surrogate pair is not text")
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise _not_plain(path, f"a number of more than {MAX_DIGITS} digits")
    return value


def _not_plain(path: Path_, message: str) -> SpecError:
    return SpecError([Problem(_PROGRAM, ".".join(map(str, path)), message)])


def load_draft(file: Path) -> Draft:
    """Read a spec file over the fragments it names with ``use``, and those over the file it names with ``base``.

    Raises:
        SpecError: a file cannot be read, or ``base`` runs in a circle.
    """
    draft = Draft()
    for document in reversed(list(_lineage(file))):
        _locate_plugins(document)
        draft.merge(
            {key: value for key, value in document.value.items() if key not in ("base", "use")}, document.places
        )
    for key in ("base", "use"):
        draft.places.pop((key,), None)
    return draft


def lay_over(draft: Draft, file: Path) -> None:
    """Lay a fragment over a draft: a spec without ``base`` and ``use``, of which it may give any part.

    Raises:
        SpecError: the file cannot be read, or names further files.
    """
    fragment = _fragment(file)
    _locate_plugins(fragment)
    draft.merge(fragment.value, fragment.places)


def _locate_plugins(document: Document) -> None:
    """Make the plugins of a file, which are relative to it, absolute."""
    plugins = document.value.get("plugins")
    if isinstance(plugins, list):
        folder = document.file.parent
        document.value["plugins"] = [str((folder / one).resolve()) if isinstance(one, str) else one for one in plugins]


def _lineage(file: Path) -> Iterator[Document]:
    seen: list[Path | None] = []
    place, path = _PROGRAM, ""
    while True:
        found = _find(file)
        if found in seen:
            raise SpecError([Problem(place, path, f"'{file}' is already among the bases: base runs in a circle")])
        if seen and found is None:
            raise SpecError([Problem(place, path, f"no file '{file}'; base is relative to the file that names it")])
        seen.append(found)
        document = read_yaml(file)
        yield document
        yield from reversed(list(_fragments(document)))
        base = document.value.get("base")
        if base is None:
            return
        place, path = document.places[("base",)], "base"
        if not isinstance(base, str):
            raise SpecError([Problem(place, path, f"expected the path of a spec file, got {base!r}")])
        file = file.parent / base


def _fragments(document: Document) -> Iterator[Document]:
    """The fragments that a spec lays over its base with ``use``, in order; a fragment names no further files."""
    named = [] if document.value.get("use") is None else document.value["use"]
    for index, name in enumerate(named if isinstance(named, list) else [named]):
        place = document.places.get(("use", index), document.places[("use",)])
        if not isinstance(name, str) or _find(document.file.parent / name) is None:
            raise SpecError(
                [Problem(place, "use", f"no file {name!r}; use lists files relative to the file that names them")]
            )
        yield _fragment(document.file.parent / name)


def _fragment(file: Path) -> Document:
    fragment = read_yaml(file)
    named = [key for key in ("base", "use") if key in fragment.value]
    if named:
        raise SpecError([Problem(fragment.places[(key,)], key, "a fragment names no further files") for key in named])
    return fragment


def _find(file: Path) -> Path | None:
    """The one name of a file, None if there is no such file."""
    try:
        return file.resolve(strict=True) if file.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None
