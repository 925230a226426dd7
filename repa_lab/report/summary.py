"""Arms beside their baselines at equal progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from repa_lab.report.statistics import Curve, mean_interval, paired_difference

SeedCurves = Mapping[int, Curve]
Index = dict[tuple[str, str, str], dict[int, dict[int, float]]]
KEYS = ("sweep", "arm")
SUMMARY_COLUMNS = [
    *("sweep", "arm", "baseline", "metric", "step", "seeds", "n", "mean", "low", "high"),
    *("baseline_mean", "diff", "diff_low", "diff_high", "n_pairs", "relative"),
]


def is_protocol(metric: str) -> bool:
    """Whether the metric's name carries a sampling protocol, as ``fid:inception@10000/sde250`` does."""
    return "@" in metric


def is_evaluation(metric: str) -> bool:
    """Whether the metric is measured on EMA weights at evaluations, rather than logged while training."""
    return is_protocol(metric) or metric.startswith("heldout/")


def metric_kind(metric: str) -> str:
    """What the metric is, whatever its protocol; FID is the Frechet distance of one extractor, so both are one kind."""
    return metric.partition(":")[0].replace("fid", "frechet")


def index_curves(curves: pd.DataFrame) -> Index:
    """The curves of the evaluation metrics by seed, under (sweep, arm, metric), in the order of the frame."""
    index: Index = {}
    measured = curves[curves["metric"].map(is_evaluation).astype(bool)]
    columns = (measured[name] for name in (*KEYS, "metric", "seed", "step", "value"))
    for sweep, arm, metric, seed, step, value in zip(*columns, strict=True):
        index.setdefault((sweep, arm, metric), {}).setdefault(int(seed), {})[int(step)] = float(value)
    return index


def summarize(runs: pd.DataFrame, index: Index) -> pd.DataFrame:
    """One row per arm and evaluation metric, at the last step that all runs of the arm and of its baseline have.

    Columns: ``seeds`` planned; ``n`` seeds with a finite value, their ``mean`` and its 95 % interval ``low`` to
    ``high``; ``baseline_mean`` over the paired seeds; ``diff``, ``diff_low``, ``diff_high`` of the arm minus its
    baseline by seed over ``n_pairs`` seeds; ``relative`` is diff over baseline_mean. A run without a single measurement
    of the metric is left out (``n`` shows it). Metrics of different protocols are different metrics and never meet.
    """
    return pd.DataFrame(_rows(runs, index), columns=SUMMARY_COLUMNS)


def _rows(runs: pd.DataFrame, index: Index) -> Iterator[dict[str, Any]]:
    baselines = dict(zip(zip(runs["sweep"], runs["arm"], strict=True), runs["baseline"], strict=True))
    planned = runs.groupby(list(KEYS)).size()
    for (sweep, arm, metric), curves in index.items():
        baseline = None if pd.isna(baselines[sweep, arm]) else baselines[sweep, arm]
        values = _compare(curves, index.get((sweep, baseline, metric), {}) if baseline else {})
        keys = {"sweep": sweep, "arm": arm, "baseline": baseline, "metric": metric, "seeds": planned[sweep, arm]}
        if values:
            yield {**keys, **values}


def _compare(arm: SeedCurves, baseline: SeedCurves) -> dict[str, Any]:
    step = _common_step([*arm.values(), *baseline.values()])
    if step is None:
        return {}
    own, other = ({seed: curve[step] for seed, curve in curves.items()} for curves in (arm, baseline))
    mean, pairs = mean_interval(own.values()), paired_difference(own, other)
    diff = pairs.difference
    return {
        **{"step": step, "n": mean.n, "mean": mean.mean, "low": mean.low, "high": mean.high},
        **{"baseline_mean": pairs.baseline_mean, "diff": diff.mean, "diff_low": diff.low, "diff_high": diff.high},
        **{"n_pairs": diff.n, "relative": pairs.relative},
    }


def _common_step(curves: list[Curve]) -> int | None:
    """Equal progress: the last step that every curve has; comparing last values would reward who trained longest."""
    steps = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return max(steps, default=None)
