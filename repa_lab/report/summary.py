"""Metric names, the protocols behind them, and arms beside their baselines at equal progress."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from repa_lab.metrics.protocol import differences, goal_of_kind
from repa_lab.report.statistics import Curve, Goal, SeedCurves, holm, mean_interval, paired_difference, verdict

Index = dict[tuple[str, str, str], dict[int, dict[float, float]]]  # curves by seed, by (sweep, arm, metric)
Protocol = Mapping[str, Any]
Row = dict[str, Any]
KEYS = ("sweep", "arm")
REFUSED = "refused"
SUMMARY_COLUMNS = [
    *("sweep", "arm", "baseline", "metric", "step", "seeds", "n", "mean", "low", "high"),
    *("baseline_mean", "diff", "diff_low", "diff_high", "n_pairs", "relative"),
    *("correlation", "p", "p_holm", "comparisons", "verdict", "conflicts"),
]
_MAX_VALUES = 3
_MAX_CHARACTERS = 60
_SHA256_CHARACTERS = 64
_SHORT_CHARACTERS = 12


def is_protocol(metric: str) -> bool:
    """Return whether a metric's name carries a sampling protocol, as ``fid:inception@10000/sde250`` does."""
    return "@" in metric


def is_evaluation(metric: str) -> bool:
    """Return whether a metric is measured on averaged weights at evaluations, rather than logged while training."""
    return is_protocol(metric) or metric.startswith("heldout/")


def metric_kind(metric: str) -> str:
    """Return a metric's kind without its protocol; FID is a Frechet distance, so both are ``frechet``."""
    kind = metric.partition(":")[0]
    return "frechet" if kind == "fid" else kind


def goal_of(metric: str) -> Goal:
    """Return whether small or large values of an evaluation metric, or of a kind of metric, are good."""
    return "max" if metric.startswith("heldout/") else goal_of_kind(metric_kind(metric))


@dataclass(frozen=True)
class Protocols:
    """The protocols that runs recorded, by run id and metric.

    Values with one name but different protocols are different metrics, so they are never compared.
    """

    by_run: Mapping[str, Mapping[str, Protocol]] = field(default_factory=dict)

    def conflicts(self, runs: Iterable[str], metric: str) -> list[str]:
        """Return the fields in which the runs' protocols of a metric differ, each with its values.

        Args:
            runs: run ids; runs without a recorded protocol are left out.
            metric: full name.
        """
        protocols = [self.by_run[run][metric] for run in dict.fromkeys(runs) if metric in self.by_run.get(run, {})]
        fields = sorted({name for protocol in protocols[1:] for name in differences(protocols[0], protocol)})
        return [f"{name} ({_listed(protocol.get(name) for protocol in protocols)})" for name in fields]

    def names(self, arms: Mapping[str, Iterable[str]], metric: str) -> dict[str, str]:
        """Return the name of a metric for each arm, so that one name stands for one protocol.

        If arms were measured under different protocols, the fields that differ follow the name. Arms without a recorded
        protocol keep the bare name. An arm whose own runs differ has no mean; its first run gives the name.

        Args:
            arms: run ids by arm.
            metric: full name.
        """
        protocols: dict[str, Protocol] = {}
        for arm, runs in arms.items():
            for run in runs:
                if metric in self.by_run.get(run, {}):
                    protocols.setdefault(arm, self.by_run[run][metric])
        first, *others = [*protocols.values()] or [{}]
        fields = sorted({name for other in others for name in differences(first, other)})
        flat = {arm: dict(dotted({name: protocol.get(name) for name in fields})) for arm, protocol in protocols.items()}
        paths = sorted({path for leaves in flat.values() for path in leaves})
        differing = [path for path in paths if len({_text(leaves.get(path)) for leaves in flat.values()}) > 1]
        suffixes = {
            arm: ", ".join(f"{path}: {_short(leaves.get(path))}" for path in differing) for arm, leaves in flat.items()
        }
        return {arm: f"{metric} ({suffixes[arm]})" if suffixes.get(arm) else metric for arm in arms}

    def missing(self, runs: Iterable[str], metric: str) -> list[str]:
        """Return the runs that recorded no protocol of a metric."""
        return [run for run in dict.fromkeys(runs) if metric not in self.by_run.get(run, {})]


def bare_name(name: str) -> str:
    """Return the metric's own name from a name that :meth:`Protocols.names` gave."""
    return name.partition(" (")[0]


