"""The data behind the figures as frames, a row per measurement or per compared arm, and the figures' colours.

Imports no drawing library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from repa_lab.report.results import STEPS, Axis, Results
from repa_lab.report.statistics import MIN_SEEDS, Estimate, mean_interval, speedup
from repa_lab.report.summary import bare_name, is_protocol

COLUMNS = [
    *("group", "arm", "name", "is_baseline", "rank", "hue", "resolved", "metric", "seed", "step", "progress", "value"),
    *("n", "place", "mean", "low", "high", "speedup"),
]
ALIGNMENT = {
    "heldout/cka": "CKA with the encoder",
    "heldout/cosine": "cosine to the encoder",
    "heldout/gap": "matched - mismatched",
}
PALETTE = ("#0b6fb8", "#d1570a", "#128a5f", "#a83a86", "#8a6d00", "#5b4bb5")
GREY = "#7d848c"
FAINT = "#cdd2d8"
INK = "#24292f"
SOFT = "#57606a"
MAX_BANDS = 3  # arms of a panel that have bands; those of more arms would hide each other


def convergence_frame(results: Results, axis: Axis = STEPS) -> pd.DataFrame:
    """Return the compared metric of every arm of one sweep over a measure of progress.

    Columns: ``group`` (the baseline that arms share) and ``arm``; ``name``, the arm's label without what its group
    shares; ``rank`` of the arm in its group by the compared metric, 0 is best and -1 the baseline; ``hue``, its colour;
    ``resolved``, whether the summary calls it different from its baseline; ``metric`` by :meth:`Results.names`;
    ``value`` by ``seed``, ``step`` and ``progress`` along the axis; and, repeated for every seed of a step, ``n``,
    ``mean`` and its 95 % interval ``low`` to ``high`` at ``place``, the mean progress. Steps that some of the arm's
    measured seeds lack have no ``mean``: the mean would jump as seeds drop out. ``speedup`` over the baseline is there
    if every seed has one and its interval excludes 1.
    """
    return _frame(results, [(arm, metric) for arm, metric in results.compared_metrics.items() if metric], axis)


def alignment_frame(results: Results) -> pd.DataFrame:
    """Return held-out alignment of every arm of one sweep over steps; columns as in :func:`convergence_frame`."""
    measured = dict.fromkeys(metric for arm in results.baselines for metric in results.metrics(arm))
    metrics = [*ALIGNMENT, *(metric for metric in measured if not is_protocol(metric) and metric not in ALIGNMENT)]
    pairs = [(arm, metric) for arm in results.baselines for metric in metrics if not results.conflicts(arm, metric)]
    return _frame(results, pairs, STEPS)


def quality_frame(results: Results, alignment: str = "heldout/cka") -> pd.DataFrame:
    """Return a row per run and evaluation of one sweep that measured both the compared metric and alignment.

    ``quality`` is the compared metric and ``alignment`` the one named ``alignment_metric``; the other columns are those
    of :func:`convergence_frame`.
    """
    quality = convergence_frame(results).rename(columns={"value": "quality"}).drop(columns=["n", "mean", "low", "high"])
    aligned = alignment_frame(results)
    aligned = aligned[aligned["metric"].map(bare_name) == alignment][["arm", "seed", "step", "value", "metric"]]
    aligned = aligned.rename(columns={"value": "alignment", "metric": "alignment_metric"})
    return quality.merge(aligned, on=["arm", "seed", "step"]).dropna(subset=["alignment", "quality"])


def differences_frame(results: Results) -> pd.DataFrame:
    """Return the rows of the summary with a difference of the compared metric, named by :meth:`Results.names`."""
    rows = results.summary[results.summary["metric"] == results.summary["arm"].map(results.compared_metrics)]
    rows = rows[rows["n_pairs"] > 0].reset_index(drop=True)
    names = [results.names(metric)[arm] for arm, metric in zip(rows["arm"], rows["metric"], strict=True)]
    return rows.assign(metric=names)


def panels(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the rows of every panel (group and metric), in the order of the frame; each can be drawn alone."""
    for _, rows in frame.groupby(["group", "metric"], sort=False):
        yield rows


def caption(frame: pd.DataFrame) -> str:
    """Explain the lines and bands of a figure of curves."""
    most = int(frame["n"].max())
    if most <= 1:
        return "One seed: no interval."
    is_crowded = frame.groupby(["group", "metric"])["arm"].nunique().max() > MAX_BANDS
    if is_crowded and most < MIN_SEEDS:
        return "Line: mean over two seeds, which are too few for a useful interval."
    spread = "Bar: 95 % interval of the last mean" if is_crowded else "Band: 95 % interval of that mean"
    thin = "; thin: single seeds" if needs_seeds(frame) and not is_crowded else ""
    return f"Line: mean over n seeds{thin}. {spread}; by seed (paired), arms may differ clearly where these overlap."


