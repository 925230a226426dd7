"""The data behind the figures as frames: one row per measurement, or per compared arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from repa_lab.report.results import STEPS, Axis, Results
from repa_lab.report.statistics import band
from repa_lab.report.summary import bare_name, is_protocol

COLUMNS = [
    *("group", "arm", "name", "is_baseline", "rank", "hue", "resolved", "metric", "seed", "step", "progress", "value"),
    *("n", "place", "mean", "low", "high"),
]
ALIGNMENT = {
    "heldout/cka": "CKA with the encoder",
    "heldout/cosine": "cosine to the encoder",
    "heldout/gap": "matched - mismatched",
}


def convergence_frame(results: Results, axis: Axis = STEPS) -> pd.DataFrame:
    """Return the compared metric of every arm of one sweep over a measure of progress.

    Columns: ``group`` (the baseline that arms share) and ``arm``; ``name``, the arm's label without what its group
    shares; ``rank`` of the arm in its group by the compared metric, 0 is best and -1 the baseline; ``hue``, its colour;
    ``resolved``, whether the summary calls it different from its baseline; ``metric`` by :meth:`Results.names`;
    ``value`` by ``seed``, ``step`` and ``progress`` along the axis; and, repeated for every seed of a step, ``n``,
    ``mean`` and its 95 % interval ``low`` to ``high`` at ``place``, the mean progress. Steps that some of the arm's
    measured seeds lack have no ``mean``: the mean would jump as seeds drop out.
    """
    pairs = [(arm, metric) for arm in results.baselines if (metric := results.compared_metric(arm))]
    return _frame(results, pairs, axis)


def alignment_frame(results: Results) -> pd.DataFrame:
    """Return held-out alignment of every arm of one sweep over steps; columns as in :func:`convergence_frame`."""
    measured = dict.fromkeys(metric for arm in results.baselines for metric in results.metrics(arm))
    metrics = [*ALIGNMENT, *(metric for metric in measured if not is_protocol(metric) and metric not in ALIGNMENT)]
    pairs = [(arm, metric) for metric in metrics for arm in results.baselines if not results.conflicts(arm, metric)]
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
    compared = {arm: results.compared_metric(arm) for arm in results.baselines}
    rows = results.summary[results.summary["metric"] == results.summary["arm"].map(compared)]
    rows = rows[rows["n_pairs"] > 0].reset_index(drop=True)
    names = [results.names(metric)[arm] for arm, metric in zip(rows["arm"], rows["metric"], strict=True)]
    return rows.assign(metric=names)


def panels(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the rows of every panel (group and metric), in the order of the frame; each can be drawn alone."""
    for group, metric in frame[["group", "metric"]].drop_duplicates().itertuples(index=False):
        yield frame[(frame["group"] == group) & (frame["metric"] == metric)]


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
    return [part for part in labels[0].split(", ") if all(part in label.split(", ") for label in labels)]


def _frame(results: Results, pairs: Iterable[tuple[str, str]], axis: Axis) -> pd.DataFrame:
    frames = [rows for arm, metric in pairs if not (rows := _arm_frame(results, arm, metric, axis)).empty]
    if not frames:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.concat(frames, ignore_index=True)
    frame["name"] = frame["arm"].map(_names(frame))
    frame["rank"] = frame["arm"].map(_ranks(results))
    frame["hue"] = _hues(frame)
    return frame[COLUMNS]


def _arm_frame(results: Results, arm: str, metric: str, axis: Axis) -> pd.DataFrame:
    measured = results.evaluations[(results.evaluations["arm"] == arm) & (results.evaluations["metric"] == metric)]
    rows = measured.assign(progress=measured[axis.name].astype(float))[["seed", "step", "progress", "value"]].dropna()
    is_baseline = arm in results.baselines.values()
    verdicts = results.summary.loc[(results.summary["arm"] == arm) & (results.summary["metric"] == metric), "verdict"]
    return rows.merge(_bands(rows), on="step").assign(
        group=results.baselines[arm] or (arm if is_baseline else ""),
        arm=arm,
        is_baseline=is_baseline,
        resolved="resolved" in set(verdicts),
        metric=results.names(metric)[arm],
    )


def _bands(rows: pd.DataFrame) -> pd.DataFrame:
    estimates = [(step, band(group["value"]), group["progress"].mean()) for step, group in rows.groupby("step")]
    most = max((estimate.n for _, estimate, _ in estimates), default=0)
    bands = [
        (step, e.n, place, *((e.mean, e.low, e.high) if e.n == most else 3 * (math.nan,)))
        for step, e, place in estimates
    ]
    return pd.DataFrame(bands, columns=["step", "n", "place", "mean", "low", "high"])


def _ranks(results: Results) -> dict[str, int]:
    """Rank arms by the compared metric at equal progress, so that an arm has one colour in all figures; NaN is last."""
    sign = 1.0 if results.goal == "min" else -1.0
    means = {(row.arm, row.metric): sign * row.mean for row in results.summary.itertuples()}
    ranks: dict[str, int] = dict.fromkeys((arm for arm in results.baselines.values() if arm), -1)
    groups: dict[str | None, list[tuple[float, str]]] = {}
    for arm, baseline in results.baselines.items():
        if arm not in ranks:
            mean = means.get((arm, results.compared_metric(arm)), math.nan)
            groups.setdefault(baseline, []).append((math.inf if math.isnan(mean) else mean, arm))
    for group in groups.values():
        ranks |= {arm: rank for rank, (_, arm) in enumerate(sorted(group, key=lambda pair: pair[0]))}
    return ranks


def _hues(frame: pd.DataFrame) -> pd.Series:
    """Return colour indices by rank; an arm alone against its baseline has the index of its group."""
    groups = unique(frame, "group")
    others = frame[~frame["is_baseline"].astype(bool)].drop_duplicates("arm").sort_values("rank", kind="stable")
    hues: dict[str, int] = {}
    for group, arms in others.groupby("group"):
        first = groups.index(str(group)) if len(arms) == 1 else 0
        hues |= {arm: first + place for place, arm in enumerate(arms["arm"])}
    return frame["arm"].map(hues).fillna(-1).astype(int)


def _names(frame: pd.DataFrame) -> dict[str, str]:
    """Return labels without the parts that all arms of a group share."""
    names: dict[str, str] = {}
    for group in unique(frame, "group"):
        arms = unique(frame[frame["group"] == group], "arm")
        shared = shared_parts(arms)
        names |= {arm: ", ".join(part for part in arm.split(", ") if part not in shared) or arm for arm in arms}
    return names
