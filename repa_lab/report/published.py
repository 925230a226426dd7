"""What was measured beside what a paper published: values, differences, order. It says which agree, and no more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from repa_lab.report.results import Results
from repa_lab.report.statistics import MIN_SEEDS, Estimate, PairedDifference, mean_interval, paired_difference
from repa_lab.report.summary import common_step, goal_of
from repa_lab.spec.options import PublishedConfig


@dataclass(frozen=True)
class Compared:
    """One arm's published and measured value of a metric.

    Attributes:
        arm: its label.
        run_ids: of its runs; arms that came to the same settings share them.
        published: the paper's value.
        measured: over seeds at equal progress; no values where none is there.
        published_difference: from the reference arm, by the paper.
        difference: from the reference arm, seed by seed.
        agrees: whether the measured mean is within the tolerance; None where none applies or nothing was measured.
    """

    arm: str
    run_ids: tuple[str, ...]
    published: float
    measured: Estimate
    published_difference: float
    difference: PairedDifference
    agrees: bool | None

    @property
    def same_sign(self) -> bool | None:
        """Whether the measured difference has the published one's sign; None where seeds do not tell it from 0."""
        if not self.published_difference or not self.difference.is_resolved:
            return None
        return (self.difference.difference.mean > 0) == (self.published_difference > 0)


@dataclass(frozen=True)
class Comparison:
    """A table of a paper against what was measured.

    Attributes:
        kind: of the paper's metric, such as ``fid``.
        metric: full name of the measured one.
        reference: the arm that is best by the paper, from which differences are taken.
        rows: the arms of both, in the spec's order.
        tolerance: see :class:`PublishedConfig`; None at a scale at which values are not the paper's.
        refused: arms whose values are left out, for under the metric's name they were measured unlike the reference.
    """

    kind: str
    metric: str
    reference: str
    rows: tuple[Compared, ...]
    tolerance: float | None
    refused: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every arm was measured."""
        return all(row.measured.n for row in self.rows)

    @property
    def spearman(self) -> float:
        """Spearman's rank correlation of published and measured means over the arms; NaN where one of them is constant."""
        rows = [row for row in self.rows if row.measured.n]
        return rank_correlation([row.published for row in rows], [row.measured.mean for row in rows])

    @property
    def pairs(self) -> tuple[int, int]:
        """Of the pairs of arms with distinct published values: how many are measured in that order, and how many there are."""
        rows = [row for row in self.rows if row.measured.n]
        alike = [_order(a, b) for a, b in itertools.combinations(rows, 2) if a.published != b.published]
        return sum(alike), len(alike)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of ranks, ties at their mean rank; NaN for fewer than two values or without spread."""
    if len(first) < 2 or len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    ranks = [pd.Series(values).rank().to_numpy() for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def compare_published(results: Results, published: PublishedConfig, exact: bool) -> tuple[Comparison, ...]:
    """Hold the results of one sweep against what was published of its arms.

    Args:
        results: of the sweep.
        published: of its experiment; arms that the sweep has not are left out.
        exact: whether the metrics are the paper's. Otherwise the sweep's own metric stands for the Frechet distance
            alone, and no value is asked to agree.

    Returns:
        A comparison for each kind of metric that at least two arms share, in the paper's order.
    """
    arms = {label: values for label, values in published.arms.items() if label in results.baselines}
    kinds = list(dict.fromkeys(kind for values in arms.values() for kind in values))
    wanted = kinds if exact else [kind for kind in kinds if kind == "fid"]
    found = (_compare(results, published, arms, kind, exact) for kind in wanted)
    return tuple(one for one in found if one is not None)


def _compare(
    results: Results, published: PublishedConfig, arms: Mapping[str, Mapping[str, float]], kind: str, exact: bool
) -> Comparison | None:
    values = {label: arms[label][kind] for label in results.baselines if kind in arms.get(label, {})}
    metric = next((name for name in results.summary["metric"].unique() if _kind(name) == kind), results.metric)
    if len(values) < 2 or (exact and _kind(metric) != kind):
        return None
    reference = _best(values, kind)
    tolerance = published.tolerance.get(kind) if exact else None
    refused = _unlike(results, metric, list(values), reference)
    held = _at_equal_progress(results, metric, [label for label in values if label not in refused])
    rows = tuple(_row(results, label, values, held, reference, tolerance) for label in values)
    return Comparison(kind, metric, reference, rows, tolerance, refused)


def _unlike(results: Results, metric: str, labels: Sequence[str], reference: str) -> tuple[str, ...]:
    """The arms that were measured, and unlike the reference, or unlike within themselves."""
    kept = results.run_ids(reference)
    unlike = (arm for arm in labels if results.protocols.conflicts([*kept, *results.run_ids(arm)], metric))
    return tuple(arm for arm in unlike if results.seed_curves(arm, metric))


def _kind(metric: str) -> str:
    """As papers call it: FID is no other Frechet distance."""
    return metric.partition(":")[0]


def _best(values: Mapping[str, float], kind: str) -> str:
    choose = max if goal_of(kind) == "max" else min
    return choose(values, key=lambda label: values[label])


def _at_equal_progress(results: Results, metric: str, labels: Sequence[str]) -> dict[str, dict[int, float]]:
    """By arm the value by seed, at the last step that all runs of these arms have that were measured at all."""
    curves = {label: found for label in labels if (found := results.seed_curves(label, metric))}
    step = common_step([curve for found in curves.values() for curve in found.values()])
    return (
        {}
        if step is None
        else {label: {seed: curve[step] for seed, curve in own.items()} for label, own in curves.items()}
    )


def _row(
    results: Results,
    label: str,
    values: Mapping[str, float],
    held: Mapping[str, Mapping[int, float]],
    reference: str,
    tolerance: float | None,
) -> Compared:
    own = held.get(label, {})
    measured = mean_interval(own.values())
    off = abs(measured.mean - values[label])
    return Compared(
        arm=label,
        run_ids=tuple(results.runs[results.runs["arm"] == label]["run_id"]),
        published=values[label],
        measured=measured,
        published_difference=values[label] - values[reference],
        difference=paired_difference(own, held.get(reference, {})),
        agrees=off <= tolerance if tolerance is not None and measured.n else None,
    )


def _order(first: Compared, second: Compared) -> bool:
    measured = first.measured.mean - second.measured.mean
    return (first.published - second.published) * measured > 0


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The comparison as rows of text by column, for a terminal and for Markdown."""
    return [_texts(comparison, row) for row in comparison.rows]


