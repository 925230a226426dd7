"""Metric names, the protocols behind them, and arms beside their baselines at equal progress."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repa_lab.files import digest
from repa_lab.metrics.protocol import differences, goal_of_kind
from repa_lab.report.statistics import Curve, Goal, SeedCurves, holm, mean_interval, paired_difference, verdict
from repa_lab.runs import SweepManifest
from repa_lab.runs.files import Row

Curves = Mapping[str, Mapping[str, SeedCurves]]  # over steps, by arm, metric and seed
Protocol = Mapping[str, Any]
SUMMARY_COLUMNS = [
    *("sweep", "arm", "baseline", "metric", "step", "seeds", "n", "mean", "low", "high"),
    *("baseline_mean", "diff", "diff_low", "diff_high", "n_pairs", "relative"),
    *("correlation", "p", "p_holm", "comparisons", "verdict", "conflicts"),
]
_MAX_VALUES = 4
_MAX_CHARACTERS = 60


def is_protocol(metric: str) -> bool:
    """Return whether a metric's name carries a sampling protocol, as ``fid:inception@10000/sde250`` does."""
    return "@" in metric


@functools.lru_cache(maxsize=1024)
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


def bare_name(name: str) -> str:
    """Return the metric's own name from a name that :meth:`Protocols.names` gave."""
    return name.partition(" (")[0]


@dataclass(frozen=True)
class Protocols:
    """The protocols that runs recorded, by run id and metric.

    Values with one name but different protocols are different metrics, so they are never compared.
    """

    by_run: Mapping[str, Mapping[str, Protocol]]

    def conflicts(self, runs: Iterable[str], metric: str) -> list[str]:
        """Return the fields in which the runs' recorded protocols of a metric differ, each with its values."""
        protocols = self._distinct_of(runs, metric)
        values = {name: [_text(protocol.get(name)) for protocol in protocols] for name in differing(protocols)}
        return [f"{name} ({listed(list(dict.fromkeys(texts)))})" for name, texts in values.items()]

    def names(self, arms: Mapping[str, Iterable[str]], metric: str) -> dict[str, str]:
        """Return the name of a metric for each arm, so that one name stands for one protocol.

        If arms were measured under different protocols, the fields that differ follow the name. Arms without a recorded
        protocol keep the bare name. An arm whose own runs differ has no mean; its first run gives the name.
        """
        firsts = {arm: next(iter(self._distinct_of(runs, metric)), None) for arm, runs in arms.items()}
        recorded = {arm: protocol for arm, protocol in firsts.items() if protocol}
        fields = differing([*recorded.values()])
        leaves = {arm: dotted({name: protocol.get(name) for name in fields}) for arm, protocol in recorded.items()}
        paths = dict.fromkeys(path for values in leaves.values() for path in sorted(values))
        texts = {path: {arm: _text(values.get(path)) for arm, values in leaves.items()} for path in paths}
        told = {path: by_arm for path, by_arm in texts.items() if len(set(by_arm.values())) > 1}
        suffix = {arm: ", ".join(f"{path}: {by_arm[arm]}" for path, by_arm in told.items()) for arm in recorded}
        return {arm: f"{metric} ({suffix[arm]})" if suffix.get(arm) else metric for arm in arms}

    def _distinct_of(self, runs: Iterable[str], metric: str) -> list[Protocol]:
        """Return the protocols of runs that differ from each other, the first run's first."""
        firsts = self._first_alike.get(metric, {})
        return [*{id(firsts[run]): firsts[run] for run in runs if run in firsts}.values()]

    @functools.cached_property
    def _first_alike(self) -> dict[str, dict[str, Protocol]]:
        """For each metric and run id, the first protocol that does not differ from the run's."""
        by_metric: dict[str, dict[str, Protocol]] = {}
        for run, protocols in self.by_run.items():
            for metric, protocol in protocols.items():
                by_metric.setdefault(metric, {})[run] = protocol
        groups = {metric: grouped(recorded) for metric, recorded in by_metric.items()}
        return {metric: {run: first for first, runs in found for run in runs} for metric, found in groups.items()}


def grouped(protocols: Mapping[str, Protocol]) -> list[tuple[Protocol, set[str]]]:
    """Group run ids by their protocols of one metric; each group comes with the protocol of its first run."""
    groups: list[tuple[Protocol, set[str]]] = []
    for run, protocol in protocols.items():
        for first, runs in groups:
            if not differences(first, protocol):
                runs.add(run)
                break
        else:
            groups.append((protocol, {run}))
    return groups


