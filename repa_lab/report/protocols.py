"""What numbers of one name depend on: where two runs disagree in it, their numbers are different metrics all the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repa_lab.metrics.protocol import differences

Protocol = Mapping[str, Any]
_MOST_VALUES = 3
_MOST_CHARACTERS = 60
_DIGEST = 64
_SHOWN = 12


@dataclass(frozen=True)
class Protocols:
    """The protocols that runs recorded, by run id and metric."""

    by_run: Mapping[str, Mapping[str, Protocol]] = field(default_factory=dict)

    def conflicts(self, runs: Iterable[str], metric: str) -> list[str]:
        """The fields in which the runs' protocols of a metric differ, each with its values; runs without a record have
        none.

        Args:
            runs: run ids.
            metric: full name.
        """
        held = [self.by_run[run][metric] for run in dict.fromkeys(runs) if metric in self.by_run.get(run, {})]
        fields = sorted({name for protocol in held[1:] for name in differences(held[0], protocol)})
        return [f"{name} ({_listed([protocol.get(name) for protocol in held])})" for name in fields]

    def names(self, arms: Mapping[str, Iterable[str]], metric: str) -> dict[str, str]:
        """What a metric is to be called for each arm, so that one name stands for one protocol.

        Where arms were measured differently under the name, it is followed by what they differ in; arms without a
        record keep the bare name. Of an arm whose own runs differ the first one speaks: it has no value to be called
        anything.

        Args:
            arms: run ids by arm.
            metric: full name.
        """
        held = {arm: self._first(runs, metric) for arm, runs in arms.items()}
        known = [protocol for protocol in held.values() if protocol is not None]
        fields = sorted({name for protocol in known[1:] for name in differences(known[0], protocol)})
        flat = {
            arm: dict(dotted({name: one.get(name) for name in fields})) for arm, one in held.items() if one is not None
        }
        paths = sorted({path for one in flat.values() for path in one})
        differing = [path for path in paths if len({_text(one.get(path)) for one in flat.values()}) > 1]
        told = {arm: ", ".join(f"{path}: {_short(one.get(path))}" for path in differing) for arm, one in flat.items()}
        return {arm: f"{metric} ({told[arm]})" if told.get(arm) else metric for arm in arms}

    def _first(self, runs: Iterable[str], metric: str) -> Protocol | None:
        return next((self.by_run[run][metric] for run in runs if metric in self.by_run.get(run, {})), None)

    def lacking(self, runs: Iterable[str], metric: str) -> list[str]:
        """Those of the runs that recorded no protocol of a metric."""
        return [run for run in dict.fromkeys(runs) if metric not in self.by_run.get(run, {})]


def bare(name: str) -> str:
    """A metric's own name, of one that :meth:`Protocols.names` gave."""
    return name.partition(" (")[0]


def dotted(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from dotted(inner, f"{path}.{key}" if path else str(key))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    """A value in a few characters, and different ones differently."""
    text = _text(value)
    if len(text) <= 2 * _SHOWN:
        return text
    digest = text if len(text) == _DIGEST else hashlib.sha256(text.encode()).hexdigest()
    return digest[:_SHOWN] if text == digest else f"{text[:_SHOWN]}... #{digest[:_SHOWN]}"


def _listed(values: Sequence[Any]) -> str:
    texts = list(dict.fromkeys(map(_text, values)))
    short = [
        text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..." for text in texts[:_MOST_VALUES]
    ]
    return " / ".join([*short, *(["..."] if len(texts) > _MOST_VALUES else [])])
