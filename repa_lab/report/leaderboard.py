"""Every arm of every sweep of a runs root, best first: a table for each protocol, for values of two protocols never meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repa_lab.metrics.protocol import differences
from repa_lab.report.exclusions import troubles
from repa_lab.report.results import Results, ResultsError, load_results
from repa_lab.report.statistics import Goal, mean_interval
from repa_lab.report.summary import goal_of, is_protocol, metric_kind

COLUMNS = [
    *("arm", "sweeps", "family", "size", "regularizer", "encoder", "state", "seeds"),
    *("n", "mean", "low", "high", "best", "step", "images"),
]
Protocol = Mapping[str, Any]


@dataclass(frozen=True)
class Board:
    """The arms that one protocol has measured.

    Attributes:
        metric: the full name.
        goal: whether small or large values are good; the best stand first.
        protocol: the fields in which what was measured here differs from other boards of the same name, with their
            values.
        frame: a row per arm with :data:`COLUMNS`. ``mean`` with its 95 % t interval ``low`` to ``high`` is over the
            ``n`` of ``seeds`` runs that have a finite value at ``step``, the last that all measured ones have; ``best``
            is the mean of each run's best value up to there.
    """

    metric: str
    goal: Goal
    protocol: Protocol
    frame: pd.DataFrame


@dataclass(frozen=True)
class _Entry:
    """Arms of several sweeps that share runs are one: a run's identity is all that it computes."""

    arms: tuple[str, ...]
    sweeps: tuple[str, ...]
    runs: frozenset[str]

    def joined(self, other: _Entry) -> _Entry:
        arms, sweeps = (tuple(dict.fromkeys(a + b)) for a, b in ((self.arms, other.arms), (self.sweeps, other.sweeps)))
        return _Entry(arms, sweeps, self.runs | other.runs)


@dataclass(frozen=True)
class _Known:
    """What is known of the runs beside their values: the entries, a row of facts per run, and protocols by run and metric."""

    entries: Sequence[_Entry]
    facts: pd.DataFrame
    protocols: Mapping[str, Mapping[str, Protocol]]

    @classmethod
    def of(cls, results: Results) -> _Known:
        facts = results.runs.drop_duplicates("run_id").set_index("run_id")
        return cls(_entries(results), facts, results.protocols.by_run)

    def protocol(self, run: str, metric: str) -> Protocol:
        return self.protocols.get(run, {}).get(metric) or _guessed(metric, self.facts.loc[run])


def leaderboards(
    path: str | Path, metric: str | None = None, protocol: str = "", tell: Callable[[str], None] = lambda line: None
) -> list[Board]:
    """The boards of a runs root, by metric.

    A metric is shown where its protocol is known: it stands in its name, or the run recorded it.

    Args:
        path: a runs root, or a sweep's folder.
        metric: its full name or its kind (Frechet distances are one kind); None is all that carry a protocol in their
            name.
        protocol: what the full name must contain, such as ``@50k`` or ``sde250``.
        tell: is told, a line for each run, what could not be read and is on no board.

    Raises:
        ResultsError: there is no sweep, or nothing of that name was measured.
    """
    results = load_results(path)
    once = results.troubles.drop_duplicates(["run_id", "where", "what"])  # of runs that several arms share
    for line in troubles(replace(results, troubles=once)):
        tell(line)
    known = _Known.of(results)
    values = results.curves.drop_duplicates(["run_id", "metric", "step"], keep="last")
    measured = sorted(values["metric"].unique())
    chosen = [name for name in measured if _is_wanted(name, metric) and protocol in name]
    boards = [board for name in chosen for board in _boards(name, values[values["metric"] == name], known)]
    if not boards:
        names = ", ".join(filter(is_protocol, measured)) or "nothing"
        raise ResultsError(f"no such metric with a protocol in '{path}'; measured: {names}")
    return boards


def _is_wanted(name: str, metric: str | None) -> bool:
    if metric is None or ":" not in metric:
        return name == metric or (is_protocol(name) and metric_kind(name) == metric_kind(metric or name))
    return name == metric


