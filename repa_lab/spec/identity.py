"""A run's identity is its content: equal settings, seed, data and protocol are the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from repa_lab.align.settings import NoSettings
from repa_lab.errors import InputError, dotted
from repa_lab.files import digest
from repa_lab.registry import UnknownComponentError
from repa_lab.runs import RunDirectory
from repa_lab.settings import Settings, file_fields, settings_in
from repa_lab.spec.schema import RunConfig, path_in

_ID_LENGTH = 12


class RecordedSpecError(InputError):
    """This version of repa-lab cannot read the recorded spec of a run; the message is one line."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(f"the spec.json of run {run_id} is damaged, or of another version of repa-lab: {reason}")


class MissingPluginError(InputError):
    """A run was trained with a plugin that this process has not loaded."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed, the unit that is trained; its id is 12 hexadecimal digits, from :func:`identify`."""

    run_id: str
    config: RunConfig
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain data, which :meth:`from_json` reads."""
        return {**self.config.model_dump(mode="json"), "seed": self.seed}

    @classmethod
    def read(cls, directory: RunDirectory) -> Run:
        """Return the run of a directory, by :meth:`from_json`."""
        return cls.from_json(directory.run_id, directory.spec, directory.plugin_files)

    @classmethod
    def from_json(cls, run_id: str, spec: Mapping[str, Any], plugins: Iterable[str] = ()) -> Run:
        """Return the run that :meth:`to_json` wrote.

        Args:
            plugins: names of the plugin files that the run was trained with.

        Raises:
            RecordedSpecError: the data is not what :meth:`to_json` writes.
            MissingPluginError: the data names an unknown component, and there are plugins that may register it.
        """
        if not isinstance(spec, Mapping) or not isinstance(spec.get("seed"), int):
            raise RecordedSpecError(run_id, "it has no settings with a seed")
        settings = {key: value for key, value in spec.items() if key != "seed"}
        try:
            return cls(run_id, RunConfig.model_validate(settings), spec["seed"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = dotted(path_in(settings, first))
            if isinstance(first.get("ctx", {}).get("error"), UnknownComponentError) and (files := ", ".join(plugins)):
                named = f"{path} '{first['input']}'"
                message = f"run {run_id} was trained with a plugin that is not loaded, {files}, which registers {named}"
                raise MissingPluginError(f"{message}; name the file with repa-lab --plugin FILE") from None
            raise RecordedSpecError(run_id, f"{path}: {first['msg']}") from None


def identify(
    config: RunConfig, seed: int, protocol: int, data: str, contents: Mapping[str, str], plugins: Iterable[str] = ()
) -> Run:
    """Return the run of a config and a seed, with its id.

    Args:
        protocol: the version of the training and measuring code.
        data: fingerprint of the data set, hashed in place of its path.
        contents: digest of every local file and folder, hashed in place of its path.
        plugins: digests of the plugins whose components the run uses.
    """
    settings: dict[str, Any] = _plain(config, contents)
    settings["data"].pop("path", None)
    # A setting that can be written in two ways is hashed in one.
    settings["data"]["resolution"] = config.data.side
    if config.train.time is None:  # uniform is the default from scratch
        settings["train"]["time"] = "uniform" if config.model.pretrained is None else "auto"
    members = config.regularizers or (NoSettings(),)
    if len(members) == 1:  # a name only tells several apart
        members = (members[0].model_copy(update={"name": None}),)
    regularizers = [_plain(member, contents) for member in members]
    settings["regularizer"] = regularizers if len(regularizers) > 1 else regularizers[0]
    for section, key in (*((section, "encoder") for section in regularizers), (settings["evaluate"], "extractor")):
        if isinstance(value := section.get(key), list) and len(value) == 1:
            section[key] = value[0]
    hashed = {"protocol": protocol, "data_fingerprint": data, "seed": seed, **settings}
    if digests := sorted(set(plugins)):
        hashed["plugins"] = digests
    return Run(digest(hashed)[:_ID_LENGTH], config, seed)


def local_files(config: RunConfig) -> tuple[str, ...]:
    """Return the values of all fields that may name a local file or folder, each once."""
    names = (value for _, section in settings_in(config) for _, value, _ in file_fields(section))
    return tuple(dict.fromkeys(names))


def _plain(value: Any, contents: Mapping[str, str]) -> Any:
    """Return settings as plain data without the fields that were added later and have their neutral value."""
    if isinstance(value, (list, tuple)):
        return [_plain(item, contents) for item in value]
    if not isinstance(value, Settings):
        return value
    files = {name: contents.get(file, file) for name, file, _ in file_fields(value)}
    return {
        name: files[name] if name in files else _plain(getattr(value, name), contents)
        for name, field in type(value).model_fields.items()
        if not (field.exclude or (field.json_schema_extra and getattr(value, name) == field.default))
    }
