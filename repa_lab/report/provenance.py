"""What the runs of a report were made with, and in what their settings differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from repa_lab.report.phrases import NONE
from repa_lab.report.results import Results
from repa_lab.report.table import Table

_OPTIONS = ("device", "precision", "executor", "compile", "micro_batch", "gradient_checkpointing", "encoder_precision")
_MOST_ARMS = 60


def provenance_table(results: Results) -> Table:
    """Code, versions and machines, and how many runs had each; what differs between runs has a row for every value."""
    counts: dict[tuple[str, str], int] = {}
    for provenance in results.provenances.values():
        for fact in _facts(provenance):
            counts[fact] = counts.get(fact, 0) + 1
    order = list(dict.fromkeys(name for name, _ in counts))
    rows = sorted(counts.items(), key=lambda item: order.index(item[0][0]))
    return Table(["what", "value", "runs"], [[name, value, str(count)] for (name, value), count in rows])


def settings_table(results: Results) -> Table:
    """The settings in which arms differ, a row for each arm; the rest is in every run's ``spec.json``."""
    arms = results.runs.drop_duplicates("arm").head(_MOST_ARMS)
    first = list(results.runs.columns).index("error") + 1
    texts = {str(name): [_text(value) for value in arms[name]] for name in list(results.runs.columns)[first:]}
    kept = {name: column for name, column in texts.items() if len(set(column)) > 1 and not name.startswith("cost/")}
    rows = [[str(arm), *(column[place] for column in kept.values())] for place, arm in enumerate(arms["arm"])]
    return Table(["arm", *kept], rows if kept else [])


def protocols_table(results: Results) -> Table:
    """All that a number of each metric depends on, as the runs recorded it, a row for each metric and field."""
    held: dict[tuple[str, str], dict[str, None]] = {}
    for protocols in results.protocols.by_run.values():
        for metric, protocol in protocols.items():
            for name, value in protocol.items():
                held.setdefault((metric, name), {})[_text(value)] = None
    return Table(["metric", "depends on", "value"], [[*place, " / ".join(values)] for place, values in held.items()])


def _facts(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "code", _code(provenance.get("git"))
    for name, version in _mapping(provenance.get("packages")).items():
        yield name, str(version)
    yield "Python", str(provenance.get("python", NONE))
    yield "machine", f"{provenance.get('platform', NONE)}, {provenance.get('cpus', NONE)} CPU cores"
    for name in ("gpu", "gpus", "accelerator", "processes"):
        if name in provenance:
            yield name, _text(provenance[name])
    options = _mapping(provenance.get("options"))
    yield from ((f"run.{name}", _text(options[name])) for name in _OPTIONS if name in options)


def _code(git: Any) -> str:
    if not isinstance(git, Mapping):
        return "not from a git checkout"
    return f"commit {git.get('commit', NONE)}" + (" with uncommitted changes" if git.get("dirty") else "")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict | tuple):
        return json.dumps(value)
    return NONE if value is None or pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
