"""Arms beside their baselines at equal progress."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from repa_lab.metrics.protocol import goal_of_kind
from repa_lab.report.protocols import Protocols
from repa_lab.report.statistics import Curve, Goal, holm, mean_interval, paired_difference, verdict

SeedCurves = Mapping[int, Curve]
Index = dict[tuple[str, str, str], dict[int, dict[float, float]]]
Row = dict[str, Any]
KEYS = ("sweep", "arm")
REFUSED = "refused"
SUMMARY_COLUMNS = [
    *("sweep", "arm", "baseline", "metric", "step", "seeds", "n", "mean", "low", "high"),
    *("baseline_mean", "diff", "diff_low", "diff_high", "n_pairs", "relative"),
    *("correlation", "p", "p_holm", "comparisons", "verdict", "conflicts"),
]


def is_protocol(metric: str) -> bool:
    """Whether the metric's name carries a sampling protocol, as ``fid:inception@10000/sde250`` does."""
    return "@" in metric


def is_evaluation(metric: str) -> bool:
    """Whether the metric is measured on EMA weights at evaluations, rather than logged while training."""
    return is_protocol(metric) or metric.startswith("heldout/")


def metric_kind(metric: str) -> str:
    """What the metric is, whatever its protocol; FID is the Frechet distance of one extractor, so both are one kind."""
    kind = metric.partition(":")[0]
    return "frechet" if kind == "fid" else kind


def goal_of(metric: str) -> Goal:
    """Whether small or large values of an evaluation metric, or of its kind, are good; agreement with an encoder is good."""
    return "max" if metric.startswith("heldout/") else goal_of_kind(metric_kind(metric))


def evaluations(curves: pd.DataFrame) -> pd.DataFrame:
    """The rows of the evaluation metrics: few beside what is logged while training."""
    return curves[curves["metric"].isin([name for name in curves["metric"].unique() if is_evaluation(name)])]


def index_curves(curves: pd.DataFrame, axis: str = "step") -> Index:
    """The curves of the evaluation metrics by seed, under (sweep, arm, metric), in the order of the frame.

    Args:
        curves: see :class:`repa_lab.report.results.Results`.
        axis: the column of progress; measurements of which it is not known are left out.
    """
    index: Index = {}
    measured = evaluations(curves).dropna(subset=[axis])
    columns = (measured[name] for name in (*KEYS, "metric", "seed", axis, "value"))
    for sweep, arm, metric, seed, place, value in zip(*columns, strict=True):
        index.setdefault((sweep, arm, metric), {}).setdefault(int(seed), {})[place] = float(value)
    return index


def summarize(runs: pd.DataFrame, index: Index, protocols: Protocols = Protocols()) -> pd.DataFrame:  # noqa: B008, frozen
    """One row per arm and evaluation metric, at the last step that all runs of the arm and of its baseline have.

    Columns: ``seeds`` planned; ``n`` seeds with a finite value, their ``mean`` and its 95 % interval ``low`` to
    ``high``; ``baseline_mean`` over the paired seeds; ``diff``, ``diff_low``, ``diff_high`` of the arm minus its
    baseline by seed over ``n_pairs`` seeds; ``relative`` is diff over ``|baseline_mean|``; ``correlation`` of arm and
    baseline over the seeds; ``p`` of the paired t-test and ``p_holm``, which holds for all ``comparisons`` of the sweep
    at once; ``verdict``: see :func:`repa_lab.report.statistics.verdict`, empty without a baseline.

    A run without a single measurement of the metric is left out (``n`` shows it). Metrics of different protocols are
    different metrics and never meet: where runs recorded protocols that differ under one name, ``conflicts`` names the
    fields, the verdict is ``refused`` and there is no difference; an arm whose own runs differ has no mean either.
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
    """How many arms each sweep compares with a baseline that is not the very same run: those not measured yet count."""
    counts: dict[str, int] = {}
    for sweep, rows in runs.groupby("sweep", sort=False):
        ids = {arm: set(group) for arm, group in rows.groupby("arm")["run_id"]}
        pairs = rows[["arm", "baseline"]].dropna().drop_duplicates()
        counts[str(sweep)] = sum(
            ids[arm] != ids.get(base) for arm, base in zip(pairs["arm"], pairs["baseline"], strict=True)
        )
    return counts


def _rows(runs: pd.DataFrame, index: Index, protocols: Protocols) -> Iterator[Row]:
    baselines = dict(zip(zip(runs["sweep"], runs["arm"], strict=True), runs["baseline"], strict=True))
    ids = {
        (sweep, arm, int(seed)): run
        for sweep, arm, seed, run in runs[[*KEYS, "seed", "run_id"]].itertuples(index=False)
    }
    planned = runs.groupby(list(KEYS)).size()
    for (sweep, arm, metric), curves in index.items():
        baseline = None if pd.isna(baselines[sweep, arm]) else baselines[sweep, arm]
        others = index.get((sweep, baseline, metric), {}) if baseline else {}
        own, other = [ids[sweep, arm, seed] for seed in curves], [ids[sweep, str(baseline), seed] for seed in others]
        values = _compare(curves, others)
        if values:
            keys = {"sweep": sweep, "arm": arm, "baseline": baseline, "metric": metric, "seeds": planned[sweep, arm]}
            fine = {"verdict": "", "conflicts": ""}
            yield {**keys, **values, **fine, **_refused(protocols, own, other, metric)}


def _compare(arm: SeedCurves, baseline: SeedCurves) -> Row:
    step = common_step([*arm.values(), *baseline.values()])
    if step is None:
        return {}
    own, other = ({seed: curve[step] for seed, curve in curves.items()} for curves in (arm, baseline))
    mean, pairs = mean_interval(own.values()), paired_difference(own, other)
    diff = pairs.difference
    return {
        **{"step": step, "n": mean.n, "mean": mean.mean, "low": mean.low, "high": mean.high},
        **{"baseline_mean": pairs.baseline_mean, "diff": diff.mean, "diff_low": diff.low, "diff_high": diff.high},
        **{"n_pairs": diff.n, "relative": pairs.relative, "correlation": pairs.correlation, "p": pairs.p_value},
    }


def _refused(protocols: Protocols, own: list[str], other: list[str], metric: str) -> Row:
    """What a summary row loses to runs whose protocols of the metric differ."""
    conflicts = protocols.conflicts([*own, *other], metric)
    if not conflicts:
        return {}
    gone = ["baseline_mean", "diff", "diff_low", "diff_high", "relative", "correlation", "p"]
    if protocols.conflicts(own, metric):
        gone += ["mean", "low", "high"]
    return {**dict.fromkeys(gone, math.nan), "n_pairs": 0, "verdict": REFUSED, "conflicts": "; ".join(conflicts)}


def common_step(curves: list[Curve]) -> float | None:
    """Equal progress: the last step that every curve has; comparing last values would reward who trained longest."""
    steps = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return max(steps, default=None)
