"""Read a SimpleTuner config, a JSON object or command-line flags, and the image data set that it names."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from repa_lab.bridge import simpletuner
from repa_lab.bridge.simpletuner import ADDED, Key, Prefix
from repa_lab.errors import KeyPath, Place, Problem, SpecError
from repa_lab.models.families import FAMILIES
from repa_lab.models.family import Family
from repa_lab.registry import did_you_mean
from repa_lab.spec.document import parse_yaml, read_text
from repa_lab.spec.schema import expectation

PREFIXES = ("crepa_", "urepa_", "irepa_", *(kind.prefix for kind in ADDED.values()))
_DISTILLATION, _TRANSCENDENCE = "distillation_config", "self_transcendence"
REGULARIZERS = {"crepa": "repa", "urepa": "urepa"}
_NULLS = (None, "None", "null")
_SAVED = "config"  # the key under which SimpleTuner's web interface saves the settings, beside `_metadata`
_MEGAPIXELS_BELOW = 64  # no image is this small: a smaller resolution is an area in megapixels
_Entry = tuple[str, Any, Place]  # a key, its value and its place


@dataclass(frozen=True)
class DataSet:
    """The first data set of images, or of videos, of a data backend's file.

    Attributes:
        name: its ``id`` and its file, for messages.
        values: its values of the keys in `DATA_SET`, converted.
        kind: where the images are, ``local`` or such as ``huggingface``.
        others: the names of the other image data sets, for which a spec has no field.
    """

    name: str
    values: Mapping[str, Any]
    kind: str
    captions: str
    others: tuple[str, ...]

    @property
    def folder(self) -> str | None:
        """The folder of images, or None if the images are elsewhere."""
        return self.values.get("instance_data_dir") if self.kind == "local" else None

    @property
    def keeps_aspect(self) -> bool:
        """Whether images are not cropped to squares."""
        return self.values.get("crop") is False or self.values.get("crop_aspect", "square") != "square"


@dataclass(frozen=True)
class Config:
    """A config in which every single value is valid.

    Attributes:
        file: the config's file; None for flags.
        given: its keys as written, without leading dashes and without nulls.
        values: its known keys, with values converted to those of repa-lab.
        prefix: of the regularizer that is on, or None.
        data_set: the images that ``data_backend_config`` names, or None if that file is not at hand.
    """

    file: Path | None
    given: Mapping[str, Any]
    places: Mapping[str, Place]
    values: Mapping[str, Any]
    prefix: Prefix | None
    family: Family | None
    data_set: DataSet | None

    def value(self, name: str) -> Any:
        """Return a key's value, converted; SimpleTuner's default if the key is left out."""
        key = simpletuner.READABLE[name]
        return self.values.get(name, None if key.default is None else key.read(key.default))

    def fields(self, keys: Iterable[Key]) -> dict[str, Any]:
        """Return the values of keys by their fields."""
        return {key.field: self.value(key.name) for key in keys}

    def problem(self, key: str, message: str) -> Problem:
        """Return a problem, or a remark, at a key's place."""
        return Problem(self.places.get(key, Place(self.file)), key, message)

    @property
    def is_video(self) -> bool:
        """Whether clips are trained on; without a family, whether a key relates their frames."""
        if self.family is not None:
            return self.family.is_video
        return any(key.name in self.values for key in (*simpletuner.FRAMES, simpletuner.CUMULATIVE))

    @property
    def regularizer(self) -> str | None:
        """The type of the regularizer that is on, or None."""
        return "crepa" if self.prefix == "crepa" and self.is_video else self.prefix and REGULARIZERS[self.prefix]

    @property
    def irepa(self) -> bool:
        """Whether iREPA is on as well."""
        return bool(self.value("irepa_enabled"))

    @property
    def added(self) -> tuple[str, ...]:
        """The types of the regularizers that are on beside that of ``prefix``."""
        return tuple(kind for kind, added in ADDED.items() if self.values.get(added.switch))

    @property
    def prefixes(self) -> list[str]:
        """The prefixes of the keys of each regularizer that is on."""
        added = [ADDED[kind].prefix for kind in self.added]
        return [f"{self.prefix}_", *added] if self.prefix else added

    def is_on(self, name: str) -> bool:
        """Return whether a key has an effect in SimpleTuner: its regularizer is on, or it belongs to none."""
        on = (*self.prefixes, *(["irepa_"] if self.irepa else []))
        return not name.startswith(PREFIXES) or name.startswith(on) or name.endswith("_enabled")

    @property
    def pretrained(self) -> str | None:
        """The pipeline that is trained: the one that the config names, else the flavour's; None if neither is known."""
        named: str | None = self.value("pretrained_model_name_or_path")
        if named or self.family is None:
            return named
        if flavours := _flavours(self.family):
            return flavours[self.values.get("model_flavour", next(iter(flavours))).lower()]
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


