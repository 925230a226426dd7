"""The tables of the page, as text that Markdown, LaTeX and HTML share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from repa_lab.report.pairing import paired_curves
from repa_lab.report.phrases import NONE, decimals, interval, number, p_value, significant
from repa_lab.report.progress import IMAGES, Axis
from repa_lab.report.protocols import bare
from repa_lab.report.results import Results
from repa_lab.report.search import Trial, ordered_trials, parameters
from repa_lab.report.statistics import Estimate, Goal, finite, mean_interval, speedup, steps_to_reach
from repa_lab.report.summary import goal_of, metric_kind
from repa_lab.report.table import Table

_FINAL = "the baseline's final value"


def summary_tables(results: Results, compared: bool = True) -> dict[str, Table]:
    """Arms beside their baselines at equal progress, a table for each metric, the compared one first.

    Where arms were measured differently under one name, each protocol has a table; see :meth:`Results.names`.

    Args:
        results: of one sweep.
        compared: whether to show the metrics of the kind that the sweep compares, or all other ones.
    """
    headers = ["arm", "step", "n", "mean [95 % interval]", "baseline", "paired difference [95 % interval]", "relative"]
    headers += ["pairing r", "Holm's p", "verdict"]
    kind = metric_kind(results.metric)
    metrics = [str(name) for name in results.summary["metric"].unique() if (metric_kind(name) == kind) is compared]
    rows: dict[str, list[list[str]]] = {}
    for metric in _compared_first(results, metrics):
        for _, row in results.summary[results.summary["metric"] == metric].iterrows():
            rows.setdefault(results.names(metric)[row["arm"]], []).append(_summary_row(row))
    return {name: Table(headers, own) for name, own in rows.items()}


def targets_tables(results: Results) -> dict[str, Table]:
    """When arms reached the sweep's targets and their baselines' final values, and how much sooner than these; by
    metric.

    Progress is the mean over the seeds that got there; speed-ups are paired by seed, over those in which both did.
    """
    headers = ["target", "arm", "reached by", *(axis.unit for axis in results.axes)]
    headers += [f"speed-up in {axis.unit} [95 % interval]" for axis in _ratio_axes(results)]
    rows: dict[str, list[list[str]]] = {}
    for name, row in _target_rows(results):
        rows.setdefault(name, []).append(row)
    names = _compared_first(results, list(rows))
    return {name: Table(headers, rows[name]).without_empty_columns() for name in names}


def runs_table(results: Results) -> Table:
    """Where every run stands."""
    headers = ["arm", "seed", "run", "state", "step", "training seconds", "error"]
    return Table(headers, [_run_row(run) for _, run in results.runs.iterrows()])


def trials_table(results: Results) -> Table:
    """The trials of a search, the best first; those without a value last."""
    names = parameters(results)
    metric = (results.sweep.get("search") or {}).get("metric", "value")
    rows = [_trial_row(place, trial, names) for place, trial in enumerate(ordered_trials(results), start=1)]
    return Table(["rank", "arm", "state", metric, *names], rows)


def importance_table(frame: pd.DataFrame) -> Table:
    """What :func:`repa_lab.report.search.importance_frame` found, the most important first."""
    rows = frame.sort_values("importance", ascending=False, kind="stable").itertuples()
    return Table(
        ["objective", "setting", "importance"], [[row.objective, row.param, f"{row.importance:.2f}"] for row in rows]
    )


def _compared_first(results: Results, metrics: list[str]) -> list[str]:
    return sorted(metrics, key=lambda metric: bare(metric) != results.metric)


def _summary_row(row: pd.Series) -> list[str]:
    places = max(decimals(row["mean"]), decimals(row["diff"], digits=2))
    relative = NONE if math.isnan(row["relative"]) else f"{100 * row['relative']:+.1f} %"
    name = NONE if pd.isna(row["baseline"]) else row["baseline"]
    baseline = name if math.isnan(row["baseline_mean"]) else f"{name}: {number(row['baseline_mean'], places)}"
    count = f"{row['n']}" if row["n"] == row["seeds"] else f"{row['n']} of {row['seeds']}"
    mean = _with_interval(number(row["mean"], places), row["low"], row["high"], places)
    difference = _with_interval(number(row["diff"], places, sign="+"), row["diff_low"], row["diff_high"], places)
    judged = [number(row["correlation"], 2), p_value(row["p_holm"]), row["verdict"] or NONE]
    return [row["arm"], f"{row['step']}", count, mean, baseline, difference, relative, *judged]


def _ratio_axes(results: Results) -> list[Axis]:
    """Those that may give different ratios: images are steps over again where all batches have one size."""
    per_step = (results.curves["images"] / results.curves["step"].where(results.curves["step"] > 0)).dropna()
    return [axis for axis in results.axes if axis is not IMAGES or per_step.nunique() > 1]


def _target_rows(results: Results) -> Iterator[tuple[str, list[str]]]:
    for arm, baseline in results.baselines.items():
        metric = results.compared_metric(arm)
        if baseline is not None and metric is not None and results.run_ids(arm) != results.run_ids(baseline):
            yield results.names(metric)[arm], _target_row(results, metric, None, arm)
    for metric, values in (results.sweep["compare"].get("targets") or {}).items():
        arms = [
            arm for arm in results.baselines if results.seed_curves(arm, metric) and not _is_mixed(results, arm, metric)
        ]
        names = results.names(metric)
        yield from ((names[arm], _target_row(results, metric, target, arm)) for target in values for arm in arms)


def _is_mixed(results: Results, arm: str, metric: str) -> bool:
    """Whether the arm's own runs were measured differently, so that a mean over them is none."""
    return bool(results.protocols.conflicts(results.run_ids(arm), metric))