def _texts(comparison: Comparison, row: Compared) -> dict[str, str]:
    difference = row.difference.difference
    found = {
        "arm": row.arm + ("  (reference)" if row.arm == comparison.reference else ""),
        f"published {comparison.kind}": f"{row.published:g}",
        "measured [95 % interval]": _interval(row.measured),
        "n": str(row.measured.n),
        "published difference": f"{row.published_difference:+.4g}" if row.published_difference else "0",
        "measured difference": "" if row.arm == comparison.reference else _interval(difference, "+"),
        "same sign": _said(row),
    }
    if comparison.tolerance is not None:
        found[f"within {comparison.tolerance:g}"] = {True: "yes", False: "no", None: "n/a"}[row.agrees]
    return found


def _said(row: Compared) -> str:
    if not row.published_difference:
        return ""
    if row.same_sign is None:
        few = row.difference.difference.n < MIN_SEEDS
        return f"open (fewer than {MIN_SEEDS} seeds)" if few else "open"
    return "yes" if row.same_sign else "no"


def _interval(estimate: Estimate, sign: str = "") -> str:
    if not estimate.n:
        return "n/a"
    mean = f"{estimate.mean:{sign}.4g}"
    return mean if math.isnan(estimate.low) else f"{mean} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def sentences(comparison: Comparison) -> Iterator[str]:
    """What the comparison comes to."""
    alike, pairs = comparison.pairs
    rho = comparison.spearman
    said = "not defined" if math.isnan(rho) else f"{rho:+.2f}"
    arms = f"over {len(comparison.rows)} arms"
    yield f"{comparison.kind}: {alike} of {pairs} pairs of arms are in the published order; Spearman's rho {said} {arms}"
    resolved = [row.same_sign for row in comparison.rows if row.same_sign is not None]
    others = sum(1 for row in comparison.rows if row.published_difference)
    signs = f"{resolved.count(True)} have the published sign, {resolved.count(False)} the other"
    left = f"{others - len(resolved)} are open: seeds do not tell them from 0"
    yield f"{comparison.kind}: of {others} differences from '{comparison.reference}', {signs}, and {left}"
    if comparison.refused:
        unlike = f"under the name {comparison.metric} they were measured unlike '{comparison.reference}'"
        yield f"{comparison.kind}: {', '.join(comparison.refused)} left out, for {unlike}"
    if not comparison.is_complete:
        yield f"{comparison.kind}: not every arm was measured"
    shared = _shared(comparison)
    if shared:
        yield f"the same runs, for their settings are the same here: {'; '.join(', '.join(group) for group in shared)}"


def _shared(comparison: Comparison) -> list[list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in comparison.rows:
        groups.setdefault(row.run_ids, []).append(row.arm)
    return [group for runs, group in groups.items() if runs and len(group) > 1]
