"""Measured values beside those of a paper: which values, differences and orders agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from repa_lab.report.results import Results
from repa_lab.report.statistics import MIN_SEEDS, Estimate, PairedDifference, mean_interval, paired_difference
from repa_lab.report.summary import common_step, goal_of
from repa_lab.spec.options import PublishedConfig

TEXT, VALUES = "reproduce.md", "reproduce.csv"  # files that `repa-lab reproduce` writes beside a sweep's report


@dataclass(frozen=True)
class PublishedArm:
    """One arm's published and measured value of a metric."""

    arm: str  # its label
    run_ids: tuple[str, ...]  # of its runs; arms with the same settings share them
    published: float  # the paper's value
    measured: Estimate  # over seeds at equal progress; `n` is 0 if nothing was measured
    published_difference: float  # the paper's difference from the reference arm
    difference: PairedDifference  # the measured difference from the reference arm, seed by seed
    agrees: bool | None  # whether the measured mean is within the tolerance; None without a tolerance or a measurement

    @property
    def same_sign(self) -> bool | None:
        """Whether the measured difference has the published sign; None if it is not resolved."""
        if not self.published_difference or not self.difference.is_resolved:
            return None
        return (self.difference.difference.mean > 0) == (self.published_difference > 0)


@dataclass(frozen=True)
class Comparison:
    """A table of a paper beside measured values."""

    kind: str  # the kind of the paper's metric, such as `fid`
    metric: str  # full name of the measured metric
    reference: str  # the arm that is best in the paper; differences are taken from it
    rows: tuple[PublishedArm, ...]  # the arms that both have, in the spec's order
    tolerance: float | None  # see `PublishedConfig`; None at a scale at which values are not the paper's
    refused: tuple[str, ...] = ()  # arms left out, because they were measured under another protocol than the reference

    @property
    def measured(self) -> list[PublishedArm]:
        """The arms that were measured."""
        return [row for row in self.rows if row.measured.n]

    @property
    def spearman(self) -> float:
        """The rank correlation of published and measured values over the measured arms, ties at their mean rank."""
        values = [(row.published, row.measured.mean) for row in self.measured]
        return float(pd.DataFrame(values, columns=["published", "measured"]).corr(method="spearman").iloc[0, 1])

    @property
    def pairs(self) -> tuple[int, int]:
        """Number of pairs of arms in the published order, and of pairs with distinct published values."""
        in_order = [
            (first.published - second.published) * (first.measured.mean - second.measured.mean) > 0
            for first, second in itertools.combinations(self.measured, 2)
            if first.published != second.published
        ]
        return sum(in_order), len(in_order)


def compare_published(results: Results, published: PublishedConfig, exact: bool) -> tuple[Comparison, ...]:
    """Compare the results of one sweep with the published values of its arms.

    Args:
        results: of the sweep.
        published: of its experiment; arms that the sweep does not have are left out.
        exact: whether the metrics are the paper's. Otherwise the sweep's own metric stands for the Frechet distance
            alone, and no value is expected to agree.

    Returns:
        A comparison for each kind of metric that at least two arms share, in the paper's order.
    """
    kinds = dict.fromkeys(
        kind for label, values in published.arms.items() if label in results.baselines for kind in values
    )
    comparisons = (_compare(results, published, kind, exact) for kind in kinds if exact or kind == "fid")
    return tuple(comparison for comparison in comparisons if comparison is not None)


