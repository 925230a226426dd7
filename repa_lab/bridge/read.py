"""A SimpleTuner config as it is found, a JSON object or command-line flags with the place of every key, and as it is read."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.bridge.keys import (
    CREPA_MODEL,
    FAMILY_NAMES,
    IREPA,
    KEYS,
    NOT_CARRIED,
    PARTS,
    REST,
    SWITCHES,
    Key,
    Prefix,
    UnfitError,
)
from repa_lab.models.facts import Family
from repa_lab.models.families import family_facts
from repa_lab.spec.errors import Place, Problem, SpecError, did_you_mean

READABLE = {key.name: key for key in (*KEYS["crepa"], *KEYS["urepa"], *IREPA, *REST, *PARTS, *SWITCHES, CREPA_MODEL)}
PREFIXES = ("crepa_", "urepa_", "irepa_")
REGULARIZERS = {"crepa": "repa", "urepa": "urepa"}
_FITS = {"crepa": "transformer", "urepa": "unet"}
_MEGAPIXELS_BELOW = 64  # no image is so small, so the number is an area

_MAX_BYTES = 1 << 20
_LEFT_OUT = (None, "None", "null")
# A comma before a closing bracket, which that trainer's own examples have, but none inside a string.
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')
_FLAGS = re.compile(r"(\s*#[^\n]*\n)*\s*--")
_TOKEN = re.compile(r'("(?:\\.|[^"\\])*")(\s*:)?|[{}\[\]]')


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


def read_config(words: Sequence[str]) -> Given:
    """Read the words of a command line: the name of one file, or the flags themselves, quoted as one word or not.

    A file holds a JSON object or flags.

    Raises:
        SpecError: there is no such file, or it is neither; a key is given twice.
    """
    if words and words[0].lstrip().startswith("--"):
        return _from_flags(_split(words[0], None) if len(words) == 1 else words, None, "")
    if len(words) != 1:
        _refuse(None, f"expected one file, or flags such as --crepa_enabled=true; got {' '.join(words) or 'nothing'}")
    file = Path(words[0])
    text = _read_text(file)
    if _FLAGS.match(text):
        return _from_flags(_split(text.replace("\\\n", " "), file), file, text)
    return _from_json(text, file)


@dataclass(frozen=True)
class Reading:
    """A config whose values are sound, one by one.

    Attributes:
        given: the config.
        values: the known keys that it has, as they are called and written here.
        prefix: of the regularizer that is on, or None.
        irepa: whether iREPA is on as well.
        family: the facts of ``model_family``, or None if it names none.
    """

    given: Given
    values: Mapping[str, Any]
    prefix: Prefix | None
    irepa: bool
    family: Family | None

    def value(self, key: Key) -> Any:
        """What a key says here, that trainer's default if it is left out."""
        return self.values.get(key.name, None if key.default is None else key.read(key.default))

    def part(self, name: str) -> Any:
        """The same by a key's name."""
        return self.value(READABLE[name])

    def is_on(self, name: str) -> bool:
        """Whether a key has an effect there: its regularizer is on, or it is of none."""
        on = {f"{self.prefix}_", "irepa_" if self.irepa else ""}
        return not name.startswith(PREFIXES) or name[:6] in on or name[6:] == "enabled"

    @property
    def source(self) -> str:
        """What the config is called in a sentence."""
        return str(self.given.file or "the flags")

    @property
    def resolution(self) -> int:
        """Pixels along each side of a square image of the resolution, which may be an area in megapixels."""
        given: float = self.part("resolution")
        if self.part("resolution_type") == "area" or given < _MEGAPIXELS_BELOW:
            return 64 * round(16 * math.sqrt(max(given, 0)))
        return round(given)

    @property
    def averages(self) -> bool:
        """Whether there is an average of the weights: it is on, or its decay is given and it is not off."""
        return bool(self.values.get("use_ema", "ema_decay" in self.values))


def read(given: Given) -> Reading:
    """Read every known key.

    Raises:
        SpecError: for values that a key cannot have, keys of the regularizers that do not exist, a family that the lab does
            not know, and a regularizer that does not fit it; all of them at once.
    """
    values, problems = _convert(given)
    problems += _unknown(given)
    family = None
    try:
        family = _family(values.get("model_family"))
    except ValueError as error:
        problems.append(given.problem("model_family", str(error)))
    problems += _switch_problems(given, values, family)
    if problems:
        raise SpecError(problems)
    prefix = next((prefix for prefix in KEYS if values.get(f"{prefix}_enabled")), None)
    return Reading(given, values, prefix, bool(values.get("irepa_enabled")), family)


