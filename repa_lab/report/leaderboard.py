"""Every arm of every sweep of a runs root, best first: a table per protocol, because protocols cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repa_lab.metrics.protocol import differences
from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.report.statistics import Goal, mean_interval
from repa_lab.report.summary import Protocol, goal_of, is_protocol, metric_kind
from repa_lab.report.text import troubles

COLUMNS = [
    *("arm", "sweeps", "family", "size", "regularizer", "encoder", "state", "seeds"),
    *("n", "mean", "low", "high", "best", "step", "images"),
]


@dataclass(frozen=True)
class Board:
    """The arms that were measured under one protocol.

    Attributes:
        metric: the full name.
        goal: whether small or large values are good; the best arm is first.
        protocol: the fields, with values, in which this board's protocol differs from other boards of the same name.
        frame: a row per arm with :data:`COLUMNS`. ``mean`` with its 95 % t interval ``low`` to ``high`` is over the
            ``n`` of ``seeds`` runs that have a finite value at ``step``, the last step that all measured runs have;
            ``best`` is the mean of each run's best value up to that step.
    """

    metric: str
    goal: Goal
    protocol: Protocol
    frame: pd.DataFrame


@dataclass(frozen=True)
class _Entry:
    """Arms that share runs, merged: a run's id is its whole content, so these arms are one."""

    arms: tuple[str, ...]
    sweeps: tuple[str, ...]
    runs: frozenset[str]


def leaderboards(
    path: str | Path, metric: str | None = None, protocol: str = "", tell: Callable[[str], None] = lambda line: None
) -> list[Board]:
    """Return the boards of a runs root, ordered by metric.

    A metric is shown where its protocol is known: from its name, or from the run's record.

    Args:
        path: a runs root, or a sweep's folder.
        metric: full name or kind (Frechet distances are one kind); None is all metrics with a protocol in their name.
        protocol: text that the full name must contain, such as ``@50k`` or ``sde250``.
        tell: called with a line for each run of which something could not be read.

    Raises:
        ResultsError: there is no sweep, or no such metric was measured.
    """
    results = load_results(path)
    # Several arms may share a run: name its troubles once.
    once = results.troubles.drop_duplicates(["run_id", "where", "what"])
    for line in troubles(replace(results, troubles=once)):
        tell(line)
    entries, facts = _entries(results), results.runs.drop_duplicates("run_id").set_index("run_id")
    values = results.curves.drop_duplicates(["run_id", "metric", "step"], keep="last")
    measured = sorted(values["metric"].unique())
    boards: list[Board] = []
    for name in (name for name in measured if protocol in name and _is_wanted(name, metric)):
        rows, goal = values[values["metric"] == name], goal_of(name)
        protocols = {run: _protocol(results, run, name, facts.loc[run]) for run in rows["run_id"].unique()}
        groups = _group({run: recorded for run, recorded in protocols.items() if recorded})
        differing = sorted({field for first, _ in groups for other, _ in groups for field in differences(first, other)})
        for recorded, runs in groups:
            frame = _frame(rows[rows["run_id"].isin(runs)], entries, facts, goal)
            boards.append(Board(name, goal, {field: recorded.get(field) for field in differing}, frame))
    if not boards:
        names = ", ".join(filter(is_protocol, measured)) or "nothing"
        raise ResultsError(f"no such metric with a protocol in '{path}'; measured: {names}")
    return boards


def _is_wanted(name: str, metric: str | None) -> bool:
    if name == metric:
        return True
    is_full_name = metric is not None and ":" in metric
    return not is_full_name and is_protocol(name) and metric_kind(name) == metric_kind(metric or name)


def _protocol(results: Results, run: str, metric: str, facts: pd.Series) -> Protocol:
    """Return the recorded protocol; for a run without one, its data settings stand for it, if the name has the rest."""
    recorded = results.protocols.by_run.get(run, {}).get(metric)
    if recorded or not is_protocol(metric):
        return recorded or {}
    data = {name: value for name, value in facts.items() if str(name).startswith("data.") and not pd.isna(value)}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in data.items()}
    return {"recorded": False, **plain}


def _group(protocols: Mapping[str, Protocol]) -> list[tuple[Protocol, set[str]]]:
    """Group runs whose protocols do not differ, each group with the protocol of one of its runs."""
    groups: list[tuple[Protocol, set[str]]] = []
    for run, protocol in protocols.items():
        for first, runs in groups:
            if not differences(first, protocol):
                runs.add(run)
                break
        else:
            groups.append((protocol, {run}))
    return groups


def _entries(results: Results) -> list[_Entry]:
    entries: list[_Entry] = []
    for (sweep, arm), rows in results.runs.groupby(["sweep", "arm"], sort=False):
        entry = _Entry((str(arm),), (str(sweep),), frozenset(rows["run_id"]))
        for other in [other for other in entries if other.runs & entry.runs]:
            entries.remove(other)
            arms, sweeps = (dict.fromkeys(pair) for pair in (other.arms + entry.arms, other.sweeps + entry.sweeps))
            entry = _Entry(tuple(arms), tuple(sweeps), other.runs | entry.runs)
        entries.append(entry)
    return entries


def _frame(values: pd.DataFrame, entries: Sequence[_Entry], facts: pd.DataFrame, goal: Goal) -> pd.DataFrame:
    rows = [row for entry in entries for row in _rows(entry, values[values["run_id"].isin(entry.runs)], facts, goal)]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.sort_values("mean", ascending=goal == "min", na_position="last", kind="stable", ignore_index=True)


def _rows(entry: _Entry, values: pd.DataFrame, facts: pd.DataFrame, goal: Goal) -> Iterator[dict[str, Any]]:
    """Yield the row of an entry at equal progress, if all of its measured runs share a step."""
    common = values.groupby("step")["run_id"].nunique()
    steps = common[common == values["run_id"].nunique()].index
    if not len(steps):
        return
    step = steps.max()
    current, history = values[values["step"] == step], values[values["step"] <= step].groupby("run_id")["value"]
    mean, settings = mean_interval(current["value"]), facts.loc[values["run_id"].iloc[0]]

    def setting(name: str) -> str:
        value = settings.get(name)
        if isinstance(value, list):  # of several encoders
            return " + ".join(encoder["name"] for encoder in value)
        return value if isinstance(value, str) else ""

    regularizer = setting("regularizer.type")
    encoder = setting("regularizer.encoder") or setting("regularizer.encoder.name")
    yield {
        "arm": " / ".join(entry.arms),
        "sweeps": ", ".join(entry.sweeps),
        "seeds": len(entry.runs),
        "state": ", ".join(facts.loc[sorted(entry.runs), "state"].unique()),
        "family": setting("model.family"),
        "size": setting("model.size") or setting("model.pretrained"),
        "regularizer": regularizer,
        "encoder": "" if regularizer == "none" else encoder,
        "n": mean.n,
        "mean": mean.mean,
        "low": mean.low,
        "high": mean.high,
        "step": step,
        "images": current["images"].max(),
        "best": mean_interval(history.min() if goal == "min" else history.max()).mean,
    }
