"""Every arm of every sweep of a runs root, best first: a table per protocol, because protocols cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa_lab.metrics.protocol import differences
from repa_lab.report.frames import Member, RunReader
from repa_lab.report.results import ResultsError, load_results
from repa_lab.report.statistics import Goal, finite, mean_interval
from repa_lab.report.summary import Protocol, common_step, dotted, goal_of, grouped, is_protocol, metric_kind
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
    """The arms that were measured under one protocol.

    Attributes:
        metric: the full name.
        goal: whether small or large values are good; the best arm is first.
        protocol: the fields, with values, in which this board's protocol differs from other boards of the same name.
        rows: an entry per arm with :data:`COLUMNS`. ``mean`` with its 95 % t interval ``low`` to ``high`` is over the
            ``n`` of ``seeds`` runs that have a finite value at ``step``, the last step that all measured runs have;
            ``best`` is the mean of each run's best value up to that step.
    """

    metric: str
    goal: Goal
    protocol: Protocol
    rows: tuple[Row, ...]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """:attr:`rows` as a data frame."""
        import pandas as pd  # takes a third of a second, which a table need not wait for

        return pd.DataFrame(self.rows, columns=COLUMNS)


@dataclass(frozen=True, eq=False)
class _Arm:
    """Arms that share runs, merged: a run's id is its whole content, so these arms are one."""

    labels: list[str]
    sweeps: list[str]
    readers: dict[str, RunReader]


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
    results = load_results(path)
    runs = {member.run_id: member for member in results.members}
    for member in runs.values():
        for line in troubles(member, member.reader.troubles_of_measurements()):
            tell(line)
    arms, boards = _merged(results.members), list[Board]()
    measured = sorted({name for member in runs.values() for name in member.reader.history.measurements})
    for name in (name for name in measured if protocol in name and _is_wanted(name, metric)):
        readers = {run: member.reader for run, member in runs.items() if name in member.reader.history.measurements}
        groups = grouped({run: recorded for run, reader in readers.items() if (recorded := _protocol(reader, name))})
        differing = sorted({field for first, _ in groups for other, _ in groups for field in differences(first, other)})
        for recorded, members in groups:
            rows = [row for arm in arms if (row := _row(arm, name, members)) is not None]
            sign = 1 if goal_of(name) == "min" else -1
            rows.sort(key=lambda row: (math.isnan(row["mean"]), sign * row["mean"]))
            boards.append(Board(name, goal_of(name), {field: recorded.get(field) for field in differing}, tuple(rows)))
    if not boards:
        names = ", ".join(filter(is_protocol, measured)) or "nothing"
        raise ResultsError(f"no such metric with a protocol in '{path}'; measured: {names}")
    return boards


def _is_wanted(name: str, metric: str | None) -> bool:
    if name == metric:
        return True
    is_full_name = metric is not None and ":" in metric
    return not is_full_name and is_protocol(name) and metric_kind(name) == metric_kind(metric or name)


def _protocol(reader: RunReader, metric: str) -> Protocol:
    """Return the recorded protocol; for a run without one, its data settings stand for it, if the name has the rest."""
    recorded = reader.protocols.get(metric)
    if recorded or not is_protocol(metric):
        return recorded or {}
    return {"recorded": False, **dotted({"data": reader.spec.get("data", {})})}


def _merged(members: Iterable[Member]) -> list[_Arm]:
    readers: dict[tuple[str, str], dict[str, RunReader]] = {}
    for member in members:
        readers.setdefault((member.keys["sweep"], member.arm.label), {})[member.run_id] = member.reader
    arm_of: dict[str, _Arm] = {}
    for (sweep, label), own in readers.items():
        arm = _Arm([], [], {})
        for other in [*dict.fromkeys(arm_of[run] for run in own if run in arm_of), _Arm([label], [sweep], own)]:
            arm.labels.extend(name for name in other.labels if name not in arm.labels)
            arm.sweeps.extend(name for name in other.sweeps if name not in arm.sweeps)
            arm.readers.update(other.readers)
        arm_of |= dict.fromkeys(arm.readers, arm)
    return list(dict.fromkeys(arm_of.values()))


def _row(arm: _Arm, metric: str, runs: set[str]) -> Row | None:
    """Return the row of an arm at equal progress; None if its measured runs share no step."""
    readers = [reader for run, reader in arm.readers.items() if run in runs]
    curves = [reader.history.measurements[metric] for reader in readers]
    step = common_step(curves)
    if step is None:
        return None
    mean, best = mean_interval(curve[step] for curve in curves), min if goal_of(metric) == "min" else max
    histories = [[value for at, value in finite(curve).items() if at <= step] for curve in curves]
    images = [reader.history.progress[step].images for reader in readers]
    settings = dotted(readers[0].spec)

    def setting(name: str) -> str:
        value = settings.get(name)
        return value if isinstance(value, str) else ""

    regularizers, encoders = _regularizers(readers[0].spec.get("regularizer"))
    return {
        "arm": " / ".join(arm.labels),
        "sweeps": ", ".join(arm.sweeps),
        "seeds": len(arm.readers),
        "state": ", ".join(dict.fromkeys(arm.readers[run].status for run in sorted(arm.readers))),
        "family": setting("model.family"),
        "size": setting("model.size") or setting("model.pretrained"),
        "regularizer": " + ".join(regularizers) or "none",
        "encoder": " + ".join(encoders),
        "n": mean.n,
        "mean": mean.mean,
        "low": mean.low,
        "high": mean.high,
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