def read_config(words: Sequence[str]) -> Config:
    """Read a config and every known key in it.

    Args:
        words: the name of a file with a JSON object, or flags such as ``--crepa_lambda=0.5``.

    Raises:
        SpecError: with every problem at once: invalid values, repeated keys, unknown keys of the regularizers, an
            unknown family, a regularizer that does not fit the family.
    """
    is_file = len(words) == 1 and not words[0].startswith("--")
    file = Path(words[0]) if is_file else None
    entries = _distilled(list(_settings(file) if file else _flags(words)))
    keys = [key for key, *_ in entries]
    problems = [Problem(place, key, "given twice") for n, (key, _, place) in enumerate(entries) if key in keys[:n]]
    given = {key: value for key, value, _ in entries if value not in _NULLS}
    places = {key: place for key, _, place in entries}
    values = _read_keys(simpletuner.READABLE.values(), given, places, problems)
    family = None
    if "model_family" in values:
        name = values["model_family"].lower().replace("-", "_")
        try:
            family = FAMILIES[simpletuner.FAMILY_NAMES.get(name, name)]
        except ValueError as error:
            problems.append(Problem(places["model_family"], "model_family", str(error)))
    on = [prefix for prefix in simpletuner.KEYS if values.get(f"{prefix}_enabled")]
    problems += [Problem(places[key], key, message) for key, message in _mistakes(given, values, on, family)]
    if problems:
        raise SpecError(problems)
    kind = "video" if family is not None and family.is_video else "image"
    data_set = _read_data_set(values.get("data_backend_config"), file, kind)
    return Config(file, given, places, values, on[0] if on else None, family, data_set)


def _settings(file: Path) -> Iterator[_Entry]:
    value, places = _parse_json(file, "config")
    if not isinstance(value, dict):
        _refuse(file, 'a config must be a JSON object of settings, such as {"crepa_enabled": true}')
    parent: KeyPath = ()
    if isinstance(value.get(_SAVED), dict):
        value, parent = value[_SAVED], (_SAVED,)
    for key, inner in value.items():
        yield _bare(key), inner, places[(*parent, key)]
        if _bare(key) == _DISTILLATION and isinstance(inner, dict):
            yield from _inside(inner, (*parent, key), places)


def _inside(config: Mapping[str, Any], path: KeyPath, places: Mapping[KeyPath, Place]) -> Iterator[_Entry]:
    """Yield the entries of a `distillation_config`, or of its `self_transcendence`, as SimpleTuner looks for them."""
    if isinstance(own := config.get(_TRANSCENDENCE), dict):
        config, path = own, (*path, _TRANSCENDENCE)
    for name, value in config.items():
        yield f"{_DISTILLATION}.{name}", value, places.get((*path, name), Place(None))


def _distilled(entries: Sequence[_Entry]) -> list[_Entry]:
    """Return the entries with those of a distillation that a spec has, else without what is inside it."""
    values = {key: value.strip().lower() if isinstance(value, str) else value for key, value, _ in entries}
    if values.get("distillation_method") == _TRANSCENDENCE and values.get("distillation_config.stage") == "self":
        return [
            (key, "self" if key == "distillation_config.stage" else value, place)
            for key, value, place in entries
            if key not in ("distillation_method", _DISTILLATION)
        ]
    return [entry for entry in entries if not entry[0].startswith(f"{_DISTILLATION}.")]


def _flags(words: Sequence[str]) -> Iterator[_Entry]:
    waiting = list(words)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if not flag.startswith("--"):
            _refuse(None, f"expected one file, or flags such as --crepa_lambda=0.5; got {flag!r}")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        yield _bare(flag), value, Place(None)
        if _bare(flag) == _DISTILLATION:
            config, _ = parse_yaml(value, None)
            yield from _inside(config, (), {}) if isinstance(config, dict) else ()


def _bare(key: str) -> str:
    name = key.strip().lstrip("-")
    return simpletuner.ALIASES.get(name, name)


def _refuse(file: Path | None, message: str) -> NoReturn:
    raise SpecError([Problem(Place(file), "", message)])


def _parse_json(file: Path, kind: str) -> tuple[Any, dict[KeyPath, Place]]:
    """Parse JSON as YAML, which allows a trailing comma. YAML refuses tabs; a JSON string contains none either."""
    text = read_text(file, kind)
    try:
        return parse_yaml(text.replace("\t", " "), file)
    except SpecError as error:
        raise SpecError(
            replace(problem, message=problem.message.replace("not valid YAML", "not valid JSON", 1))
            for problem in error.problems
        ) from None


def _read_keys(
    keys: Iterable[Key], given: Mapping[str, Any], places: Mapping[str, Place], problems: list[Problem]
) -> dict[str, Any]:
    """Return the values of the known keys, converted, and add a problem for every value of another type."""
    values = {}
    for key in keys:
        if given.get(key.name) is not None:
            try:
                values[key.name] = key.read(given[key.name])
            except ValidationError as error:
                problems.append(Problem(places[key.name], key.name, expectation(error.errors(include_url=False))))
    return values


