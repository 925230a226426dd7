"""What the curves show, as data: one row per measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from repa_lab.report.pairing import pair
from repa_lab.report.progress import STEPS, Axis
from repa_lab.report.protocols import bare
from repa_lab.report.results import Results
from repa_lab.report.statistics import band
from repa_lab.report.summary import SeedCurves, is_protocol

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
    """What :func:`draw_convergence` shows of one sweep: the compared metric of every arm over a measure of progress.

    Columns: ``group`` (the arms that share a baseline) and ``arm``; ``name`` is the arm's label without what its group
    shares; ``rank`` of the arm in its group by the compared metric, 0 is best, and -1 for the baseline;
    ``hue`` is its place among the colours; ``resolved`` is whether the summary calls it different from its baseline;
    ``metric`` as :meth:`Results.names` has it; ``value`` by ``seed``, ``step`` and ``progress`` along the axis; and,
    repeated for every seed of a step, ``n``, ``mean`` and its 95 % interval ``low`` to ``high`` at ``place``, the mean
    progress. Steps that some of the arm's measured seeds lack have no ``mean``: it would jump as seeds drop out.
    """
    pairs = [(arm, metric) for arm in results.baselines if (metric := results.compared_metric(arm))]
    return _frame(results, pairs, axis)


def alignment_frame(results: Results) -> pd.DataFrame:
    """What :func:`draw_alignment` shows of one sweep: held-out alignment; columns as in :func:`convergence_frame`."""
    measured = dict.fromkeys(metric for arm in results.baselines for metric in results.metrics(arm))
    metrics = [*ALIGNMENT, *(metric for metric in measured if not is_protocol(metric) and metric not in ALIGNMENT)]
    pairs = [(arm, metric) for metric in metrics for arm in results.baselines if not results.conflicts(arm, metric)]
    return _frame(results, pairs, STEPS)


def quality_frame(results: Results, alignment: str = "heldout/cka") -> pd.DataFrame:
    """What :func:`draw_quality` shows of one sweep: a row per run and evaluation that measured both.

    ``quality`` is the compared metric and ``alignment`` the one named ``alignment_metric``; the other columns are those
    of :func:`convergence_frame`.
    """
    quality = convergence_frame(results).rename(columns={"value": "quality"}).drop(columns=["n", "mean", "low", "high"])
    aligned = alignment_frame(results)
    aligned = aligned[aligned["metric"].map(bare) == alignment][["arm", "seed", "step", "value", "metric"]]
    aligned = aligned.rename(columns={"value": "alignment", "metric": "alignment_metric"})
    return quality.merge(aligned, on=["arm", "seed", "step"]).dropna(subset=["alignment", "quality"])


def cells(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Group and metric of every panel, in the order of the frame."""
    pairs = frame[["group", "metric"]].drop_duplicates()
    return list(zip(pairs["group"], pairs["metric"], strict=True))


