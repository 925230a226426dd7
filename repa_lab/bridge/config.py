"""Read a SimpleTuner config, a JSON object or command-line flags, and the image data set that it names."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from repa_lab.bridge.simpletuner import (
    ALIASES,
    DATA_SET,
    FAMILY_NAMES,
    FLAVOURS,
    KEYS,
    NOT_CARRIED,
    READABLE,
    REFUSED,
    Key,
    Prefix,
    UnfitError,
    find_flavour,
)
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family
from repa_lab.registry import did_you_mean
from repa_lab.spec.errors import KeyPath, Place, Problem, SpecError
from repa_lab.spec.yaml import parse_yaml, read_text

PREFIXES = ("crepa_", "urepa_", "irepa_")
REGULARIZERS = {"crepa": "repa", "urepa": "urepa"}
_NULLS = (None, "None", "null")
_FLAGS = re.compile(r"(\s*#[^\n]*\n)*\s*--")
_SAVED = "config"  # the key under which SimpleTuner's web interface saves the settings, beside `_metadata`
_MEGAPIXELS_BELOW = 64  # no image is this small: a smaller resolution is an area in megapixels


# ---- the text of a config


@dataclass(frozen=True)
class ConfigText:
    """The keys of a config as written, without leading dashes and without nulls, and the place of every key."""

    file: Path | None
    values: dict[str, Any]
    places: dict[str, Place]

    def problem(self, key: str, message: str) -> Problem:
        """Return a problem at a key's place."""
        return Problem(self.places.get(key, Place(self.file)), printable(key), printable(message))