def needs_seeds(rows: pd.DataFrame) -> bool:
    """Return whether to draw single seeds: the band of two is very wide, and the mean ends where a seed stops."""
    return rows["n"].max() in range(2, MIN_SEEDS) or bool(rows["mean"].isna().any())


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of an arm that have a mean, one per step."""
    return rows.drop_duplicates("step").dropna(subset=["mean"]).sort_values("step")


def unique(frame: pd.DataFrame, column: str) -> list[str]:
    """Return the distinct values of a column in their order."""
    return [str(value) for value in frame[column].unique()]


def shared_parts(labels: Sequence[str]) -> list[str]:
    """Return the comma-separated parts that all of several labels share."""
    if len(labels) < 2:
        return []
    others = [set(label.split(", ")) for label in labels[1:]]
    return [part for part in labels[0].split(", ") if all(part in parts for parts in others)]


def _frame(results: Results, pairs: Iterable[tuple[str, str]], axis: Axis) -> pd.DataFrame:
    summary, ranks = results.summary, _ranks(results)
    verdicts = dict(zip(zip(summary["arm"], summary["metric"], strict=True), summary["verdict"], strict=True))
    rows: list[dict[str, Any]] = []
    groups: dict[str, dict[str, None]] = {}
    for arm, metric in pairs:
        labels: dict[str, Any]
        if points := _points(results, arm, metric, axis):
            group = results.baselines[arm] or (arm if ranks[arm] < 0 else "")
            groups.setdefault(group, {})[arm] = None
            labels = {"group": group, "arm": arm, "is_baseline": ranks[arm] < 0, "rank": ranks[arm]}
            labels |= {"metric": results.names(metric)[arm], "resolved": verdicts.get((arm, metric)) == "resolved"}
            labels |= {"speedup": _resolved_speedup(results, arm, metric, axis) if labels["resolved"] else None}
            rows += [{**labels, **point} for point in points]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame["name"] = frame["arm"].map(_names(groups))
    frame["hue"] = frame["arm"].map(_hues(groups, ranks))
    return frame


def _resolved_speedup(results: Results, arm: str, metric: str, axis: Axis) -> Estimate | None:
    faster = speedup(*results.paired_curves(arm, metric, axis.name), results.goal)
    if faster is None or faster.reached < faster.n or faster.n < MIN_SEEDS or faster.ratio.low <= 1:
        return None
    return faster.ratio


def _points(results: Results, arm: str, metric: str, axis: Axis) -> list[dict[str, float]]:
    """Return the finite values of an arm, step by step, each with the mean and interval of its step."""
    steps: dict[float, dict[int, tuple[float, float]]] = {}  # place and value by step and seed
    for seed, curve in results.seed_curves(arm, metric).items():
        places = results.places(arm, seed, axis.name)
        for step, value in curve.items():
            if math.isfinite(value) and not math.isnan(places[step]):
                steps.setdefault(step, {})[seed] = places[step], value
    most, points = max(map(len, steps.values()), default=0), []
    for step, seeds in sorted(steps.items()):
        interval = mean_interval(value for _, value in seeds.values())
        band = {"mean": interval.mean, "low": interval.low, "high": interval.high} if interval.n == most else {}
        mean_place = sum(place for place, _ in seeds.values()) / len(seeds)
        for seed, (place, value) in seeds.items():
            point = {"seed": seed, "step": step, "progress": place, "value": value}
            points.append({**point, "n": interval.n, "place": mean_place, **band})
    return points


def _ranks(results: Results) -> dict[str, int]:
    """Rank arms by the compared metric at equal progress, so that an arm has one colour in all figures; NaN is last."""
    sign, summary = 1.0 if results.goal == "min" else -1.0, results.summary
    measured = zip(summary["arm"], summary["metric"], summary["mean"], strict=True)
    order = {arm: sign * mean for arm, metric, mean in measured if metric == results.compared_metrics[arm]}
    ranks: dict[str, int] = dict.fromkeys((arm for arm in results.baselines.values() if arm), -1)
    groups: dict[str | None, list[str]] = {}
    for arm, baseline in results.baselines.items():
        if arm not in ranks:
            groups.setdefault(baseline, []).append(arm)
    for arms in groups.values():
        best_first = sorted(arms, key=lambda arm: (math.isnan(order.get(arm, math.nan)), order.get(arm, 0.0)))
        ranks |= {arm: rank for rank, arm in enumerate(best_first)}
    return ranks


def _hues(groups: Mapping[str, Iterable[str]], ranks: Mapping[str, int]) -> dict[str, int]:
    """Return colour indices by rank; an arm alone against its baseline has the index of its group."""
    hues = dict.fromkeys(ranks, -1)
    for place, arms in enumerate(groups.values()):
        others = sorted((arm for arm in arms if ranks[arm] >= 0), key=lambda arm: ranks[arm])
        first = place if len(others) == 1 else 0
        hues |= {arm: first + rank for rank, arm in enumerate(others)}
    return hues


def _names(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return labels without the parts that all arms of a group share."""
    names: dict[str, str] = {}
    for arms in groups.values():
        shared = shared_parts(list(arms))
        names |= {arm: ", ".join(part for part in arm.split(", ") if part not in shared) or arm for arm in arms}
    return names