def _convert(given: Given) -> tuple[dict[str, Any], list[Problem]]:
    values, problems = {}, []
    for name in given.values.keys() & READABLE.keys():
        try:
            values[name] = READABLE[name].read(given.values[name])
        except UnfitError as error:
            shown = json.dumps(given.values[name], ensure_ascii=False)[:100]
            problems.append(given.problem(name, f"expected {error.wish}, got {shown}{error.hint}"))
    return values, problems


def _unknown(given: Given) -> Iterator[Problem]:
    known = [name for name in (*READABLE, *NOT_CARRIED) if name.startswith(PREFIXES)]
    for name in given.values:
        if name.startswith(PREFIXES) and name not in known:
            allowed = ", ".join(key for key in known if key.startswith(name[:6]))
            yield given.problem(name, f"that trainer has no such key; allowed: {allowed}{did_you_mean(name, known)}")


def _family(name: str | None) -> Family | None:
    if name is None:
        return None
    ours = name.lower().replace("-", "_")
    try:
        return family_facts(ours)
    except ValueError:
        if ours in FAMILY_NAMES:
            return family_facts(FAMILY_NAMES[ours])
        raise


def _switch_problems(given: Given, values: Mapping[str, Any], family: Family | None) -> Iterator[Problem]:
    on = [prefix for prefix in KEYS if values.get(f"{prefix}_enabled")]
    if len(on) > 1:
        yield given.problem("urepa_enabled", "crepa_enabled is true as well; a run has one regularizer: leave one of them out")
    elif on and family is not None and family.kind != _FITS[on[0]]:
        kind, other = ("a UNet", "urepa_*") if family.kind == "unet" else ("a transformer", "crepa_*")
        fits = "transformers" if on[0] == "crepa" else "UNets"
        message = f"{REGULARIZERS[on[0]]} is for {fits}; {family.name} is {kind}: use {other}"
        yield given.problem(f"{on[0]}_enabled", message)
    if values.get("irepa_enabled") and not on:
        yield given.problem("irepa_enabled", "iREPA needs REPA or U-REPA: set crepa_enabled or urepa_enabled as well")


def _refuse(file: Path | None, message: str, line: int = 1, column: int = 1) -> NoReturn:
    raise SpecError([Problem(Place(file, line, column), "", printable(message))])


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_BYTES:
            _refuse(file, f"a config may have at most {_MAX_BYTES:,} bytes")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(file, f"not UTF-8 text: {error.reason} at byte {error.start}")
    except OSError as error:
        _refuse(file, f"cannot read the file: {error.strerror}")


def _from_json(text: str, file: Path) -> Given:
    text = _TRAILING_COMMA.sub(lambda match: match[1] or " ", text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg[:1].lower()}{error.msg[1:]}"
        _refuse(file, f"{message}; a config is a JSON object, or flags such as --crepa_enabled=true", error.lineno, error.colno)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"not valid JSON: {error}")
    if not isinstance(value, dict):
        _refuse(file, 'a config must be a JSON object of settings, such as {"crepa_enabled": true}')
    keys = list(_top_keys(text, file))
    return _given(file, [(_bare(key), value[key], place) for key, place in keys])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _top_keys(text: str, file: Path) -> Iterator[tuple[str, Place]]:
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[1] is None:
            depth += 1 if token[0] in "{[" else -1
        elif depth == 1 and token[2]:
            line, before = text.count("\n", 0, token.start()) + 1, text.rfind("\n", 0, token.start())
            yield json.loads(token[1]), Place(file, line, token.start() - before)


def _split(text: str, file: Path | None) -> list[str]:
    try:
        return shlex.split(text, comments=file is not None)
    except ValueError as error:
        _refuse(file, f"not a list of flags: {str(error).lower()}")


def _from_flags(words: Sequence[str], file: Path | None, text: str) -> Given:
    found: list[tuple[str, Any, Place]] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or not _bare(flag):
            _refuse(file, f"expected a flag such as --crepa_lambda=0.5, got {word!r}")
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
    return key.strip().lstrip("-")


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
