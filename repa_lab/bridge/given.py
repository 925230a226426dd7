"""A SimpleTuner config as it stands: a JSON object or command-line flags, with the place of every key."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.bridge.keys import ALIASES, UnfitError
from repa_lab.spec.errors import KeyPath, Place, Problem, SpecError
from repa_lab.spec.yaml import parse_yaml, read_text

_LEFT_OUT = (None, "None", "null")
_FLAGS = re.compile(r"(\s*#[^\n]*\n)*\s*--")
_SAVED = "config"  # the key under which SimpleTuner's web interface saves the settings, beside `_metadata`


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
    text = read_text(file, "config")
    if _FLAGS.match(text):
        return _from_flags(_split(text.replace("\\\n", " "), file), file, text)
    return _from_json(text, file)


def refuse(file: Path | None, message: str, line: int = 1, column: int = 1) -> NoReturn:
    """Raise a SpecError with one problem."""
    raise SpecError([Problem(Place(file, line, column), "", printable(message))])


def _from_json(text: str, file: Path) -> Given:
    value, places = parse_json(text, file)
    if not isinstance(value, dict):
        refuse(file, 'a config must be a JSON object of settings, such as {"crepa_enabled": true}')
    is_saved = isinstance(value.get(_SAVED), dict)
    settings, above = (value[_SAVED], (_SAVED,)) if is_saved else (value, ())
    return _given(file, [(_bare(key), inner, places[(*above, key)]) for key, inner in settings.items()])


def parse_json(text: str, file: Path) -> tuple[Any, dict[KeyPath, Place]]:
    """Parse JSON as YAML, which forgives a last comma but indents with no tabs; a string in JSON has none either.

    Raises:
        SpecError: the text is neither.
    """
    try:
        return parse_yaml(text.replace("\t", " "), file)
    except SpecError as error:
        told = ((problem, problem.message.replace("not valid YAML", "not valid JSON", 1)) for problem in error.problems)
        raise SpecError(replace(p, path=printable(p.path), message=printable(message)) for p, message in told) from None


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
