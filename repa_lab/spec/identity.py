"""A run's identity is its content: the same settings, seed, data and protocol are the same run, whoever asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from repa_lab.spec.schema import RunConfig

_ID_LENGTH = 12
_PLACES = ("weights", "reference", "tae", "vae", "pretrained")  # fields that hold a path


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


def identify(config: RunConfig, seed: int, protocol: int, data: str, contents: Mapping[str, str]) -> Run:
    """The run of a config and a seed.

    Args:
        config: the resolved settings.
        seed: the run's seed.
        protocol: the version of what training and measuring mean.
        data: fingerprint of the data set, which stands for its path.
        contents: digests of local files and folders by their path, which stand for the path.
    """
    canonical = {"protocol": protocol, "data_fingerprint": data, "seed": seed, **_scientific(config, contents)}
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return Run(hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH], config, seed)


def local_weights(config: RunConfig) -> tuple[str, ...]:
    """Files of weights that the settings name, and what may be folders of such or hub ids."""
    encoders = [encoder for _, encoder in config.encoder_paths]
    named = [encoder.weights for encoder in encoders]
    named += [file for _, one in config.extractor_paths for file in (one.weights, one.reference)]
    named += [encoder.tae for encoder in encoders] + [config.data.vae, config.model.pretrained]
    return tuple(dict.fromkeys(path for path in named if path))


def _scientific(config: RunConfig, contents: Mapping[str, str]) -> dict[str, Any]:
    """The settings without what the run does not use, paths replaced by what they lead to."""
    value = _without_neutral(config)
    del value["data"]["path"]
    value["data"]["resolution"] = config.data.side
    if config.model.pretrained is None and config.train.time == "auto":
        value["train"]["time"] = "uniform"  # what it means there
    if isinstance(encoders := value["regularizer"]["encoder"], list) and len(encoders) == 1:
        value["regularizer"]["encoder"] = encoders[0]
    if isinstance(extractors := value["evaluate"]["extractor"], list) and len(extractors) == 1:
        value["evaluate"]["extractor"] = extractors[0]
    if config.regularizer.type == "none":
        value["regularizer"] = {"type": "none"}
    elif config.regularizer.type == "repa":
        del value["regularizer"]["manifold_weight"]
        value["regularizer"].pop("manifold", None)
    replaced: dict[str, Any] = _replace_files(value, contents)
    return replaced


def _without_neutral(section: Any) -> Any:
    """A section as plain data, without the fields that came later and stand at their neutral value."""
    if isinstance(section, (list, tuple)):
        return [_without_neutral(item) for item in section]
    if not isinstance(section, BaseModel):
        return section
    return {
        name: _without_neutral(getattr(section, name))
        for name, field in type(section).model_fields.items()
        if not (field.json_schema_extra and getattr(section, name) == field.default)
    }


def _replace_files(value: Any, contents: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_replace_files(item, contents) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: contents.get(inner, inner) if key in _PLACES and isinstance(inner, str) else _replace_files(inner, contents)
        for key, inner in value.items()
    }
