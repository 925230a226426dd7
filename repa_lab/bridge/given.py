"""A SimpleTuner config as it stands: a JSON object or command-line flags, with the place of every key."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.bridge.keys import ALIASES, UnfitError
from repa_lab.spec.errors import Place, Problem, SpecError

_MAX_BYTES = 1 << 20
_LEFT_OUT = (None, "None", "null")
# A comma before a closing bracket, which SimpleTuner's own examples have, but none inside a string.
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')
_FLAGS = re.compile(r"(\s*#[^\n]*\n)*\s*--")
_TOKEN = re.compile(r'("(?:\\.|[^"\\])*")(\s*:)?|[{}\[\]]')
_SAVED = "config"  # the key under which SimpleTuner's web interface saves the settings, beside `_metadata`


JsonPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Given:
    """The keys of a config without leading dashes, as they stand there; what is null is left out."""

    file: Path | None
    values: dict[str, Any]
    places: dict[str, Place]

    def problem(self, key: str, message: str) -> Problem:
        """Something to say of a key, at its place."""
        return Problem(self.places.get(key, Place(self.file)), printable(key), printable(message))


def printable(text: str) -> str:
    """Text that ends no line and steers no terminal, whatever a config holds."""
    return "".join(character if character.isprintable() else " " for character in text)


def unfit(value: Any, error: UnfitError) -> str:
    """What to say of a value that a key cannot have."""
    return printable(f"expected {error.wish}, got {json.dumps(value, ensure_ascii=False)[:100]}{error.hint}")


def read_config(words: Sequence[str]) -> Given:
    """Read the words of a command line: the name of one file, or the flags themselves, quoted as one word or not.

    A file holds a JSON object or flags.

    Raises:
        SpecError: there is no such file, or it is neither; a key is given twice.
    """
    if words and words[0].lstrip().startswith("--"):
        return _from_flags(_split(words[0], None) if len(words) == 1 else words, None, "")
    if len(words) != 1:
        refuse(None, f"expected one file, or flags such as --crepa_enabled=true; got {' '.join(words) or 'nothing'}")
    file = Path(words[0])
    text = read_text(file)
    if _FLAGS.match(text):
        return _from_flags(_split(text.replace("\\\n", " "), file), file, text)
    return _from_json(text, file)


def refuse(file: Path | None, message: str, line: int = 1, column: int = 1) -> NoReturn:
    """Raise a SpecError with one problem."""
    raise SpecError([Problem(Place(file, line, column), "", printable(message))])


def read_text(file: Path) -> str:
    """Return a file's text.

    Raises:
        SpecError: it is too large, cannot be read, or is not UTF-8.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            refuse(file, f"a config may have at most {_MAX_BYTES:,} bytes")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(file, f"not UTF-8 text: {error.reason} at byte {error.start}")
    except OSError as error:
        refuse(file, f"cannot read the file: {error.strerror}")


def _from_json(text: str, file: Path) -> Given:
    value, places = parse_json(text, file)
    if not isinstance(value, dict):
        refuse(file, 'a config must be a JSON object of settings, such as {"crepa_enabled": true}')
    is_saved = isinstance(value.get(_SAVED), dict)
    settings, above = (value[_SAVED], (_SAVED,)) if is_saved else (value, ())
    keys = [(str(path[-1]), place) for path, place in places if path[:-1] == above]
    return _given(file, [(_bare(key), settings[key], place) for key, place in keys])


def parse_json(text: str, file: Path) -> tuple[Any, list[tuple[JsonPath, Place]]]:
    """Parse JSON in which a last comma is forgiven.

    Returns:
        The value, and every key's path of keys and list indices with its place, in the order of the file.

    Raises:
        SpecError: it is no JSON.
    """
    text = _TRAILING_COMMA.sub(lambda match: match[1] or " ", text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg[:1].lower()}{error.msg[1:]}"
        refuse(file, f"{message}; a config is a JSON object, or flags such as --crepa_enabled=true", error.lineno, error.colno)
    except (ValueError, RecursionError) as error:
        refuse(file, f"not valid JSON: {error}")
    return value, list(_places(text, file))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _places(text: str, file: Path) -> Iterator[tuple[JsonPath, Place]]:
    """The path and place of every key in valid JSON; a list counts the objects and lists in it."""
    path: list[str | int] = []
    for token in _TOKEN.finditer(text):
        if token[0] in ("}", "]"):
            path.pop()
        elif token[1] is None:
            if path and isinstance(path[-1], int):
                path[-1] += 1
            path.append(-1 if token[0] == "[" else "")
        elif token[2]:
            path[-1] = json.loads(token[1])
            line, before = text.count("\n", 0, token.start()) + 1, text.rfind("\n", 0, token.start())
            yield tuple(path), Place(file, line, token.start() - before)


def _split(text: str, file: Path | None) -> list[str]:
    try:
        return shlex.split(text, comments=file is not None)
    except ValueError as error:
        refuse(file, f"not a list of flags: {str(error).lower()}")


def _from_flags(words: Sequence[str], file: Path | None, text: str) -> Given:
    found: list[tuple[str, Any, Place]] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or not _bare(flag):
            refuse(file, f"expected a flag such as --crepa_lambda=0.5, got {word!r}")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        found.append((_bare(flag), value, _place_of(flag, file, text)))
    return _given(file, found)


def _place_of(flag: str, file: Path | None, text: str) -> Place:
    match = re.search(rf"(?<!\S){re.escape(flag)}(?![\w-])", text)
    if match is None:
        return Place(file)
    return Place(file, text.count("\n", 0, match.start()) + 1, match.start() - text.rfind("\n", 0, match.start()))


def _bare(key: str) -> str:
    name = key.strip().lstrip("-")
    return ALIASES.get(name, name)


def _given(file: Path | None, found: list[tuple[str, Any, Place]]) -> Given:
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    problems = []
    for key, value, place in found:
        if key in places:
            problems.append(Problem(place, key, "given twice"))
        values[key], places[key] = value, place
    if problems:
        raise SpecError(problems)
    return Given(file, {key: value for key, value in values.items() if value not in _LEFT_OUT}, places)
