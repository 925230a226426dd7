"""A run's identity is its content: the same settings, seed, data and protocol are the same run, whoever asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from repa_lab.settings import Settings, file_fields, settings_in
from repa_lab.spec.schema import RunConfig

_ID_LENGTH = 12


class RecordedSpecError(ValueError):
    """The recorded spec of a run is none that this version of the lab can read; the text is one line."""

    def __init__(self, run_id: str, what: str) -> None:
        super().__init__(f"the spec.json of run {run_id} is damaged, or of another version of the lab: {what}")


@dataclass(frozen=True)
class Run:
    """One arm with one seed: the unit that is trained."""

    run_id: str
    config: RunConfig
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The run's spec as plain data, from which :meth:`from_json` makes the same run."""
        return {**self.config.model_dump(mode="json"), "seed": self.seed}

    @classmethod
    def from_json(cls, run_id: str, spec: Mapping[str, Any]) -> Run:
        """The run of a directory.

        Raises:
            RecordedSpecError: it is not what :meth:`to_json` makes.
        """
        if not isinstance(spec, Mapping) or not isinstance(spec.get("seed"), int):
            raise RecordedSpecError(run_id, "it has no settings with a seed")
        settings = {key: value for key, value in spec.items() if key != "seed"}
        try:
            return cls(run_id, RunConfig.model_validate(settings), spec["seed"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise RecordedSpecError(run_id, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def identify(
    config: RunConfig, seed: int, protocol: int, data: str, contents: Mapping[str, str], plugins: Iterable[str] = ()
) -> Run:
    """The run of a config and a seed.

    Args:
        config: the resolved settings.
        seed: the run's seed.
        protocol: the version of what training and measuring mean.
        data: fingerprint of the data set, which stands for its path.
        contents: digests of local files and folders by their path, which stand for the path.
        plugins: digests of the plugins whose components the run uses.
    """
    canonical = {"protocol": protocol, "data_fingerprint": data, "seed": seed, **_scientific(config, contents)}
    if digests := sorted(set(plugins)):
        canonical["plugins"] = digests
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return Run(hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH], config, seed)


def local_files(config: RunConfig) -> tuple[str, ...]:
    """Return what the settings name that may be local files or folders of weights."""
    named = (value for _, section in settings_in(config) for _, value, _ in file_fields(section))
    return tuple(dict.fromkeys(named))


def _scientific(config: RunConfig, contents: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings as plain data, paths replaced by what they lead to, and one way to write each."""
    value: dict[str, Any] = _plain(config, contents)
    value["data"].pop("path", None)  # the fingerprint stands for it
    value["data"]["resolution"] = config.data.side
    if config.model.pretrained is None and config.train.time == "auto":
        value["train"]["time"] = "uniform"  # what it means there
    if isinstance(encoders := value["regularizer"].get("encoder"), list) and len(encoders) == 1:
        value["regularizer"]["encoder"] = encoders[0]
    if isinstance(extractors := value["evaluate"]["extractor"], list) and len(extractors) == 1:
        value["evaluate"]["extractor"] = extractors[0]
    return value


def _plain(section: Any, contents: Mapping[str, str]) -> Any:
    """Return a section as plain data, without the fields that came later and stand at their neutral value."""
    if isinstance(section, (list, tuple)):
        return [_plain(item, contents) for item in section]
    if not isinstance(section, Settings):
        return section
    files = {name: contents.get(value, value) for name, value, _ in file_fields(section)}
    return {
        name: files[name] if name in files else _plain(getattr(section, name), contents)
        for name, field in type(section).model_fields.items()
        if not (field.exclude or (field.json_schema_extra and getattr(section, name) == field.default))
    }
