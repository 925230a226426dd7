"""A reader of YAML 1.2 that refuses duplicate keys and knows the file, line and column of every value.

PyYAML alone reads ``1e-4`` as a string and ``off`` as False, and keeps the last of two equal keys: each would change an
experiment silently. ruamel.yaml reads ``1_000`` and ``2026-01-02`` as a number and a date, and ``-.5e1`` as a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from repa_lab.spec.errors import KeyPath, Place, Problem, SpecError, dotted

_MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_DIGITS = 100
HALF_PAIR = "half a surrogate pair is not text"
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
    builder = _Builder(file)
    try:
        node = yaml.compose(text, _CoreLoader)
        value = builder.build(node, ()) if node else None
    except yaml.YAMLError as error:
        raise SpecError([_syntax_problem(error, file, text)]) from None
    except RecursionError:
        raise SpecError([Problem(Place(file), "", f"nested more than {MAX_DEPTH} levels deep")]) from None
    if builder.problems:
        raise SpecError(builder.problems)
    return value, builder.places


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


def whole_characters(text: str) -> str | None:
    """Join escaped surrogate pairs, with which JSON writes an emoji; return None for half a pair, which is no text."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


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


def _syntax_problem(error: yaml.YAMLError, file: Path | None, text: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position].rpartition("\n")
        place = Place(file, text.count("\n", 0, error.position) + 1, len(before[2]) + 1)
        return Problem(place, "", f"not valid YAML: the character {text[error.position]!r} is not allowed")
    mark = getattr(error, "problem_mark", None)
    place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
    return Problem(place, "", f"not valid YAML: {getattr(error, 'problem', None) or error}")


@dataclass
class _Builder:
    """Turns parsed nodes into plain data and collects places and problems; an alias becomes a copy."""

    file: Path | None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES or len(path) > MAX_DEPTH:
            raise SpecError([Problem(self._place(node), "", f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels")])
        self.places.setdefault(path, self._place(node))
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return self._scalar(node, kind, path)
        return self._refuse(node, f"not valid YAML: could not determine a constructor for the tag {node.tag!r}")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, known: Collection[str] = ()) -> dict[str, Any]:
        """Return a mapping and what it merges with ``<<``, without the known keys; its own keys win."""
        value: dict[str, Any] = {}
        seen: dict[str, Place] = {}
        merged: list[yaml.Node] = []
        for key, inner in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, f"a key must be text, got a {key.id}", path)
                continue
            name, place = whole_characters(key.value), self._place(key)
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

    def _scalar(self, node: yaml.ScalarNode, kind: str, path: KeyPath) -> Any:
        pattern, make = _SCALARS[kind]
        if (text := whole_characters(node.value)) is None:
            return self._refuse(node, HALF_PAIR, path)
        if not re.fullmatch(pattern, text):
            return self._refuse(node, f"not valid YAML: {text!r} is not a valid {kind}")
        if kind != "str" and len(text) > MAX_DIGITS:
            return self._refuse(node, f"not valid YAML: a number of {len(text):,} digits")
        return make(text)

    def _refuse(self, node: yaml.Node, message: str, path: KeyPath = ()) -> None:
        self.problems.append(Problem(self._place(node), dotted(path), message))

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)
