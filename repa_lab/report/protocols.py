"""What numbers of one name depend on: where two runs disagree in it, their numbers are different metrics all the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repa_lab.metrics.protocol import differences

Protocol = Mapping[str, Any]
_MOST_VALUES = 3
_MOST_CHARACTERS = 60


@dataclass(frozen=True)
class Protocols:
    """The protocols that runs recorded, by run id and metric."""

    by_run: Mapping[str, Mapping[str, Protocol]] = field(default_factory=dict)

    def conflicts(self, runs: Iterable[str], metric: str) -> list[str]:
        """The fields in which the runs' protocols of a metric differ, each with its values; runs without a record have none.

        Args:
            runs: run ids.
            metric: full name.
        """
        held = [self.by_run[run][metric] for run in dict.fromkeys(runs) if metric in self.by_run.get(run, {})]
        fields = sorted({name for protocol in held[1:] for name in differences(held[0], protocol)})
        return [f"{name} ({_listed([protocol.get(name) for protocol in held])})" for name in fields]

    def lacking(self, runs: Iterable[str], metric: str) -> list[str]:
        """Those of the runs that recorded no protocol of a metric."""
        return [run for run in dict.fromkeys(runs) if metric not in self.by_run.get(run, {})]


def _listed(values: Sequence[Any]) -> str:
    texts = list(dict.fromkeys(value if isinstance(value, str) else json.dumps(value, sort_keys=True) for value in values))
    short = [text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..." for text in texts[:_MOST_VALUES]]
    return " / ".join([*short, *(["..."] if len(texts) > _MOST_VALUES else [])])