def dotted(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their dotted names."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from dotted(inner, f"{path}.{key}" if path else str(key))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    """Shorten a value to a few characters; different values stay different."""
    text = _text(value)
    if len(text) <= 2 * _SHORT_CHARACTERS:
        return text
    if len(text) == _SHA256_CHARACTERS:
        return text[:_SHORT_CHARACTERS]
    return f"{text[:_SHORT_CHARACTERS]}... #{hashlib.sha256(text.encode()).hexdigest()[:_SHORT_CHARACTERS]}"


def _listed(values: Iterable[Any]) -> str:
    texts = list(dict.fromkeys(map(_text, values)))
    short = [text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..." for text in texts[:_MAX_VALUES]]
    return " / ".join([*short, *(["..."] if len(texts) > _MAX_VALUES else [])])


def evaluations(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the evaluation metrics."""
    return curves[curves["metric"].isin([name for name in curves["metric"].unique() if is_evaluation(name)])]


def index_curves(measured: pd.DataFrame, axis: str = "step") -> Index:
    """Index curves by (sweep, arm, metric) and seed, in the order of the frame.

    Args:
        measured: rows of evaluation metrics; see :class:`repa_lab.report.results.Results`.
        axis: the column of progress; measurements without it are left out.
    """
    index: Index = {}
    known = measured.dropna(subset=[axis])
    columns = (known[name] for name in (*KEYS, "metric", "seed", axis, "value"))
    for sweep, arm, metric, seed, place, value in zip(*columns, strict=True):
        index.setdefault((sweep, arm, metric), {}).setdefault(int(seed), {})[place] = float(value)
    return index


def summarize(runs: pd.DataFrame, index: Index, protocols: Protocols) -> pd.DataFrame:
    """Return one row per arm and evaluation metric, at the last step that all runs of the arm and its baseline have.

    Columns: ``seeds`` planned; ``n`` seeds with a finite value, their ``mean`` and its 95 % interval ``low`` to
    ``high``; ``baseline_mean`` over the paired seeds; ``diff``, ``diff_low``, ``diff_high`` of the arm minus its
    baseline by seed over ``n_pairs`` seeds; ``relative`` is diff over ``|baseline_mean|``; ``correlation`` of arm and
    baseline over the seeds; ``p`` of the paired t-test and ``p_holm``, which holds for all ``comparisons`` of the sweep
    at once; ``verdict`` (see :func:`repa_lab.report.statistics.verdict`), empty without a baseline.

    Runs that never measured the metric are left out (``n`` shows it). If runs recorded different protocols under one
    name, ``conflicts`` names the fields, the verdict is ``refused`` and there is no difference; an arm whose own runs
    differ has no mean either.
    """
    frame = pd.DataFrame(_rows(runs, index, protocols), columns=SUMMARY_COLUMNS)
    frame["comparisons"] = frame["sweep"].map(comparisons(runs)).fillna(0).astype(int)
    for _, rows in frame.groupby(["sweep", "metric"]):
        frame.loc[rows.index, "p_holm"] = holm(rows["p"].tolist(), int(rows["comparisons"].iloc[0]))
    compared = frame["baseline"].notna() & (frame["verdict"] != REFUSED)
    frame.loc[compared, "verdict"] = [
        verdict(n, p) for n, p in zip(frame.loc[compared, "n_pairs"], frame.loc[compared, "p_holm"], strict=True)
    ]
    return frame


def comparisons(runs: pd.DataFrame) -> dict[str, int]:
    """Count, by sweep, the arms whose baseline is not the very same run; arms that are not measured yet count too."""
    counts: dict[str, int] = {}
    for sweep, rows in runs.groupby("sweep", sort=False):
        ids = {arm: set(group) for arm, group in rows.groupby("arm")["run_id"]}
        pairs = rows[["arm", "baseline"]].dropna().drop_duplicates().itertuples(index=False)
        counts[str(sweep)] = sum(ids[arm] != ids.get(baseline) for arm, baseline in pairs)
    return counts


def _rows(runs: pd.DataFrame, index: Index, protocols: Protocols) -> Iterator[Row]:
    baselines = dict(zip(zip(runs["sweep"], runs["arm"], strict=True), runs["baseline"], strict=True))
    columns = runs[[*KEYS, "seed", "run_id"]].itertuples(index=False)
    ids = {(sweep, arm, int(seed)): run for sweep, arm, seed, run in columns}
    planned = runs.groupby(list(KEYS)).size()
    for (sweep, arm, metric), curves in index.items():
        baseline = None if pd.isna(baselines[sweep, arm]) else baselines[sweep, arm]
        baseline_curves = index.get((sweep, baseline, metric), {}) if baseline else {}
        step = common_step([*curves.values(), *baseline_curves.values()])
        if step is None:
            continue
        row = {"sweep": sweep, "arm": arm, "baseline": baseline, "metric": metric, "seeds": planned[sweep, arm]}
        row |= {"step": step, **_compare(curves, baseline_curves, step), "verdict": "", "conflicts": ""}
        arm_runs = [ids[sweep, arm, seed] for seed in curves]
        baseline_runs = [ids[sweep, str(baseline), seed] for seed in baseline_curves]
        if conflicts := protocols.conflicts([*arm_runs, *baseline_runs], metric):
            refused = ["baseline_mean", "diff", "diff_low", "diff_high", "relative", "correlation", "p"]
            refused += ["mean", "low", "high"] if protocols.conflicts(arm_runs, metric) else []
            row |= {**dict.fromkeys(refused, math.nan), "n_pairs": 0}
            row |= {"verdict": REFUSED, "conflicts": "; ".join(conflicts)}
        yield row


def _compare(arm: SeedCurves, baseline: SeedCurves, step: float) -> Row:
    values, baseline_values = ({seed: curve[step] for seed, curve in side.items()} for side in (arm, baseline))
    mean, pairs = mean_interval(values.values()), paired_difference(values, baseline_values)
    diff = pairs.difference
    return {
        **{"n": mean.n, "mean": mean.mean, "low": mean.low, "high": mean.high},
        **{"baseline_mean": pairs.baseline_mean, "diff": diff.mean, "diff_low": diff.low, "diff_high": diff.high},
        **{"n_pairs": diff.n, "relative": pairs.relative, "correlation": pairs.correlation, "p": pairs.p_value},
    }


def common_step(curves: list[Curve]) -> float | None:
    """Return the last step that every curve has: comparing last values would reward the longest training."""
    steps = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return max(steps, default=None)