def _boards(metric: str, values: pd.DataFrame, known: _Known) -> Iterator[Board]:
    protocols = {run: known.protocol(run, metric) for run in values["run_id"].unique()}
    groups = _alike({run: protocol for run, protocol in protocols.items() if protocol})
    differing = sorted({field for one, _ in groups for other, _ in groups for field in differences(one, other)})
    for protocol, members in groups:
        frame = _frame(values[values["run_id"].isin(members)], known, goal_of(metric))
        yield Board(metric, goal_of(metric), {field: protocol.get(field) for field in differing}, frame)


def _guessed(metric: str, run: pd.Series) -> Protocol:
    """Of a run that recorded no protocols: the metric's name says how it was measured, and the settings on what data."""
    if not is_protocol(metric):
        return {}
    known = {name: value for name, value in run.items() if str(name).startswith("data.") and not pd.isna(value)}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in known.items()}
    return {"recorded": False, **plain}


def _alike(protocols: Mapping[str, Protocol]) -> list[tuple[Protocol, set[str]]]:
    """The runs whose protocols do not differ, with the protocol of one of them."""
    groups: list[tuple[Protocol, set[str]]] = []
    for run, protocol in protocols.items():
        group = next((members for one, members in groups if not differences(one, protocol)), None)
        if group is None:
            groups.append((protocol, {run}))
        else:
            group.add(run)
    return groups


def _entries(results: Results) -> list[_Entry]:
    entries: list[_Entry] = []
    for (sweep, arm), rows in results.runs.groupby(["sweep", "arm"], sort=False):
        entry = _Entry((str(arm),), (str(sweep),), frozenset(rows["run_id"]))
        for other in [one for one in entries if one.runs & entry.runs]:
            entries.remove(other)
            entry = other.joined(entry)
        entries.append(entry)
    return entries


def _frame(values: pd.DataFrame, known: _Known, goal: Goal) -> pd.DataFrame:
    rows = [_row(entry, values[values["run_id"].isin(entry.runs)], known.facts, goal) for entry in known.entries]
    frame = pd.DataFrame([row for row in rows if row], columns=COLUMNS)
    return frame.sort_values("mean", ascending=goal == "min", na_position="last", kind="stable", ignore_index=True)


def _row(entry: _Entry, values: pd.DataFrame, facts: pd.DataFrame, goal: Goal) -> dict[str, Any]:
    """An entry at equal progress; empty where no step was measured by all of its runs that measured anything."""
    common = values.groupby("step")["run_id"].nunique()
    steps = common[common == values["run_id"].nunique()].index
    if not len(steps):
        return {}
    step = steps.max()
    now, until = values[values["step"] == step], values[values["step"] <= step].groupby("run_id")["value"]
    mean = mean_interval(now["value"])
    measured = {
        "n": mean.n,
        "mean": mean.mean,
        "low": mean.low,
        "high": mean.high,
        "step": step,
        "images": now["images"].max(),
    }
    best = mean_interval(until.min() if goal == "min" else until.max()).mean
    states = ", ".join(facts.loc[sorted(entry.runs), "state"].unique())
    place = {
        "arm": " / ".join(entry.arms),
        "sweeps": ", ".join(entry.sweeps),
        "seeds": len(entry.runs),
        "state": states,
    }
    return {**place, **_settings(facts.loc[values["run_id"].iloc[0]]), **measured, "best": best}


def _settings(run: pd.Series) -> dict[str, str]:
    regularizer = _text(run, "regularizer.type")
    return {
        "family": _text(run, "model.family"),
        "size": _text(run, "model.size") or _text(run, "model.pretrained"),
        "regularizer": regularizer,
        "encoder": "" if regularizer == "none" else _encoders(run),
    }


def _encoders(run: pd.Series) -> str:
    several = run.get("regularizer.encoder")
    return (
        " + ".join(one["name"] for one in several)
        if isinstance(several, list)
        else _text(run, "regularizer.encoder.name")
    )


def _text(run: pd.Series, name: str) -> str:
    value = run.get(name)
    return value if isinstance(value, str) else ""
