"""A spec as plain data with places: YAML, files over files, overrides and dotted paths.

Files are YAML 1.2 without duplicate keys, and every value has a file, line and column. PyYAML alone reads ``1e-4`` as a
string and ``off`` as False, and keeps the last of two equal keys: each would change an experiment silently. ruamel.yaml
reads ``1_000`` and ``2026-01-02`` as a number and a date, and ``-.5e1`` as a string.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from repa_lab.align.settings import REGULARIZERS
from repa_lab.data.settings import SOURCES
from repa_lab.errors import KeyPath, Place, Problem, SpecError, dotted
from repa_lab.settings import SettingsOf

# The sections whose fields are those of the component that they name.
COMPONENTS = {
    "regularizer": SettingsOf(REGULARIZERS, "type", "none", several=True),
    "data": SettingsOf(SOURCES, "source", None),
}
_NAMING_FIELDS = {(section, mark.key) for section, mark in COMPONENTS.items()}
# In these sections an entry replaces the entry of its name whole; in all others sections merge field by field.
_ENTRIES_REPLACE = ("axes", "one_at_a_time", "search", "compare")
# These sections are replaced whole.
_REPLACED = ("stop",)
_NO_FILE = Place(None)

_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000
_MAX_DEPTH = 40
_MAX_DIGITS = 100
_TOO_LARGE = f"more than {_MAX_NODES:,} values or {_MAX_DEPTH} levels"
_HALF_PAIR = "half a surrogate pair is not text"
_TAG = "tag:yaml.org,2002:"
_MERGE = "<<"
# The scalars of the YAML 1.2 core schema: the pattern of each, and the function that makes its value.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0 if text[1:2] in ("o", "x") else 10)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": (r"(?s:.*)", str),
}


class _CoreLoader(yaml.SafeLoader):
    """A parser that resolves plain scalars by the core schema."""


class _CoreDumper(yaml.SafeDumper):
    """A writer that quotes text which the core schema would read as another value."""


_CoreLoader.yaml_implicit_resolvers = _CoreDumper.yaml_implicit_resolvers = {
    None: [(_TAG + kind, re.compile(rf"({pattern})\Z")) for kind, (pattern, _) in _SCALARS.items()]
}


def parse_yaml(text: str, file: Path | None) -> tuple[Any, dict[KeyPath, Place]]:
    """Parse YAML, or JSON, into plain data and the places of keys and list items by path.

    Raises:
        SpecError: the text is not YAML, or has duplicate keys.
    """
    builder, place = _Builder(file), Place(file)
    try:
        node = yaml.compose(text, _CoreLoader)
        value = builder.build(node, ()) if node else None
        if builder.problems:
            raise SpecError(builder.problems)
        return value, builder.places
    except SpecError:
        raise
    except yaml.reader.ReaderError as error:
        before = text[: error.position].rpartition("\n")
        place = Place(file, text.count("\n", 0, error.position) + 1, len(before[2]) + 1)
        message = f"not valid YAML: the character {text[error.position]!r} is not allowed"
    except yaml.MarkedYAMLError as error:
        if mark := error.problem_mark:
            place = Place(file, mark.line + 1, mark.column + 1)
        message = f"not valid YAML: {error.problem}"
    except RecursionError:
        message = f"nested more than {_MAX_DEPTH} levels deep"
    except (OverflowError, ValueError):
        message = "not valid YAML: an escape stands for no character"
    raise SpecError([Problem(place, "", message)])


def parse_scalar(text: str) -> Any:
    """Parse one value as in a YAML file: ``1e-4`` is a float, ``[1, 2]`` a list.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        return parse_yaml(text, None)[0]
    except SpecError as error:
        raise ValueError(f"not a YAML value: {text!r}") from error


def to_yaml(value: Mapping[str, Any], width: int) -> str:
    """Return plain data as a YAML file; a section without sections is one line, or wrapped at ``width``."""
    text: str = yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, default_flow_style=None, width=width)
    return text


def reads_as_text(value: str) -> bool:
    """Return whether a YAML file may hold a text on one line without quotes."""
    try:
        return value.isprintable() and parse_scalar(value) == value
    except ValueError:
        return False


def read_text(file: Path, kind: str = "spec") -> str:
    """Read a small text file.

    Args:
        kind: the word for the file in error messages.

    Raises:
        SpecError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        size = file.stat().st_size
        if size <= _MAX_BYTES:
            return file.read_text(encoding="utf-8-sig")
        message = f"a {kind} may have at most {_MAX_BYTES:,} bytes; this file has {size:,}"
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text: {error.reason} at byte {error.start}"
    except (OSError, ValueError) as error:
        message = f"cannot read the file: {getattr(error, 'strerror', None) or error}"
    raise SpecError([Problem(Place(file), "", message)])


def _whole_characters(text: str) -> str | None:
    """Join escaped surrogate pairs, with which JSON writes an emoji; return None for half a pair, which is no text."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


