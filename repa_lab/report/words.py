"""The answer in words: what was found, how sure it is, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pandas as pd

from repa_lab.report.pairing import paired_curves
from repa_lab.report.phrases import decimals, interval, listed, p_value, seeds
from repa_lab.report.reading import UNKNOWN
from repa_lab.report.results import Results
from repa_lab.report.search import Trial, best_trial, ordered_trials
from repa_lab.report.statistics import MIN_SEEDS, Estimate, Speedup, speedup
from repa_lab.report.summary import is_protocol, metric_kind
from repa_lab.runs import RunStatus


def answer(results: Results) -> list[str]:
    """The answer of every sweep as lines of plain text: the conclusions, then what is incomplete."""
    several = len(results.sweeps) > 1
    lines: list[str] = []
    for sweep in results.sweeps:
        one = results.only(sweep["name"])
        found = [*conclusions(one), *(f"Incomplete: {line}" for line in incomplete(one))]
        lines += [f"{sweep['name']}: {line}" if several else line for line in found]
    return lines


def conclusions(results: Results) -> list[str]:
    """What one sweep found: a line per compared arm, or the arms' values where no arm has a baseline."""
    best = best_trial(results)
    trials = {trial["arm"] for trial in ordered_trials(results)}
    # Every other trial is a step of the search, not a claim; the table of trials lists them.
    arms = [arm for arm in results.baselines if arm not in trials or (best and arm == best["arm"])]
    compared = [arm for arm in arms if results.baselines[arm] is not None]
    lines = [*_protocol_warning(results), *search_lines(results, best)]
    if compared:
        return lines + [_comparison(results, arm) for arm in compared]
    if best is None:  # a search compares its trials with each other
        lines.append("No arm has a matched baseline, so nothing is compared.")
    return [*lines, *_values(results, arms)]


def incomplete(results: Results) -> list[str]:
    """A line per arm of one sweep with runs that are neither done nor pruned, and why where that is known."""
    unfinished = results.runs[~results.runs["state"].isin([status.value for status in RunStatus if status.is_over])]
    arms = unfinished.groupby("arm", sort=False)
    return [f"{arm}: {'; '.join(_standing(run) for _, run in runs.iterrows())}." for arm, runs in arms]


def arm_speedup(results: Results, arm: str) -> Speedup | None:
    """How much sooner the arm reaches its baseline's final value, None where they cannot be compared."""
    metric, baseline = results.compared_metric(arm), results.baselines[arm]
    if metric is None or baseline is None:
        return None
    return speedup(*paired_curves(results, arm, metric), results.goal)


# ---- a compared arm


def _comparison(results: Results, arm: str) -> str:
    baseline, row = results.baselines[arm], _summary_row(results, arm)
    if _is_same_run(results, arm):
        return f"{arm}: it is the same run as {baseline}, setting for setting, so there is no difference to measure."
    if row is None:
        return _nothing_shared(results, arm)
    if row["n_pairs"] == 0:
        at = f"{row['metric']} at step {row['step']}"
        return f"{arm}: no seed has a finite {at} both in it and in {baseline}; nothing to compare."
    sentences = [difference(results, row), _left_out(row), _sooner(results, arm)]
    return " ".join(sentence for sentence in sentences if sentence)


def difference(results: Results, row: pd.Series) -> str:
    """A row of the summary in a sentence: both values, the difference, its interval, n and the verdict."""
    diff, reference = float(row["diff"]), float(row["baseline_mean"])
    places = max(decimals(reference), decimals(diff, digits=2))
    relative = "" if math.isnan(row["relative"]) else f" ({100 * row['relative']:+.1f} %)"
    bounds = interval(row["diff_low"], row["diff_high"], places)
    spread = f"95 % interval of the paired difference {bounds}, " if row["n_pairs"] > 1 else ""
    values = f"{reference + diff:.{places}f} against {reference:.{places}f} of {row['baseline']}"
    found = f"{diff:+.{places}f}{relative}, {spread}n = {seeds(row['n_pairs'])}: {_verdict(results, row)}"
    return f"{_subject(results, row)} {values}: {found}."