def _target_row(results: Results, metric: str, target: float | None, arm: str) -> list[str]:
    """A target of None is the baseline's final value, seed by seed."""
    goal = _goal(results, metric)
    met = [_reached(results, metric, arm, axis, target, goal) for axis in results.axes]
    ratios = [_speedup(results, metric, arm, axis, target, goal) for axis in _ratio_axes(results)]
    means = [significant(mean_interval(found).mean) if (found := _known(steps)) else "not reached" for steps in met]
    count = f"{len(_known(met[0]))} of {len(met[0])}"
    return [_FINAL if target is None else f"{target:g}", arm, count, *means, *ratios]


def _reached(
    results: Results, metric: str, arm: str, axis: Axis, target: float | None, goal: Goal
) -> list[float | None]:
    """The progress at which each seed got there, None for those that did not; seeds that have no target are left out."""
    own, other = (results.seed_curves(label, metric, axis.name) for label in (arm, results.baselines[arm]))
    kept = {seed: known for seed, curve in other.items() if (known := finite(curve))}
    wanted = dict.fromkeys(own, target) if target is not None else {seed: one[max(one)] for seed, one in kept.items()}
    return [steps_to_reach(curve, wanted[seed], goal) for seed, curve in own.items() if seed in wanted]


def _known(steps: list[float | None]) -> list[float]:
    return [one for one in steps if one is not None]


def _speedup(results: Results, metric: str, arm: str, axis: Axis, target: float | None, goal: Goal) -> str:
    if results.conflicts(arm, metric):
        return NONE
    found = speedup(*paired_curves(results, arm, metric, axis.name), goal, target)
    if found is None or not found.reached:
        return NONE
    partly = f" ({found.reached} of {found.n} seeds)" if found.reached < found.n else ""
    return f"{_ratio(found.ratio)}{partly}"


def _ratio(ratio: Estimate) -> str:
    return _with_interval(f"{ratio.mean:.2f}x", ratio.low, ratio.high, 2)


def _run_row(run: pd.Series) -> list[str]:
    seconds = NONE if pd.isna(run["seconds"]) else f"{run['seconds']:.0f}"
    error = "" if pd.isna(run["error"]) else str(run["error"])
    return [run["arm"], str(run["seed"]), run["run_id"], run["state"], str(run["step"]), seconds, error]


def _trial_row(place: int, trial: Trial, names: list[str]) -> list[str]:
    value = NONE if trial["value"] is None else f"{trial['value']:.{decimals(trial['value'])}f}"
    return [str(place), trial["arm"], trial["state"], value, *_params(trial, names)]


def _params(trial: Trial, names: list[str]) -> Iterator[str]:
    for name in names:
        value = trial["params"].get(name, NONE)
        yield f"{value:.4g}" if isinstance(value, float) else str(value)


def _goal(results: Results, metric: str) -> Goal:
    """The direction of a target: the sweep's own for the metric it compares."""
    return results.goal if metric_kind(metric) == metric_kind(results.metric) else goal_of(metric)


def _with_interval(text: str, low: float, high: float, places: int) -> str:
    return text if math.isnan(low) else f"{text} {interval(low, high, places)}"