@dataclass
class _Builder:
    """Turns parsed nodes into plain data and collects places and problems; an alias becomes a copy."""

    file: Path | None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise SpecError([Problem(self._place(node), "", _TOO_LARGE)])
        self.places.setdefault(path, self._place(node))
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            message = f"not valid YAML: could not determine a constructor for the tag {node.tag!r}"
            return self._refuse(node, message)
        pattern, make = _SCALARS[kind]
        if (text := _whole_characters(node.value)) is None:
            return self._refuse(node, _HALF_PAIR, path)
        if not re.fullmatch(pattern, text):
            return self._refuse(node, f"not valid YAML: {text!r} is not a valid {kind}")
        if kind != "str" and len(text) > _MAX_DIGITS:
            return self._refuse(node, f"not valid YAML: a number of {len(text):,} digits")
        return make(text)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, known: Collection[str] = ()) -> dict[str, Any]:
        """Return a mapping and what it merges with ``<<``, without the known keys; its own keys win."""
        value: dict[str, Any] = {}
        seen: dict[str, Place] = {}
        merged: list[yaml.Node] = []
        for key, inner in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, f"a key must be text, got a {key.id}", path)
                continue
            name, place = _whole_characters(key.value), self._place(key)
            if key.tag != f"{_TAG}str" or name is None:
                self._refuse(key, f"a key must be text, got {key.value!r}; quote it", path)
                continue
            if (first := seen.setdefault(name, place)) != place:
                self._refuse(key, f"duplicate key '{name}', first given on line {first.line}", (*path, name))
            if name == _MERGE and key.style is None:
                merged = inner.value if isinstance(inner, yaml.SequenceNode) else [inner]
            elif name not in known:
                self.places.setdefault((*path, name), place)
                value[name] = self.build(inner, (*path, name))
        for inner in merged:
            if isinstance(inner, yaml.MappingNode):
                value = {**self._mapping(inner, path, {*known, *value}), **value}
            else:
                self._refuse(inner, f"{_MERGE} takes a mapping, or a list of mappings", path)
        return value

    def _refuse(self, node: yaml.Node, message: str, path: KeyPath = ()) -> None:
        self.problems.append(Problem(self._place(node), dotted(path), message))

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)


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

    def set(self, name: str, value: Any, place: Place) -> None:
        """Set the value at a dotted path, by the rules of :meth:`merge`; see :func:`paths_in` for paths into lists.

        Raises:
            SpecError: the path leads through a value that is neither a mapping nor a list of mappings, or to a position
                that a list does not have.
        """
        section, *below = name.split(".")
        if not below or (len(below) == 1 and section in _ENTRIES_REPLACE):
            self.merge(Draft({section: {below[0]: value} if below else value}, {(section, *below): place}))
            return
        paths = paths_in(self.value, [section, *below])
        if not paths:
            raise SpecError([Problem(place, name, "the list has no such position; positions begin with 0")])
        for path in paths:
            target: Any = self.value
            for depth, key in enumerate(path[:-1], start=1):
                if isinstance(target, dict) and key not in target:
                    target[key] = {}
                    self.places[path[:depth]] = place
                target = target[key]
                if not isinstance(target, dict) and not isinstance(path[depth], int):
                    message = f"'{dotted(path[:depth])}' is a value, so it has no field '{path[depth]}'"
                    raise SpecError([Problem(place, dotted(path), message)])
            self._assign(target, path, value, place)

    def merge(self, other: Draft) -> None:
        """Lay other settings over these: sections merge, lists and other values replace."""
        for key, value in other.value.items():
            if key in _REPLACED:
                self.value.pop(key, None)
            if key in _ENTRIES_REPLACE and isinstance(value, Mapping) and isinstance(self.value.get(key), dict):
                for entry in value:
                    self.value[key].pop(entry, None)
                    self._drop((key, entry))
            self._assign(self.value, (key,), value, other.places.get((key,), _NO_FILE))
        self.places.update(other.places)

    def _assign(self, target: Any, path: KeyPath, value: Any, place: Place) -> None:
        """Set the last key of a path in ``target``, the mapping or the list of mappings that has it."""
        key: Any = path[-1]
        known = target[key] if isinstance(target, list) else target.get(key)
        if isinstance(value, Mapping) and isinstance(known, dict):
            for inner in sorted(value, key=lambda name: not _names_component((*path, name))):
                self._assign(known, (*path, inner), value[inner], place)
            return
        if _names_component(path) and isinstance(value, str):
            # Drop the fields that only the component named before has; the section names another component now.
            mark = COMPONENTS[str(path[0])]
            former = mark.settings_of(target) if mark.key in target else None
            new = mark.settings_of({mark.key: value})
            if former and new:
                for name in target.keys() & (former.model_fields.keys() - new.model_fields.keys()):
                    del target[name]
                    self._drop((*path[:-1], name))
        target[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)
        self._drop(path)
        self.places[path] = place

    def _drop(self, path: KeyPath) -> None:
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}


