"""The tables of the page, as text that Markdown and HTML share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from repa_lab.report.results import Results
from repa_lab.report.statistics import Goal, mean_interval, steps_to_reach
from repa_lab.report.summary import metric_kind
from repa_lab.report.words import Trial, decimals, interval, ordered_trials

_NONE = "n/a"


@dataclass(frozen=True)
class Table:
    """Headers and rows of text; a table without rows is false."""

    headers: list[str]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def summary_table(results: Results) -> Table:
    """Every evaluation metric of every arm beside its baseline, at equal progress, grouped by metric."""
    headers = [
        "metric",
        "arm",
        "step",
        "n",
        "mean [95 % interval]",
        "baseline",
        "paired difference [95 % interval]",
        "relative",
    ]
    order = {metric: place for place, metric in enumerate([results.metric, *results.summary["metric"].unique()][::-1])}
    rows = results.summary.sort_values("metric", key=lambda names: -names.map(order), kind="stable")
    return Table(headers, [_summary_row(row) for _, row in rows.iterrows()])


def targets_table(results: Results) -> Table:
    """When each arm first reached the targets that the sweep names; steps are means over the seeds that did."""
    headers = ["metric", "target", "arm", "first reached at step", "seeds that reached it"]
    targets = results.sweep["compare"].get("targets") or {}
    cells = [(metric, target, arm) for metric, values in targets.items() for target in values for arm in results.baselines]
    rows = [_target_row(results, *cell) for cell in cells if results.seed_curves(cell[2], cell[0])]
    return Table(headers, rows)


def runs_table(results: Results) -> Table:
    """Where every run stands."""
    headers = ["arm", "seed", "run", "state", "step", "training seconds", "error"]
    return Table(headers, [_run_row(run) for _, run in results.runs.iterrows()])


def trials_table(results: Results) -> Table:
    """The trials of a search, best first; those without a value last."""
    trials = ordered_trials(results)
    names = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    metric = (results.sweep.get("search") or {}).get("metric", "value")
    rows = [_trial_row(place, trial, names) for place, trial in enumerate(trials, start=1)]
    return Table(["", "arm", "state", metric, *names], rows)


def _summary_row(row: pd.Series) -> list[str]:
    places = max(decimals(row["mean"]), decimals(row["diff"], digits=2))
    relative = _NONE if math.isnan(row["relative"]) else f"{100 * row['relative']:+.1f} %"
    baseline = _NONE if pd.isna(row["baseline_mean"]) else f"{row['baseline']}: {_number(row['baseline_mean'], places)}"
    count = f"{row['n']}" if row["n"] == row["seeds"] else f"{row['n']} of {row['seeds']}"
    mean = _with_interval(_number(row["mean"], places), row["low"], row["high"], places)
    difference = _with_interval(_number(row["diff"], places, sign="+"), row["diff_low"], row["diff_high"], places)
    return [row["metric"], row["arm"], str(row["step"]), count, mean, baseline, difference, relative]


def _target_row(results: Results, metric: str, target: float, arm: str) -> list[str]:
    curves = results.seed_curves(arm, metric).values()
    reached = [steps for curve in curves if (steps := steps_to_reach(curve, target, _goal(results, metric))) is not None]
    mean = f"{mean_interval(reached).mean:.0f}" if reached else "not reached"
    return [metric, f"{target:g}", arm, mean, f"{len(reached)} of {len(curves)}"]


def _run_row(run: pd.Series) -> list[str]:
    seconds = _NONE if pd.isna(run["seconds"]) else f"{run['seconds']:.0f}"
    error = "" if pd.isna(run["error"]) else str(run["error"])
    return [run["arm"], str(run["seed"]), run["run_id"], run["state"], str(run["step"]), seconds, error]


def _trial_row(place: int, trial: Trial, names: list[str]) -> list[str]:
    value = _NONE if trial["value"] is None else f"{trial['value']:.{decimals(trial['value'])}f}"
    return [str(place), trial["arm"], trial["state"], value, *_params(trial, names)]


def _params(trial: Trial, names: list[str]) -> Iterator[str]:
    for name in names:
        value = trial["params"].get(name, _NONE)
        yield f"{value:.4g}" if isinstance(value, float) else str(value)


def _goal(results: Results, metric: str) -> Goal:
    """The direction of a target: the sweep's own for the metric it compares; alignment is reached from below."""
    if metric_kind(metric) == metric_kind(results.metric):
        return results.goal
    return "max" if metric.startswith("heldout/") else "min"


def _number(value: float, places: int, sign: str = "") -> str:
    return _NONE if math.isnan(value) else f"{value:{sign}.{places}f}"


def _with_interval(text: str, low: float, high: float, places: int) -> str:
    return text if math.isnan(low) else f"{text} {interval(low, high, places)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
