"""The image data set of a SimpleTuner config, from the file that ``data_backend_config`` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repa_lab.bridge.given import Given, parse_json, printable, refuse, unfit
from repa_lab.bridge.keys import DATA_SET, UnfitError
from repa_lab.spec.errors import Place, Problem, SpecError
from repa_lab.spec.yaml import read_text

_LOCAL = (None, "local")


@dataclass(frozen=True)
class DataSet:
    """The first image data set of a data backend's file.

    Attributes:
        file: the data backend's file.
        name: the data set's ``id``.
        values: what it says of the keys in `DATA_SET`, as they are written here.
        kind: where the images are if not in a local folder, such as ``huggingface``.
        captions: its ``caption_strategy``, or None.
        others: the names of the other image data sets, which a spec has no place for.
    """

    file: Path
    name: str
    values: Mapping[str, Any]
    kind: str | None = None
    captions: str | None = None
    others: tuple[str, ...] = ()

    @property
    def folder(self) -> str | None:
        """The folder of images, or None if they are elsewhere."""
        return None if self.kind else self.values.get("instance_data_dir")

    @property
    def keeps_aspect(self) -> bool:
        """Whether images are not cut to squares."""
        return self.values.get("crop") is False or self.values.get("crop_aspect", "square") != "square"


def read_data_set(given: Given) -> DataSet | None:
    """Return the first enabled image data set of the data backend's file; None if there is no such file or data set.

    The file is looked for as given, in the config's folder, and under the folders above it, for SimpleTuner is started
    in one of those.

    Raises:
        SpecError: the file is no list of data sets, or a value in it has the wrong kind.
    """
    name = given.values.get("data_backend_config")
    found = _find(Path(name), given.file) if isinstance(name, str) else None
    if found is None:
        return None
    file, root = found
    backends, places = parse_json(read_text(file, "data backend's file"), file)
    if not isinstance(backends, list) or not all(isinstance(backend, dict) for backend in backends):
        refuse(file, "a data backend's file is a JSON list of data sets, each an object")
    images = [number for number, backend in enumerate(backends) if _has_images(backend)]
    if not images:
        return None
    # Regularisation images only accompany the images that are to be learned.
    number = next((one for one in images if not backends[one].get("is_regularisation_data")), images[0])
    chosen = backends[number]
    values = _values(chosen, {path[1]: place for path, place in places.items() if len(path) == 2 and path[0] == number})
    if "instance_data_dir" in values:
        values["instance_data_dir"] = _resolved(values["instance_data_dir"], root)
    kind, captions = (chosen.get(key) and str(chosen[key]) for key in ("type", "caption_strategy"))
    others = tuple(_name(backends[one]) for one in images if one != number)
    return DataSet(file, _name(chosen), values, None if kind in _LOCAL else kind, captions, others)


def _name(backend: Mapping[str, Any]) -> str:
    return printable(str(backend.get("id", "without an id")))


def _find(name: Path, config: Path | None) -> tuple[Path, Path] | None:
    """The file, and the folder that its name is relative to."""
    folders = [Path(), *(config.resolve().parents if config else ())]
    candidates = [(folder / name, folder) for folder in folders]
    if config:
        candidates.append((config.resolve().parent / name.name, config.resolve().parent))
    return next(((file, folder) for file, folder in candidates if _exists(file) and file.is_file()), None)


def _has_images(backend: Mapping[str, Any]) -> bool:
    return backend.get("dataset_type", "image") == "image" and not (backend.get("disabled") or backend.get("disable"))


def _values(backend: Mapping[str, Any], places: Mapping[str | int, Place]) -> dict[str, Any]:
    values, problems = {}, []
    for key in DATA_SET:
        if backend.get(key.name) in (None, ""):
            continue
        try:
            values[key.name] = key.read(backend[key.name])
        except UnfitError as error:
            problems.append(Problem(places[key.name], key.name, unfit(backend[key.name], error)))
    if problems:
        raise SpecError(problems)
    return values


def _resolved(folder: str, root: Path) -> str:
    """The folder of images as it can be found from here, if it can."""
    is_elsewhere = not _exists(Path(folder)) and _exists(root / folder)
    return str(root / folder) if is_elsewhere else folder


def _exists(path: Path) -> bool:
    """Whether a path exists, whatever text a config has for it."""
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False