def _names_component(path: KeyPath) -> bool:
    """Return whether the value at a path names the component whose settings a section holds."""
    return tuple(key for key in path if not isinstance(key, int)) in _NAMING_FIELDS


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
    values = [value_of(value, keys) for keys in paths_in(value, path.split("."))]
    return values[0] if values and all(other == values[0] for other in values) else None


def names_in(value: Any) -> set[str]:
    """Return the names by which dotted paths may mean the members of lists."""
    members = value if isinstance(value, list) else []
    names = (member.get("name") for member in members if isinstance(member, Mapping))
    return {name for name in names if isinstance(name, str)}.union(*map(names_in, entries(value).values()))


def value_of(value: Any, keys: KeyPath) -> Any:
    """Return the value at keys and positions; None if there is none."""
    return reduce(lambda inner, key: entries(inner).get(key), keys, value)


def entries(value: Any) -> Mapping[Any, Any]:
    """Return the entries of a mapping by key, or of a list by position; a value of another type has none."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else {}


def plain(value: Any, path: KeyPath = (), count: Iterator[int] | None = None) -> Any:
    """Return a deep copy of a program's settings as a file could hold them; tuples become lists.

    Args:
        path: where the value lies in the settings.
        count: counts the values of the settings.

    Raises:
        SpecError: a value has a type that a file cannot hold, a key is not text, or the nesting has no end.
    """
    count = count or itertools.count(1)
    if len(path) > _MAX_DEPTH or next(count) > _MAX_NODES:
        message = _TOO_LARGE
    elif isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str) or _whole_characters(key) is None]:
            message = f"a key must be text, got {type(wrong[0]).__name__}"
        else:
            return {key: plain(inner, (*path, key), count) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        return [plain(inner, (*path, index), count) for index, inner in enumerate(value)]
    elif not isinstance(value, str | int | float | None):
        allowed = "text, a number, true, false, null, a list or a mapping"
        message = f"expected {allowed}, got {type(value).__name__}"
    elif isinstance(value, str) and _whole_characters(value) is None:
        message = _HALF_PAIR
    elif isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        message = f"a number of more than {_MAX_DIGITS} digits"
    else:
        return value
    raise SpecError([Problem(_NO_FILE, dotted(path), message)])


def load_draft(file: Path) -> Draft:
    """Read a spec file and the files that it names: ``base`` at the bottom, then ``use``, then the file itself.

    Raises:
        SpecError: a file cannot be read, or ``base`` runs in a circle.
    """
    layers: list[Draft] = []  # from the top to the bottom
    place, seen = _NO_FILE, list[Path | None]()
    while True:
        resolved = _resolve(file)
        if resolved in seen:
            raise SpecError([Problem(place, "base", f"'{file}' is already among the bases: base runs in a circle")])
        if seen and resolved is None:
            raise SpecError([Problem(place, "base", f"no file '{file}'; base is relative to the file that names it")])
        seen.append(resolved)
        document = read_file(file)
        fragments = []
        names = document.value.pop("use", None)
        for index, name in enumerate(names if isinstance(names, list) else [] if names is None else [names]):
            if not isinstance(name, str) or _resolve(file.parent / name) is None:
                message = f"no file {name!r}; use lists files relative to the file that names them"
                raise SpecError([Problem(document.place(("use", index)), "use", message)])
            fragments.append(read_fragment(file.parent / name))
        layers += [document, *reversed(fragments)]
        if (base := document.value.pop("base", None)) is None:
            break
        place = document.place(("base",))
        if not isinstance(base, str):
            raise SpecError([Problem(place, "base", f"expected the path of a spec file, got {base!r}")])
        file = file.parent / base
    draft = Draft()
    for layer in reversed(layers):
        draft.merge(layer)
    return draft


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


def read_fragment(file: Path) -> Draft:
    """Read a file with any part of a spec, without ``base`` and ``use``.

    Raises:
        SpecError: the file cannot be read, or names further files.
    """
    fragment = read_file(file)
    if names := [key for key in ("base", "use") if key in fragment.value]:
        raise SpecError([Problem(fragment.places[(key,)], key, "a fragment names no further files") for key in names])
    return fragment


def _resolve(file: Path) -> Path | None:
    """Return the real path of a file; None if there is no such file."""
    try:
        return file.resolve(strict=True) if file.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None