def _compare(results: Results, published: PublishedConfig, kind: str, exact: bool) -> Comparison | None:
    arms = published.arms
    values = {label: arms[label][kind] for label in results.baselines if kind in arms.get(label, {})}
    # As papers call metrics: FID is no other Frechet distance.
    alike = (row["metric"] for row in results.rows if row["metric"].partition(":")[0] == kind)
    metric = next(alike, results.metric)
    if len(values) < 2 or (exact and metric.partition(":")[0] != kind):
        return None
    reference = (max if goal_of(kind) == "max" else min)(values, key=lambda label: values[label])
    curves = {label: results.seed_curves(label, metric) for label in values}
    conflicts, reference_runs = results.protocols.conflicts, results.run_ids(reference)
    refused = [arm for arm in values if curves[arm] and conflicts([*reference_runs, *results.run_ids(arm)], metric)]
    curves |= {label: {} for label in refused}
    # At equal progress: the last step that all measured runs of these arms have.
    step = common_step([curve for by_seed in curves.values() for curve in by_seed.values()])
    measured = {
        label: {} if step is None else {seed: curve[step] for seed, curve in by_seed.items()}
        for label, by_seed in curves.items()
    }
    tolerance, rows = published.tolerance.get(kind) if exact else None, []
    for label, value in values.items():
        estimate = mean_interval(measured[label].values())
        is_judged = tolerance is not None and estimate.n > 0
        row = PublishedArm(
            arm=label,
            run_ids=tuple(results.run_ids(label)),
            published=value,
            measured=estimate,
            published_difference=value - values[reference],
            difference=paired_difference(measured[label], measured[reference]),
            agrees=abs(estimate.mean - value) <= (tolerance or 0.0) if is_judged else None,
        )
        rows.append(row)
    return Comparison(kind, metric, reference, tuple(rows), tolerance, tuple(refused))


def table_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return the comparison as rows of text by column, for a terminal and for Markdown."""
    rows = []
    for row in comparison.rows:
        is_reference = row.arm == comparison.reference
        is_short = row.difference.difference.n < MIN_SEEDS
        unresolved = f"open (fewer than {MIN_SEEDS} seeds)" if is_short else "open"
        same_sign = {True: "yes", False: "no", None: unresolved}[row.same_sign]
        texts = {
            "arm": row.arm + ("  (reference)" if is_reference else ""),
            f"published {comparison.kind}": f"{row.published:g}",
            "measured [95 % interval]": _interval(row.measured),
            "n": str(row.measured.n),
            "published difference": f"{row.published_difference:+.4g}" if row.published_difference else "0",
            "measured difference": "" if is_reference else _interval(row.difference.difference, "+"),
            "same sign": same_sign if row.published_difference else "",
        }
        if comparison.tolerance is not None:
            texts[f"within {comparison.tolerance:g}"] = {True: "yes", False: "no", None: "n/a"}[row.agrees]
        rows.append(texts)
    return rows


def _interval(estimate: Estimate, sign: str = "") -> str:
    if not estimate.n:
        return "n/a"
    mean = f"{estimate.mean:{sign}.4g}"
    return mean if math.isnan(estimate.low) else f"{mean} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def sentences(comparison: Comparison) -> Iterator[str]:
    """Yield the conclusions of a comparison."""
    kind, rows, (in_order, pairs) = comparison.kind, comparison.rows, comparison.pairs
    rho = "not defined" if math.isnan(comparison.spearman) else f"{comparison.spearman:+.2f}"
    order = f"{in_order} of {pairs} pairs of arms are in the published order"
    yield f"{kind}: {order}; Spearman's rho {rho} over {len(rows)} arms"
    resolved = [row.same_sign for row in rows if row.same_sign is not None]
    others = sum(1 for row in rows if row.published_difference)
    signs = f"{resolved.count(True)} have the published sign, {resolved.count(False)} the other"
    unresolved = f"{others - len(resolved)} are open: seeds do not tell them from 0"
    yield f"{kind}: of {others} differences from '{comparison.reference}', {signs}, and {unresolved}"
    if comparison.refused:
        reason = f"under the name {comparison.metric} they were measured unlike '{comparison.reference}'"
        yield f"{kind}: {', '.join(comparison.refused)} left out, because {reason}"
    if len(comparison.measured) < len(rows):
        yield f"{kind}: not every arm was measured"
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(row.run_ids, []).append(row.arm)
    if shared := [", ".join(group) for runs, group in groups.items() if runs and len(group) > 1]:
        yield f"the same runs, because their settings are the same here: {'; '.join(shared)}"