def printable(text: str) -> str:
    """Replace characters that would end a line or control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _unfit(value: Any, error: UnfitError) -> str:
    return printable(f"expected {error.expected}, got {json.dumps(value, ensure_ascii=False)[:100]}{error.hint}")


def _refuse(file: Path | None, message: str) -> NoReturn:
    raise SpecError([Problem(Place(file, 1, 1), "", printable(message))])


def read_text_of(words: Sequence[str]) -> ConfigText:
    """Read the words of a command line: the name of one file, or the flags themselves, quoted as one word or not.

    Args:
        words: a file holds a JSON object or flags.

    Raises:
        SpecError: there is no such file, it holds neither, or a key is given twice.
    """
    if words and words[0].lstrip().startswith("--"):
        return _from_flags(_split(words[0], None) if len(words) == 1 else words, None, "")
    if len(words) != 1:
        _refuse(None, f"expected one file, or flags such as --crepa_enabled=true; got {' '.join(words) or 'nothing'}")
    file = Path(words[0])
    text = read_text(file, "config")
    if _FLAGS.match(text):
        return _from_flags(_split(text.replace("\\\n", " "), file), file, text)
    value, places = _parse_json(text, file)
    if not isinstance(value, dict):
        _refuse(file, 'a config must be a JSON object of settings, such as {"crepa_enabled": true}')
    is_saved = isinstance(value.get(_SAVED), dict)
    settings, parent = (value[_SAVED], (_SAVED,)) if is_saved else (value, ())
    return _config_text(file, [(_bare(key), inner, places[(*parent, key)]) for key, inner in settings.items()])


def _parse_json(text: str, file: Path) -> tuple[Any, dict[KeyPath, Place]]:
    """Parse JSON as YAML, which allows a trailing comma. YAML refuses tabs; a JSON string contains none either."""
    try:
        return parse_yaml(text.replace("\t", " "), file)
    except SpecError as error:
        problems = [
            replace(problem, path=printable(problem.path), message=printable(problem.message))
            for problem in error.problems
        ]
        renamed = [replace(p, message=p.message.replace("not valid YAML", "not valid JSON", 1)) for p in problems]
        raise SpecError(renamed) from None


def _split(text: str, file: Path | None) -> list[str]:
    try:
        return shlex.split(text, comments=file is not None)
    except ValueError as error:
        _refuse(file, f"not a list of flags: {str(error).lower()}")


def _from_flags(words: Sequence[str], file: Path | None, text: str) -> ConfigText:
    entries: list[tuple[str, Any, Place]] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or not _bare(flag):
            _refuse(file, f"expected a flag such as --crepa_lambda=0.5, got {word!r}")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        place, match = Place(file), re.search(rf"(?<!\S){re.escape(flag)}(?![\w-])", text)
        if match is not None:
            start = match.start()
            place = Place(file, text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start))
        entries.append((_bare(flag), value, place))
    return _config_text(file, entries)


def _bare(key: str) -> str:
    name = key.strip().lstrip("-")
    return ALIASES.get(name, name)


def _config_text(file: Path | None, entries: list[tuple[str, Any, Place]]) -> ConfigText:
    keys = [key for key, *_ in entries]
    repeated = [Problem(place, key, "given twice") for n, (key, _, place) in enumerate(entries) if key in keys[:n]]
    if repeated:
        raise SpecError(repeated)
    values = {key: value for key, value, _ in entries if value not in _NULLS}
    return ConfigText(file, values, {key: place for key, _, place in entries})


# ---- the image data set


@dataclass(frozen=True)
class DataSet:
    """The first image data set of a data backend's file.

    Attributes:
        file: the data backend's file.
        name: the data set's ``id``.
        values: its values of the keys in `DATA_SET`, converted to those of repa-lab.
        kind: where the images are if not in a local folder, such as ``huggingface``.
        captions: its ``caption_strategy``, or None.
        others: the names of the other image data sets, for which a spec has no field.
    """

    file: Path
    name: str
    values: Mapping[str, Any]
    kind: str | None = None
    captions: str | None = None
    others: tuple[str, ...] = ()

    @property
    def folder(self) -> str | None:
        """The folder of images, or None if the images are elsewhere."""
        return None if self.kind else self.values.get("instance_data_dir")

    @property
    def keeps_aspect(self) -> bool:
        """Whether images are not cropped to squares."""
        return self.values.get("crop") is False or self.values.get("crop_aspect", "square") != "square"


def read_data_set(config: ConfigText) -> DataSet | None:
    """Return the first enabled image data set of the data backend's file; None if there is no such file or data set.

    The file is searched as given, in the config's folder, and under the folders above it, because SimpleTuner is
    started in one of those.

    Raises:
        SpecError: the file is no list of data sets, or a value in it has the wrong type.
    """
    name = config.values.get("data_backend_config")
    path = _find(Path(name), config.file) if isinstance(name, str) else None
    if path is None:
        return None
    file, root = path
    backends, places = _parse_json(read_text(file, "data backend's file"), file)
    if not isinstance(backends, list) or not all(isinstance(backend, dict) for backend in backends):
        _refuse(file, "a data backend's file is a JSON list of data sets, each an object")
    images = [number for number, backend in enumerate(backends) if _has_images(backend)]
    if not images:
        return None
    # Regularisation images only accompany the images that are to be learned.
    number = next((image for image in images if not backends[image].get("is_regularisation_data")), images[0])
    backend, values, problems = backends[number], {}, []
    for key in DATA_SET:
        if backend.get(key.name) not in (None, ""):
            try:
                values[key.name] = key.read(backend[key.name])
            except UnfitError as error:
                problems.append(Problem(places[number, key.name], key.name, _unfit(backend[key.name], error)))
    if problems:
        raise SpecError(problems)
    folder = values.get("instance_data_dir")
    if folder is not None and not _exists(Path(folder)) and _exists(root / folder):
        values["instance_data_dir"] = str(root / folder)
    kind, captions = (backend.get(key) and str(backend[key]) for key in ("type", "caption_strategy"))
    names = {image: printable(str(backends[image].get("id", "without an id"))) for image in images}
    others = tuple(name for image, name in names.items() if image != number)
    return DataSet(file, names[number], values, None if kind in (None, "local") else kind, captions, others)


def _find(name: Path, config: Path | None) -> tuple[Path, Path] | None:
    """Return the file, and the folder that its name is relative to."""
    folders = [Path(), *(config.resolve().parents if config else ())]
    candidates = [(folder / name, folder) for folder in folders]
    if config:
        candidates.append((config.resolve().parent / name.name, config.resolve().parent))
    return next(((file, folder) for file, folder in candidates if _exists(file) and file.is_file()), None)


def _has_images(backend: Mapping[str, Any]) -> bool:
    return backend.get("dataset_type", "image") == "image" and not (backend.get("disabled") or backend.get("disable"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


# ---- the config


@dataclass(frozen=True)
class Config:
    """A config in which every single value is valid.

    Attributes:
        text: the config as written.
        values: its known keys, with values converted to those of repa-lab.
        prefix: of the regularizer that is on, or None.
        irepa: whether iREPA is on as well.
        family: the facts of ``model_family``, or None if the config names none.
        data_set: the images that ``data_backend_config`` names, or None if that file is not at hand.
    """

    text: ConfigText
    values: Mapping[str, Any]
    prefix: Prefix | None
    irepa: bool
    family: Family | None
    data_set: DataSet | None = None

    def value(self, key: Key | str) -> Any:
        """Return a key's value, converted; SimpleTuner's default if the key is left out."""
        key = READABLE[key] if isinstance(key, str) else key
        return self.values.get(key.name, None if key.default is None else key.read(key.default))

    @property
    def uncheckpointed(self) -> str:
        """Why the family's blocks cannot be checkpointed; empty if they can."""
        network = self.family.network if self.family else None
        return network.uncheckpointed if network else ""

    def is_on(self, name: str) -> bool:
        """Return whether a key has an effect in SimpleTuner: its regularizer is on, or it belongs to none."""
        on = {f"{self.prefix}_", "irepa_" if self.irepa else ""}
        return not name.startswith(PREFIXES) or name[:6] in on or name[6:] == "enabled"

    @property
    def source(self) -> str:
        """The config's name in a sentence."""
        return str(self.text.file or "the flags")

    @property
    def flavour(self) -> str | None:
        """The flavour of the family in SimpleTuner's spelling; the first known one if the config names none."""
        if self.family is None or self.family.name not in FLAVOURS:
            return None
        name = self.value("model_flavour")
        return find_flavour(self.family.name, name) if name else next(iter(FLAVOURS[self.family.name]))

    @property
    def pretrained(self) -> str | None:
        """The pipeline that is trained: the one that the config names, else the flavour's; None if neither is known."""
        named: str | None = self.value("pretrained_model_name_or_path")
        if named or self.family is None:
            return named
        if self.flavour:
            return FLAVOURS[self.family.name][self.flavour]
        return self.family.pipeline.released if self.family.pipeline else None

    @property
    def resolution(self) -> int:
        """Side in pixels of a square image of the resolution, which may be an area in megapixels."""
        values = self.data_set.values if self.data_set else {}
        resolution: float = values.get("resolution", self.value("resolution"))
        kind = values.get("resolution_type", self.value("resolution_type"))
        if kind == "area" or resolution < _MEGAPIXELS_BELOW:
            return 64 * round(16 * math.sqrt(max(resolution, 0)))
        return round(resolution)

    @property
    def averages(self) -> bool:
        """Whether weights are averaged: ``use_ema`` is on, or a decay is given and ``use_ema`` is not off."""
        return bool(self.values.get("use_ema", "ema_decay" in self.values))