def panels(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of every panel, each a frame that can be drawn alone."""
    for group, metric in cells(frame):
        yield frame[(frame["group"] == group) & (frame["metric"] == metric)]


def paired(arm: pd.DataFrame, baseline: pd.DataFrame) -> tuple[SeedCurves, SeedCurves]:
    """The curves of an arm and of its baseline over progress; see :func:`repa_lab.report.pairing.pair`."""
    curves = (_by_seed(rows, "progress", "value") for rows in (arm, baseline))
    places = (_by_seed(rows, "step", "progress") for rows in (arm, baseline))
    return pair(*curves, *places)


def _by_seed(rows: pd.DataFrame, place: str, value: str) -> SeedCurves:
    """One column over another, by seed."""
    curves: dict[int, dict[float, float]] = {}
    for seed, at, found in zip(rows["seed"], rows[place], rows[value], strict=True):
        curves.setdefault(int(seed), {})[float(at)] = float(found)
    return curves


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of an arm that have a mean, one for each step."""
    return rows.drop_duplicates("step").dropna(subset=["mean"]).sort_values("step")


def unique(frame: pd.DataFrame, column: str) -> list[str]:
    """What stands in a column, in its order."""
    return [str(value) for value in frame[column].unique()]


def shared_parts(arms: Sequence[str]) -> list[str]:
    """The parts of their labels that all arms of a group share."""
    if len(arms) < 2:
        return []
    return [part for part in arms[0].split(", ") if all(part in arm.split(", ") for arm in arms)]


def _frame(results: Results, pairs: Iterable[tuple[str, str]], axis: Axis) -> pd.DataFrame:
    parts = [part for arm, metric in pairs if not (part := _arm_frame(results, arm, metric, axis)).empty]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    frame = pd.concat(parts, ignore_index=True)
    frame["name"] = frame["arm"].map(_names(frame))
    frame["rank"] = frame["arm"].map(_ranks(results))
    frame["hue"] = _hues(frame)
    return frame[COLUMNS]


def _arm_frame(results: Results, arm: str, metric: str, axis: Axis) -> pd.DataFrame:
    measured = results.evaluations
    own = measured[(measured["arm"] == arm) & (measured["metric"] == metric)]
    rows = own.assign(progress=own[axis.name].astype(float))[["seed", "step", "progress", "value"]].dropna()
    referenced = arm in results.baselines.values()
    group = results.baselines[arm] or (arm if referenced else "")
    verdicts = results.summary.loc[(results.summary["arm"] == arm) & (results.summary["metric"] == metric), "verdict"]
    facts = {"group": group, "arm": arm, "is_baseline": referenced, "resolved": "resolved" in set(verdicts)}
    facts["metric"] = results.names(metric)[arm]
    return rows.merge(_bands(rows), on="step").assign(**facts)


def _bands(rows: pd.DataFrame) -> pd.DataFrame:
    steps = [(step, band(group["value"]), group["progress"].mean()) for step, group in rows.groupby("step")]
    whole = max((estimate.n for _, estimate, _ in steps), default=0)
    bands = [
        (step, e.n, place, *((e.mean, e.low, e.high) if e.n == whole else 3 * (math.nan,))) for step, e, place in steps
    ]
    return pd.DataFrame(bands, columns=["step", "n", "place", "mean", "low", "high"])


def _ranks(results: Results) -> dict[str, int]:
    """By the compared metric at equal progress, so that an arm looks the same in every figure; unmeasured arms are last."""
    sign = 1.0 if results.goal == "min" else -1.0
    means = {(row.arm, row.metric): sign * row.mean for row in results.summary.itertuples()}
    ranks: dict[str, int] = dict.fromkeys((arm for arm in results.baselines.values() if arm), -1)
    groups: dict[str | None, list[tuple[float, str]]] = {}
    for arm, baseline in results.baselines.items():
        if arm not in ranks:
            mean = means.get((arm, results.compared_metric(arm)), math.nan)
            groups.setdefault(baseline, []).append((math.inf if math.isnan(mean) else mean, arm))
    for group in groups.values():
        ranks |= {arm: place for place, (_, arm) in enumerate(sorted(group, key=lambda one: one[0]))}
    return ranks


def _hues(frame: pd.DataFrame) -> pd.Series:
    """By rank; an arm that stands alone against its baseline has a hue of its group's."""
    groups = unique(frame, "group")
    others = frame[~frame["is_baseline"].astype(bool)].drop_duplicates("arm").sort_values("rank", kind="stable")
    hues: dict[str, int] = {}
    for group, arms in others.groupby("group"):
        first = groups.index(str(group)) if len(arms) == 1 else 0
        hues |= {arm: first + place for place, arm in enumerate(arms["arm"])}
    return frame["arm"].map(hues).fillna(-1).astype(int)


def _names(frame: pd.DataFrame) -> dict[str, str]:
    """Labels without the parts that all arms of a group share."""
    names: dict[str, str] = {}
    for group in unique(frame, "group"):
        arms = unique(frame[frame["group"] == group], "arm")
        shared = shared_parts(arms)
        names |= {arm: ", ".join(part for part in arm.split(", ") if part not in shared) or arm for arm in arms}
    return names