def _verdict(results: Results, row: pd.Series) -> str:
    if row["n_pairs"] == 1:
        return "insufficient, one seed has no interval and is too few to conclude"
    if row["verdict"] == "insufficient":
        return "insufficient, two seeds are too few to conclude"
    if row["diff_low"] <= 0 <= row["diff_high"]:
        return "not resolved, the interval contains 0"
    if row["verdict"] != "resolved":
        return f"not resolved, for among {row['comparisons']} comparisons chance suffices (Holm's p = {p_value(row['p_holm'])})"
    return f"{'lower' if row['diff'] < 0 else 'higher'}, which is {'better' if is_better(results, row) else 'worse'}; resolved"


def is_better(results: Results, row: pd.Series) -> bool:
    """Whether the mean difference of a row of the summary is in the wanted direction."""
    return bool((row["diff"] < 0) == (results.goal == "min"))


def comparable_row(results: Results, arm: str) -> pd.Series | None:
    """An arm's row of the summary on the compared metric, None unless there is a difference to a baseline in it."""
    row = _summary_row(results, arm)
    return None if row is None or not row["n_pairs"] or _is_same_run(results, arm) else row


def _left_out(row: pd.Series) -> str:
    missing = row["seeds"] - row["n_pairs"]
    return f"Left out: {missing} of {seeds(row['seeds'])}, without a finite value in both arms." if missing > 0 else ""


def _sooner(results: Results, arm: str) -> str:
    found = arm_speedup(results, arm)
    if found is None:
        return ""
    states = results.runs.loc[results.runs["arm"] == results.baselines[arm], "state"]
    value = f"the baseline's {'final' if (states == 'done').all() else 'latest'} value"
    if not found.reached:
        return f"It did not reach {value} (0 of {seeds(found.n)})."
    flattered = "" if found.reached == found.n else "; the others did not, so this flatters it"
    where = f"{value} at step {found.steps:.0f}"
    return f"It reached {where}, {_ratio(found.ratio)} ({found.reached} of {seeds(found.n)}{flattered}).{_early(found)}"


def _early(found: Speedup) -> str:
    if not found.early:
        return ""
    which = f"In {found.early} of {seeds(found.reached)}"
    return f" {which} the arm's or the baseline's first measurement was there already, so how much sooner is not known."


def _ratio(ratio: Estimate) -> str:
    words = f"{ratio.mean:.2f}x sooner" if round(ratio.mean, 2) > 1 else f"at {ratio.mean:.2f}x the baseline's speed"
    if ratio.n < 2:
        return words
    is_open = ratio.n >= MIN_SEEDS and not ratio.excludes(1.0)
    contains = ", not resolved as it contains 1" if is_open else ""
    return f"{words}, 95 % interval of the ratio {interval(ratio.low, ratio.high, 2)}{contains}"


def _nothing_shared(results: Results, arm: str) -> str:
    baseline = results.baselines[arm]
    own, other = _protocols(results, arm), _protocols(results, baseline)
    if own and other and not set(own) & set(other):
        reason = f"it was measured as {', '.join(own)}, the baseline as {', '.join(other)}"
        return f"{arm}: cannot be compared with {baseline}: {reason}. Different protocols are different metrics."
    for metric in _alike(results, results.shared_metrics(arm)):
        if conflicts := results.conflicts(arm, metric):
            reason = f"under the name {metric} their runs were measured differently: {'; '.join(conflicts)}"
            return f"{arm}: cannot be compared with {baseline}: {reason}."
    return f"{arm}: no evaluation yet that all its measured runs and those of {baseline} share; nothing to compare."


def _is_same_run(results: Results, arm: str) -> bool:
    own, other = (
        set(results.runs.loc[results.runs["arm"] == label, "run_id"]) for label in (arm, results.baselines[arm])
    )
    return own == other


# ---- arms without a baseline


def _values(results: Results, arms: Iterable[str]) -> Iterator[str]:
    for arm in arms:
        row = _summary_row(results, arm)
        yield _unmeasured(results, arm) if row is None else _value(results, row)


def _unmeasured(results: Results, arm: str) -> str:
    conflicts = [(metric, found) for metric in _protocols(results, arm) if (found := results.conflicts(arm, metric))]
    for metric, found in conflicts:
        return f"{arm}: no mean of {metric}, for its runs were measured differently: {'; '.join(found)}."
    return f"{arm}: nothing measured yet."


