"""YAML with places: YAML 1.2 core rules, duplicate keys refused, and the file, line and column of every value.

PyYAML alone reads ``1e-4`` as a string, ``off`` as False and keeps the last of two equal keys: each would change an
experiment without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from repa_lab.spec.errors import Path_, Place, Problem, SpecError

_MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_DIGITS = 100


@dataclass(frozen=True)
class Document:
    """A YAML file as plain data, with the place of every value by its path."""

    file: Path
    value: dict[str, Any]
    places: dict[Path_, Place]


class _CoreLoader(yaml.SafeLoader):
    """A safe loader whose plain scalars resolve by the YAML 1.2 core schema, and which knows no other tags."""


def _add_scalar(kind: str, pattern: str, first: list[str], make: Callable[[str], Any]) -> None:
    """Teach the loader one kind of scalar; the pattern also holds where a tag such as ``!!int`` asks for the kind."""

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        if not re.fullmatch(pattern, text):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not a valid {kind}", node.start_mark)
        if len(text) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text):,} digits", node.start_mark)
        return make(text)

    _CoreLoader.add_implicit_resolver(_TAG + kind, re.compile(rf"^(?:{pattern})$"), first)
    _CoreLoader.add_constructor(_TAG + kind, construct)


def _make_int(text: str) -> int:
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


def _make_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_CoreLoader.yaml_implicit_resolvers = {}
_CoreLoader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag in (None, f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map")
}
_add_scalar("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None)
_add_scalar("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true")
_add_scalar("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789"), _make_int)
_add_scalar("float", _FLOAT, list("-+.0123456789"), _make_float)


def read_yaml(file: Path) -> Document:
    """Read a YAML file whose top is a mapping.

    Raises:
        SpecError: the file is missing, too large, not YAML, or has duplicate keys; every problem found is reported.
    """
    text = _read_text(file)
    loader: _CoreLoader | None = None
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise SpecError([Problem(Place(file), "", "a spec must be a mapping of fields, such as 'name: my_question'")])
        places, problems = _survey(node, file)
        if problems:
            raise SpecError(problems)
        value = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise SpecError([_syntax_problem(error, file, text)]) from None
    except RecursionError:
        raise SpecError([Problem(Place(file), "", f"nested more than {MAX_DEPTH} levels deep")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    return Document(file, value, places)


def parse_scalar(text: str) -> Any:
    """One value as it would be read in a YAML file: ``1e-4`` is a float, ``[1, 2]`` a list.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not a YAML value: {text!r}") from error


def reads_as_text(value: str) -> bool:
    """Whether a text may stand in a YAML file without quotes, on one line."""
    try:
        return value.isprintable() and parse_scalar(value) == value
    except ValueError:
        return False


def is_text(value: str) -> bool:
    """Whether a string can be written to a file: an escape such as ``\\ud800`` makes one that cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _read_text(file: Path) -> str:
    def problem(message: str) -> SpecError:
        return SpecError([Problem(Place(file), "", message)])

    try:
        size = file.stat().st_size
        if size <= _MAX_BYTES:
            return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise problem(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        raise problem(f"cannot read the file: {getattr(error, 'strerror', None) or error}") from None
    raise problem(f"a spec may have at most {_MAX_BYTES:,} bytes; this file has {size:,}")


def _syntax_problem(error: yaml.YAMLError, file: Path, text: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line, start = text.count("\n", 0, error.position), text.rfind("\n", 0, error.position)
        place = Place(file, line + 1, error.position - start)
        return Problem(place, "", f"not valid YAML: the character {text[error.position]!r} is not allowed")
    mark = getattr(error, "problem_mark", None)
    place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
    return Problem(place, "", f"not valid YAML: {getattr(error, 'problem', None) or error}")


def _survey(root: yaml.Node, file: Path) -> tuple[dict[Path_, Place], list[Problem]]:
    """Places of all values, and the keys that are duplicate or not text; aliases count each time they are used."""
    places: dict[Path_, Place] = {}
    problems: list[Problem] = []
    stack: list[tuple[yaml.Node, Path_]] = [(root, ())]
    while stack:
        node, path = stack.pop()
        places.setdefault(path, _place(node, file))
        if len(places) > MAX_NODES or len(path) > MAX_DEPTH:
            raise SpecError([Problem(_place(node, file), "", f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels")])
        if isinstance(node, yaml.MappingNode):
            problems += _bad_keys(node, path, file)
            for key, value in node.value:
                places[(*path, str(key.value))] = _place(key, file)
                stack.append((value, (*path, str(key.value))))
        elif isinstance(node, yaml.ScalarNode) and not is_text(node.value):
            problems.append(Problem(_place(node, file), ".".join(map(str, path)), "half a surrogate pair is not text"))
        elif isinstance(node, yaml.SequenceNode):
            stack += [(item, (*path, index)) for index, item in enumerate(node.value)]
    return places, problems


def _bad_keys(node: yaml.MappingNode, path: Path_, file: Path) -> Iterator[Problem]:
    first: dict[Hashable, yaml.Node] = {}
    for key, _ in node.value:
        where = ".".join(map(str, path))
        if not isinstance(key, yaml.ScalarNode):
            yield Problem(_place(key, file), where, f"a key must be text, got a {key.id}")
        elif key.tag != f"{_TAG}str" or not is_text(key.value):
            yield Problem(_place(key, file), where, f"a key must be text, got {key.value!r}; quote it")
        elif key.value in first:
            line = first[key.value].start_mark.line + 1
            message = f"duplicate key '{key.value}', first given on line {line}"
            yield Problem(_place(key, file), ".".join(map(str, (*path, key.value))), message)
        else:
            first[key.value] = key


def _place(node: yaml.Node, file: Path) -> Place:
    return Place(file, node.start_mark.line + 1, node.start_mark.column + 1)
