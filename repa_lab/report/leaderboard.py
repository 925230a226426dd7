"""Every arm of every sweep of a runs root, best first: a table per protocol, because protocols cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_lab.report.reader import SweepRun
from repa_lab.report.results import ResultsError, load_results
from repa_lab.report.statistics import Goal, finite, mean_interval
from repa_lab.report.summary import Protocol, common_step, differing, dotted, goal_of, grouped, is_protocol, metric_kind
from repa_lab.report.text import troubles
from repa_lab.runs.files import Row, garbage_collection_paused

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    *("arm", "sweeps", "family", "size", "regularizer", "encoder", "state", "seeds"),
    *("n", "mean", "low", "high", "best", "step", "images"),
]


@dataclass(frozen=True)
class Board:
    """The arms that were measured under one protocol."""

    metric: str  # the full name
    goal: Goal  # whether small or large values are good; the best arm is first
    # the fields, with values, in which this board's protocol differs from other boards of the same name
    protocol: Protocol
    # an entry per arm with `COLUMNS`. `mean` with its 95 % t interval `low` to `high` is over the `n` of `seeds` runs
    # that have a finite value at `step`, the last step that all measured runs have; `best` is the mean of each run's
    # best value up to that step
    rows: tuple[Row, ...]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """:attr:`rows` as a data frame."""
        import pandas as pd  # takes a third of a second, which a table need not wait for

        return pd.DataFrame(self.rows, columns=COLUMNS)


@garbage_collection_paused()
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
    members = load_results(path).members
    runs = {run.run_id: run for run in members}
    for run in runs.values():
        for line in troubles(run, run.troubles_of_measurements()):
            tell(line)
    arms, boards = _merged(members), list[Board]()
    measured = sorted({name for run in runs.values() for name in run.curves})
    for name in (name for name in measured if protocol in name and _is_wanted(name, metric)):
        measuring = {run_id: run for run_id, run in runs.items() if name in run.curves}
        groups = grouped({run_id: known for run_id, run in measuring.items() if (known := _protocol(run, name))})
        fields, sign = differing([first for first, _ in groups]), 1 if goal_of(name) == "min" else -1
        for first, alike in groups:
            rows = [row for arm in arms if (row := _row(arm, runs, name, alike))]
            rows.sort(key=lambda row: (math.isnan(row["mean"]), sign * row["mean"]))
            boards.append(Board(name, goal_of(name), {field: first.get(field) for field in fields}, tuple(rows)))
    if not boards:
        names = ", ".join(filter(is_protocol, measured)) or "nothing"
        raise ResultsError(f"no such metric with a protocol in '{path}'; measured: {names}")
    return boards


def _is_wanted(name: str, metric: str | None) -> bool:
    if metric is not None and ":" in metric:
        return name == metric
    return name == metric or (is_protocol(name) and metric_kind(name) == metric_kind(metric or name))


def _protocol(run: SweepRun, metric: str) -> Protocol:
    """Return the recorded protocol; for a run without one, its data settings stand for it, if the name has the rest."""
    recorded = run.protocols.get(metric)
    if recorded or not is_protocol(metric):
        return recorded or {}
    return {"recorded": False, **dotted({"data": run.spec.get("data", {})})}


def _merged(members: Iterable[SweepRun]) -> list[list[SweepRun]]:
    """Return the runs of every arm; arms that share runs are one, because a run's id is its whole content."""
    arms: dict[tuple[str, str], list[SweepRun]] = {}
    for run in members:
        arms.setdefault((run.sweep, run.arm.label), []).append(run)
    arm_of: dict[str, list[SweepRun]] = {}
    for runs in arms.values():
        known = {id(arm_of[run.run_id]): arm_of[run.run_id] for run in runs if run.run_id in arm_of}
        merged = [run for arm in (*known.values(), runs) for run in arm]
        arm_of |= dict.fromkeys((run.run_id for run in merged), merged)
    return list({id(arm): arm for arm in arm_of.values()}.values())


def _row(arm: list[SweepRun], runs: Mapping[str, SweepRun], metric: str, alike: set[str]) -> Row | None:
    """Return the row of an arm at equal progress; None if its measured runs share no step.

    Only runs that are ``alike`` count: they measured the metric under one protocol. Files are those of ``runs``, each
    of which is read once.
    """
    by_id = {run.run_id: runs[run.run_id] for run in arm}
    measured = [run for run_id, run in by_id.items() if run_id in alike]
    curves = [run.curves[metric] for run in measured]
    step = common_step(curves)
    if step is None:
        return None
    mean, best = mean_interval(curve[step] for curve in curves), min if goal_of(metric) == "min" else max
    histories = [[value for at, value in finite(curve).items() if at <= step] for curve in curves]
    images = [run.curves.get("images", {}).get(step, math.nan) for run in measured]
    family, size, pretrained = (measured[0].setting(f"model.{name}") for name in ("family", "size", "pretrained"))
    regularizers, encoders = _regularizers(measured[0].setting("regularizer"))
    return {
        "arm": " / ".join(dict.fromkeys(run.arm.label for run in arm)),
        "sweeps": ", ".join(dict.fromkeys(run.sweep for run in arm)),
        "seeds": len(by_id),
        "state": ", ".join(dict.fromkeys(by_id[run_id].status for run_id in sorted(by_id))),
        "family": family if isinstance(family, str) else "",
        "size": next((text for text in (size, pretrained) if isinstance(text, str) and text), ""),
        "regularizer": " + ".join(regularizers) or "none",
        "encoder": " + ".join(encoders),
        **{"n": mean.n, "mean": mean.mean, "low": mean.low, "high": mean.high},
        "step": step,
        "images": max(filter(math.isfinite, images), default=math.nan),
        "best": mean_interval(best(history) for history in histories if history).mean,
    }


def _regularizers(recorded: Any) -> tuple[list[str], list[str]]:
    """Return what the recorded regularizers are called, without ``none``, and the names of their encoders, each once.

    A regularizer is called by its type, and by its own name before that if it has one.
    """
    labels, encoders = [], []
    for member in recorded if isinstance(recorded, list) else [recorded]:
        if isinstance(member, Mapping) and member.get("type", "none") != "none":
            labels.append(f"{member['name']} ({member['type']})" if member.get("name") else str(member["type"]))
            given = member.get("encoder")
            listed = given if isinstance(given, list) else [given]
            encoders += [str(one["name"]) for one in listed if isinstance(one, Mapping) and "name" in one]
    return labels, list(dict.fromkeys(encoders))