def _value(results: Results, row: pd.Series) -> str:
    if not row["n"]:
        return f"{_subject(results, row)} not finite in any seed."
    places = decimals(row["mean"])
    spread = f"95 % interval {interval(row['low'], row['high'], places)}, " if row["n"] > 1 else ""
    return f"{_subject(results, row)} {row['mean']:.{places}f}, {spread}n = {seeds(row['n'])}."


# ---- the sweep


def _protocol_warning(results: Results) -> Iterator[str]:
    arms: dict[tuple[str, ...], list[str]] = {}
    for arm in results.baselines:
        arms.setdefault(tuple(_protocols(results, arm)), []).append(arm)
    arms.pop((), None)
    if len(arms) > 1:
        alike = "; ".join(f"{' and '.join(metrics)} for {listed(labels)}" for metrics, labels in arms.items())
        yield f"The arms were not all measured alike ({alike}). Values of different protocols cannot be compared."
    for metric in dict.fromkeys(metric for metrics in arms for metric in metrics):
        # An arm that differs from its own baseline has a line that says so.
        fine = [
            arm
            for arm in results.baselines
            if metric in _protocols(results, arm) and not results.conflicts(arm, metric)
        ]
        if told := results.protocols.conflicts((run for arm in fine for run in results.run_ids(arm)), metric):
            yield f"Under the name {metric} arms were measured differently: {'; '.join(told)}. Such values cannot be compared."


def search_lines(results: Results, best: Trial | None) -> Iterator[str]:
    """What a search found, if there is one."""
    trials, search = ordered_trials(results), results.sweep.get("search")
    complete = sum(trial["state"] == "complete" for trial in trials)
    if search and best is None:
        yield f"The search has no completed trial yet ({len(trials)} begun)."
    elif search and (front := search.get("pareto")):
        wanted = " and ".join(f"{one['metric']} ({one['goal']})" for one in search["objectives"])
        yield (
            f"Of {complete} completed trials ({len(trials)} in all), none is better in all of {wanted} than: "
            f"{'; '.join(front)}. They were picked on these seeds: confirm them with fresh ones."
        )
    elif search and best is not None:
        value = f"{search['metric']} = {best['value']:.{decimals(best['value'])}f}"
        yield (
            f"Best of {complete} completed trials ({len(trials)} in all): {best['arm']}, {value}. It was picked for "
            "its value on these seeds, so the value is optimistic: confirm it with fresh seeds."
        )


# ---- pieces


def _summary_row(results: Results, arm: str) -> pd.Series | None:
    metric = results.compared_metric(arm)
    rows = results.summary[(results.summary["arm"] == arm) & (results.summary["metric"] == metric)]
    return None if rows.empty else rows.iloc[0]


def _subject(results: Results, row: pd.Series) -> str:
    """The arm, the metric and the step, and why it is not the last step where it is not."""
    runs = results.runs[results.runs["arm"] == row["arm"]]
    planned = runs["train.steps"].max() if "train.steps" in runs else math.nan
    is_last = pd.isna(planned) or row["step"] >= planned
    progress = "" if is_last else f" of {planned:.0f} (the last that all its measured runs and its baseline's have)"
    return f"{row['arm']}: {row['metric']} at step {row['step']}{progress} is"


def _protocols(results: Results, arm: str | None) -> list[str]:
    """The metrics of the compared kind that an arm measured, each under its own protocol."""
    return [] if arm is None else _alike(results, results.metrics(arm))


def _alike(results: Results, metrics: Iterable[str]) -> list[str]:
    """Those that are of the compared kind and carry a protocol in their names."""
    kind = metric_kind(results.metric)
    return [metric for metric in metrics if is_protocol(results.metric) and metric_kind(metric) == kind]


def _standing(run: pd.Series) -> str:
    if run["state"] == RunStatus.NEW:
        return f"seed {run['seed']} has not started"
    verbs = {"running": "is running", "resumable": "is resumable", UNKNOWN: "has no readable state; its last row is"}
    verb = verbs.get(run["state"], run["state"])
    reason = "" if pd.isna(run["error"]) else f" ({run['error']})"
    return f"seed {run['seed']} {verb} at step {run['step']}{reason}"