def read_config(words: Sequence[str]) -> Config:
    """Read a config and every known key in it.

    Args:
        words: the name of one file, or flags; see :func:`read_text_of`.

    Raises:
        SpecError: with every problem at once: invalid values, unknown keys of the regularizers, an unknown family, a
            regularizer that does not fit the family.
    """
    text = read_text_of(words)
    values, problems = {}, []
    for name in text.values.keys() & READABLE.keys():
        try:
            values[name] = READABLE[name].read(text.values[name])
        except UnfitError as error:
            problems.append(text.problem(name, _unfit(text.values[name], error)))
    problems += _unknown_keys(text)
    family = None
    if "model_family" in values:
        family_name = values["model_family"].lower().replace("-", "_")
        try:
            family = FAMILIES[FAMILY_NAMES.get(family_name, family_name)]
        except ValueError as error:
            problems.append(text.problem("model_family", str(error)))
    problems += _flavour_problems(text, values, family)
    problems += _switch_problems(text, values, family)
    if problems:
        raise SpecError(problems)
    prefix = next((prefix for prefix in KEYS if values.get(f"{prefix}_enabled")), None)
    return Config(text, values, prefix, bool(values.get("irepa_enabled")), family, read_data_set(text))


def _unknown_keys(text: ConfigText) -> Iterator[Problem]:
    known = [name for name in (*READABLE, *NOT_CARRIED) if name.startswith(PREFIXES)]
    for name in text.values:
        if name.startswith(PREFIXES) and name not in known:
            allowed = ", ".join(key for key in known if key.startswith(name[:6]))
            yield text.problem(name, f"SimpleTuner has no such key; allowed: {allowed}{did_you_mean(name, known)}")


def _flavour_problems(text: ConfigText, values: Mapping[str, Any], family: Family | None) -> Iterator[Problem]:
    name = values.get("model_flavour")
    if name is None or family is None or family.name not in FLAVOURS:
        return
    known, flavours = find_flavour(family.name, name), FLAVOURS[family.name]
    allowed = f"allowed: {', '.join(flavours)}"
    if known is None:
        message = f"unknown flavour '{name}' of {family.name}; {allowed}{did_you_mean(name, flavours)}"
        yield text.problem("model_flavour", message)
    elif known not in flavours:
        message = f"repa-lab does not train '{known}': {REFUSED[family.name][known]}; {allowed}"
        yield text.problem("model_flavour", message)


def _switch_problems(text: ConfigText, values: Mapping[str, Any], family: Family | None) -> Iterator[Problem]:
    on = [prefix for prefix in KEYS if values.get(f"{prefix}_enabled")]
    if len(on) > 1:
        message = "crepa_enabled is true as well; a run has one regularizer: leave one of them out"
        yield text.problem("urepa_enabled", message)
    elif on and family is not None and family.kind != ("transformer" if on[0] == "crepa" else "unet"):
        kind, other = ("a UNet", "urepa_*") if family.kind == "unet" else ("a transformer", "crepa_*")
        kinds = "transformers" if on[0] == "crepa" else "UNets"
        message = f"{REGULARIZERS[on[0]]} is for {kinds}; {family.name} is {kind}: use {other}"
        yield text.problem(f"{on[0]}_enabled", message)
    if values.get("irepa_enabled") and not on:
        yield text.problem("irepa_enabled", "iREPA needs REPA or U-REPA: set crepa_enabled or urepa_enabled as well")