def differing(protocols: Sequence[Protocol]) -> list[str]:
    """Return the fields in which protocols differ, sorted."""
    return sorted({name for protocol in protocols[1:] for name in differences(protocols[0], protocol)})


def dotted(fields: Mapping[str, Any], prefix: str = "", leaves: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names, each after ``prefix``; add them to ``leaves``."""
    leaves = {} if leaves is None else leaves
    for key, value in fields.items():
        if isinstance(value, dict):
            dotted(value, f"{prefix}{key}.", leaves)
        else:
            leaves[prefix + key] = value
    return leaves


def listed(labels: Sequence[str]) -> str:
    """Join the first labels and count the rest."""
    more = f" and {len(labels) - _MAX_VALUES} more" if len(labels) > _MAX_VALUES else ""
    return " / ".join(labels[:_MAX_VALUES]) + more


def _text(value: Any) -> str:
    """Return a value as short text; different values stay different."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:12]}... #{digest(value)[:12]}"


def summarize(sweep: SweepManifest, curves: Curves, protocols: Protocols, comparisons: int) -> list[Row]:
    """Return one row per arm and evaluation metric, at the last step that all runs of the arm and its baseline have.

    Keys: ``seeds`` planned; ``n`` seeds with a finite value, their ``mean`` and its 95 % interval ``low`` to
    ``high``; ``baseline_mean`` over the paired seeds; ``diff``, ``diff_low``, ``diff_high`` of the arm minus its
    baseline by seed over ``n_pairs`` seeds; ``relative`` is diff over ``|baseline_mean|``; ``correlation`` of arm and
    baseline over the seeds; ``p`` of the paired t-test and ``p_holm``, which holds for all ``comparisons`` of the sweep
    at once; ``verdict`` (see :func:`repa_lab.report.statistics.verdict`), empty without a baseline.

    Runs that never measured the metric are left out (``n`` shows it). If runs recorded different protocols under one
    name, ``conflicts`` names the fields, the verdict is ``refused`` and there is no difference; an arm whose own runs
    differ has no mean either.
    """
    run_ids = {arm.label: {run.seed: run.run_id for run in arm.runs} for arm in sweep.arms}
    by_metric: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for arm in sweep.arms:
        for metric, by_seed in curves[arm.label].items():
            baseline = curves.get(str(arm.baseline), {}).get(metric, {})
            step = common_step([*by_seed.values(), *baseline.values()])
            if step is None:
                continue
            row: Row = {"sweep": sweep.name, "arm": arm.label, "baseline": arm.baseline, "metric": metric}
            row |= {"seeds": len(arm.runs), "step": step, **_compare(by_seed, baseline, step), "conflicts": ""}
            arm_runs = [run_ids[arm.label][seed] for seed in by_seed]
            baseline_runs = [run_ids[str(arm.baseline)][seed] for seed in baseline]
            if conflicts := protocols.conflicts([*arm_runs, *baseline_runs], metric):
                refused = ["baseline_mean", "diff", "diff_low", "diff_high", "relative", "correlation", "p"]
                refused += ["mean", "low", "high"] if protocols.conflicts(arm_runs, metric) else []
                row |= {**dict.fromkeys(refused, math.nan), "n_pairs": 0, "conflicts": "; ".join(conflicts)}
            by_metric.setdefault(metric, []).append(row)
            rows.append(row)
    for compared in by_metric.values():
        for row, p in zip(compared, holm([row["p"] for row in compared], comparisons), strict=True):
            judged = "" if row["baseline"] is None else verdict(row["n_pairs"], p)
            row |= {"p_holm": p, "comparisons": comparisons, "verdict": "refused" if row["conflicts"] else judged}
    return rows


def _compare(arm: SeedCurves, baseline: SeedCurves, step: float) -> Row:
    values, baseline_values = ({seed: curve[step] for seed, curve in side.items()} for side in (arm, baseline))
    mean, pairs = mean_interval(values.values()), paired_difference(values, baseline_values)
    diff = pairs.difference
    return {
        **{"n": mean.n, "mean": mean.mean, "low": mean.low, "high": mean.high},
        **{"baseline_mean": pairs.baseline_mean, "diff": diff.mean, "diff_low": diff.low, "diff_high": diff.high},
        **{"n_pairs": diff.n, "relative": pairs.relative, "correlation": pairs.correlation, "p": pairs.p_value},
    }


def common_step(curves: Sequence[Curve]) -> float | None:
    """Return the last step that every curve has: comparing last values would reward the longest training."""
    steps = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return max(steps, default=None)