def _flavours(family: Family) -> dict[str, str]:
    """Return the hub ids of a family's flavours by name in lower case."""
    return {name.lower(): released for name, released in simpletuner.FLAVOURS.get(family.name, {}).items()}


def _mistakes(
    given: Mapping[str, Any], values: Mapping[str, Any], on: Sequence[Prefix], family: Family | None
) -> Iterator[tuple[str, str]]:
    """Yield keys that SimpleTuner does not have, and keys that do not fit each other or the family."""
    names = (*simpletuner.READABLE, *simpletuner.LOST, *simpletuner.WITHOUT_EFFECT)
    known = [name for name in names if name.startswith(PREFIXES)]
    for name in given:
        if name.startswith(PREFIXES) and name not in known:
            own = next(prefix for prefix in PREFIXES if name.startswith(prefix))
            allowed = ", ".join(key for key in known if key.startswith(own))
            yield name, f"SimpleTuner has no such key; allowed: {allowed}{did_you_mean(name, known)}"
    flavour, flavours = values.get("model_flavour"), simpletuner.FLAVOURS.get(family.name, {}) if family else {}
    if flavour and family and flavours and flavour.lower() not in _flavours(family):
        message = f"repa-lab trains no flavour '{flavour}' of {family.name}; allowed: {', '.join(flavours)}"
        yield "model_flavour", message + did_you_mean(flavour, flavours)
    if len(on) > 1:
        yield "urepa_enabled", "crepa_enabled is true as well; a run has one regularizer: leave one of them out"
    elif on and family is not None and family.kind != ("transformer" if on[0] == "crepa" else "unet"):
        kind, other = ("a UNet", "urepa_*") if family.kind == "unet" else ("a transformer", "crepa_*")
        kinds = "transformers" if on[0] == "crepa" else "UNets"
        yield f"{on[0]}_enabled", f"{REGULARIZERS[on[0]]} is for {kinds}; {family.name} is {kind}: use {other}"
    if values.get("layersync_enabled") and "layersync_student_block" not in values:
        yield "layersync_enabled", "SimpleTuner needs layersync_student_block as well"
    for name in ("student_block", "teacher_block") if "distillation_config.stage" in values else ():
        if f"{_DISTILLATION}.{name}" not in values:
            yield "distillation_config.stage", f"SimpleTuner needs {_DISTILLATION}.{name} as well"
    for kind, added in ADDED.items():
        if values.get(added.switch) and family is not None and family.kind == "unet":
            yield added.switch, f"{kind} is for transformers; {family.name} is a UNet: leave it out"
    if values.get("irepa_enabled") and not on:
        yield "irepa_enabled", "iREPA needs REPA or U-REPA: set crepa_enabled or urepa_enabled as well"


def _read_data_set(name: str | None, config: Path | None, kind: str) -> DataSet | None:
    """Return the first enabled data set of a kind in the data backend's file; None if there is no file or data set.

    The file is searched as given, beside the config, and under the folders above it, because SimpleTuner is started in
    one of those.

    Raises:
        SpecError: the file is no list of data sets, or a value in it has the wrong type.
    """
    if name is None:
        return None
    folders = [Path(), *(config.resolve().parents if config else ())]
    files = [(folder, folder / name) for folder in folders]
    files += [(folder, folder / Path(name).name) for folder in folders[1:2]]  # beside the config
    root, file = next(((folder, file) for folder, file in files if _exists(file)), (None, None))
    if root is None or file is None:
        return None
    backends, places = _parse_json(file, "data backend's file")
    if not isinstance(backends, list) or not all(isinstance(backend, dict) for backend in backends):
        _refuse(file, "a data backend's file is a JSON list of data sets, each an object")
    is_off = [backend.get("disabled") or backend.get("disable") for backend in backends]
    images = [n for n, it in enumerate(backends) if it.get("dataset_type", "image") == kind and not is_off[n]]
    if not images:
        return None
    # Regularisation images only accompany the images that are to be learned.
    number = next((image for image in images if not backends[image].get("is_regularisation_data")), images[0])
    backend, problems = backends[number], list[Problem]()
    of_video = backend["video"] if isinstance(backend.get("video"), dict) else {}
    own_places = {key: places[number, key] for key in backend}
    own_places |= {f"video.{key}": places[number, "video", key] for key in of_video}
    given = {**backend, **{f"video.{key}": value for key, value in of_video.items()}}
    values = _read_keys(simpletuner.DATA_SET, {k: v for k, v in given.items() if v != ""}, own_places, problems)
    if problems:
        raise SpecError(problems)
    folder = values.get("instance_data_dir")
    if folder is not None and not _exists(folder) and _exists(root / folder):
        values["instance_data_dir"] = str(root / folder)
    names = {image: str(backends[image].get("id", "without an id")) for image in images}
    return DataSet(
        name=f"data set '{names.pop(number)}' of {file}",
        values=values,
        kind=str(backend.get("type") or "local"),
        captions=str(backend.get("caption_strategy") or "textfile"),
        others=tuple(names.values()),
    )


def _exists(path: str | Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises an error for a name that is too long
