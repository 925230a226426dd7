"""The sentences of a report: the answer and its uncertainty, what is incomplete or left out, how numbers were made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from repa_lab.report.reader import UNKNOWN, SweepRun, Trouble
from repa_lab.report.results import AXES, Results
from repa_lab.report.statistics import MIN_SEEDS, speedup
from repa_lab.report.summary import is_protocol, listed
from repa_lab.report.tables import decimals, interval, p_value, seed_count
from repa_lab.runs import RunStatus
from repa_lab.runs.files import Row

_MAX_TROUBLES = 8
_PROTOCOL = re.compile(r"(?P<kind>[^:]+):(?P<extractor>[^@]+)@(?P<samples>\d+k?)/(?P<sampler>.+)")


def answer(results: Results) -> list[str]:
    """Return the answer of every sweep as lines of plain text: the conclusions, then what is incomplete."""
    lines: list[str] = []
    for sweep in results.sweeps:
        single = results.only(sweep.name)
        sentences = [*conclusions(single), *(f"Incomplete: {line}" for line in incomplete(single))]
        prefix = f"{sweep.name}: " if len(results.sweeps) > 1 else ""
        lines += [prefix + line for line in sentences]
    return lines


def lead(results: Results) -> str:
    """Return the answer of one sweep in one sentence, with interval and n.

    The sentence is about the search, or about the only compared arm; for several arms it counts those that differ from
    their baselines and describes the best.
    """
    if results.best_trial is not None:
        return _search_sentence(results)
    rows = [row for arm, row in results.compared_rows.items() if row["n_pairs"] and arm in results.compared_arms]
    if not rows:
        return next(iter(conclusions(results)), "The sweep has no arms.")
    if len(rows) == 1:
        return _difference(results, rows[0])

    def loss(row: Row) -> float:
        change = row["diff"] if math.isnan(row["relative"]) else row["relative"]
        return float(change if results.goal == "min" else -change)

    resolved = [row for row in rows if row["verdict"] == "resolved"]
    better = [row for row in resolved if _is_better(results, row)]
    best_difference = _difference(results, min(better or rows, key=loss))
    if not resolved:
        none = f"None of {len(rows)} compared arms is resolved to differ from its baseline."
        return f"{none} The most favourable: {best_difference}"
    counts = f"{len(better)} resolved to be better than the baseline, {len(resolved) - len(better)} to be worse"
    label = "The best, picked for its value, which is therefore optimistic" if len(better) > 1 else "The best"
    return f"Of {len(rows)} compared arms: {counts}. {label}: {best_difference}"


def conclusions(results: Results) -> list[str]:
    """Return what one sweep found: a line per compared arm, or the arms' values where no arm has a baseline."""
    best, trials = results.best_trial, {trial.arm for _, trial in results.trials}
    # Every other trial is a step of the search, not a claim; the table of trials lists them.
    arms = [arm for arm in results.baselines if arm not in trials or (best and arm == best.arm)]
    compared = [arm for arm in arms if results.baselines[arm] is not None]
    lines = [*filter(None, (_protocol_warning(results), _search_sentence(results)))]
    lines += [_comparison(results, arm) for arm in compared]
    unmatched = {arm.label: arm.unmatched for arm in results.sweep.arms if arm.unmatched}
    if compared:
        return lines + [f"{arm}: compared with nothing, because {reason}." for arm, reason in unmatched.items()]
    if best is None:  # a search compares its trials with each other
        reasons = "; ".join(dict.fromkeys(unmatched.values()))
        why = f": {reasons}" if reasons else ""
        lines.append(f"No arm has a matched baseline, so nothing is compared{why}.")
    return [*lines, *(_value(results, arm) for arm in arms)]


def incomplete(results: Results) -> list[str]:
    """Return a line per arm of one sweep with runs that are neither done nor ended early, with the reason if known."""
    over = [status.value for status in RunStatus if status.is_over]
    statuses = {
        arm: "; ".join(_run_status(run) for run in runs.values() if run.status not in over)
        for arm, runs in results.by_arm.items()
    }
    return [f"{arm}: {texts}." for arm, texts in statuses.items() if texts]


def _run_status(run: SweepRun) -> str:
    if run.status == RunStatus.NEW:
        return f"seed {run.seed} has not started"
    verb = f"is {run.status}" if run.status in (RunStatus.RUNNING, RunStatus.RESUMABLE) else run.status
    verb = "has no readable state; its last row is" if run.status == UNKNOWN else verb
    return f"seed {run.seed} {verb} at step {run.last_step}" + (f" ({run.error})" if run.error else "")


# ---- one arm


def _comparison(results: Results, arm: str) -> str:
    baseline, row = results.baselines[arm], results.compared_rows.get(arm)
    if arm not in results.compared_arms:
        return f"{arm}: the same run as {baseline}, setting for setting, so there is no difference to measure."
    if row is None:
        return _nothing_shared(results, arm)
    if row["n_pairs"] == 0:
        measured = f"{row['metric']} at step {row['step']}"
        return f"{arm}: no seed has a finite {measured} in both the arm and {baseline}; nothing to compare."
    missing, planned = row["seeds"] - row["n_pairs"], seed_count(row["seeds"])
    left_out = f" Left out: {missing} of {planned}, without a finite value in both arms." if missing > 0 else ""
    return _difference(results, row) + left_out + _sooner(results, arm)


def _difference(results: Results, row: Row) -> str:
    """Describe a row of the summary: both values, the difference, its interval, n and the verdict."""
    diff, reference = float(row["diff"]), float(row["baseline_mean"])
    places = max(decimals(reference), decimals(diff, digits=2))
    relative = "" if math.isnan(row["relative"]) else f" ({100 * row['relative']:+.1f} %)"
    bounds = interval(row["diff_low"], row["diff_high"], places)
    spread = f"95 % interval of the paired difference {bounds}, " if row["n_pairs"] > 1 else ""
    values = f"{reference + diff:.{places}f} against {reference:.{places}f} of {row['baseline']}"
    change = f"{diff:+.{places}f}{relative}, {spread}n = {seed_count(row['n_pairs'])}: {_verdict(results, row)}"
    return f"{_subject(results, row)} {values}: {change}."


def _verdict(results: Results, row: Row) -> str:
    if row["n_pairs"] == 1:
        return "insufficient, one seed has no interval and is too few to conclude"
    if row["verdict"] == "insufficient":
        return "insufficient, two seeds are too few to conclude"
    if row["diff_low"] <= 0 <= row["diff_high"]:
        return "not resolved, the interval contains 0"
    if row["verdict"] != "resolved":
        p = p_value(row["p_holm"])
        return f"not resolved, chance explains it among {row['comparisons']} comparisons (Holm's p = {p})"
    direction = "lower" if row["diff"] < 0 else "higher"
    return f"{direction}, which is {'better' if _is_better(results, row) else 'worse'}; resolved"


def _is_better(results: Results, row: Row) -> bool:
    return bool((row["diff"] < 0) == (results.goal == "min"))


def _sooner(results: Results, arm: str) -> str:
    metric, baseline = results.compared_metrics[arm], results.baselines[arm]
    faster = None if metric is None else speedup(*results.paired_curves(arm, metric), results.goal)
    if faster is None:
        return ""
    is_done = all(run.status == RunStatus.DONE for run in results.by_arm[str(baseline)].values())
    value = f"the baseline's {'final' if is_done else 'latest'} value"
    if not faster.reached:
        return f" It did not reach {value} (0 of {seed_count(faster.n)})."
    ratio = faster.ratio
    words = f"{ratio.mean:.2f}x sooner" if round(ratio.mean, 2) > 1 else f"at {ratio.mean:.2f}x the baseline's speed"
    if ratio.n > 1:
        is_open = ratio.n >= MIN_SEEDS and not ratio.excludes(1.0)
        contains = ", not resolved as it contains 1" if is_open else ""
        words += f", 95 % interval of the ratio {interval(ratio.low, ratio.high, 2)}{contains}"
    optimistic = "" if faster.reached == faster.n else "; the other seeds did not, so this is optimistic"
    early = (
        f" In {faster.early} of {seed_count(faster.reached)} the arm or the baseline was there at its first measurement"
    )
    unknown = f"{early}, so how much sooner is not known." if faster.early else ""
    count = f"({faster.reached} of {seed_count(faster.n)}{optimistic})"
    return f" It reached {value} at step {faster.steps:.0f}, {words} {count}.{unknown}"


def _nothing_shared(results: Results, arm: str) -> str:
    baseline = results.baselines[arm]
    arm_metrics, baseline_metrics = results.alike_metrics(arm), results.alike_metrics(baseline)
    if arm_metrics and baseline_metrics and not set(arm_metrics) & set(baseline_metrics):
        reason = f"it was measured as {', '.join(arm_metrics)}, the baseline as {', '.join(baseline_metrics)}"
        return f"{arm}: cannot be compared with {baseline}: {reason}. Different protocols are different metrics."
    for metric in arm_metrics:
        if metric in results.shared_metrics(arm) and (conflicts := results.conflicts(arm, metric)):
            reason = f"under the name {metric} their runs were measured differently: {'; '.join(conflicts)}"
            return f"{arm}: cannot be compared with {baseline}: {reason}."
    return f"{arm}: no evaluation yet that all its measured runs and those of {baseline} share; nothing to compare."


def _value(results: Results, arm: str) -> str:
    """Describe an arm without a baseline."""
    row = results.compared_rows.get(arm)
    if row is None:
        for metric in results.alike_metrics(arm):
            if conflicts := "; ".join(results.conflicts(arm, metric)):
                return f"{arm}: no mean of {metric}, because its runs were measured differently: {conflicts}."
        return f"{arm}: nothing measured yet."
    if not row["n"]:
        return f"{_subject(results, row)} not finite in any seed."
    places = decimals(row["mean"])
    spread = f"95 % interval {interval(row['low'], row['high'], places)}, " if row["n"] > 1 else ""
    return f"{_subject(results, row)} {row['mean']:.{places}f}, {spread}n = {seed_count(row['n'])}."


def _subject(results: Results, row: Row) -> str:
    """Name the arm, the metric and the step, with the reason if that is not the last planned step."""
    asked = [run.setting("train.steps") for run in results.by_arm[row["arm"]].values()]
    planned = max((steps for steps in asked if isinstance(steps, int)), default=0)
    reason = "the last step that all its measured runs and those of its baseline have"
    progress = "" if row["step"] >= planned else f" of {planned} ({reason})"
    return f"{row['arm']}: {results.names[row['metric']][row['arm']]} at step {row['step']}{progress} is"


# ---- the sweep


def _protocol_warning(results: Results) -> str:
    arms: dict[tuple[str, ...], list[str]] = {}
    for arm in results.baselines:
        if metrics := results.alike_metrics(arm):
            arms.setdefault(tuple(metrics), []).append(arm)
    if len(arms) < 2:
        return ""
    groups = "; ".join(f"{' and '.join(metrics)} for {listed(labels)}" for metrics, labels in arms.items())
    return f"The arms were not all measured alike ({groups}). Values of different protocols cannot be compared."


def _search_sentence(results: Results) -> str:
    trials, search, best = [trial for _, trial in results.trials], results.sweep.search, results.best_trial
    if not search:
        return ""
    sizes = [f"all {count} settings around {label}" for label, count in search.exhausted.items()]
    exhausted = f" The space is exhausted: {', '.join(sizes)} were tried." if sizes else ""
    if best is None or best.value is None:
        return f"The search has no completed trial yet ({len(trials)} begun).{exhausted}"
    repeated = sum(trial.state == "repeated" for trial in trials)
    repeats = f", {repeated} of them a draw of settings that another has" if repeated else ""
    counted = f"{sum(trial.state == 'complete' for trial in trials)} completed trials ({len(trials)} in all{repeats})"
    valued = {trial.arm for trial in trials if trial.value is not None}
    if front := [label for label in search.pareto if label in valued]:
        goals = " and ".join(f"{metric} ({goal})" for metric, goal in results.objectives.items())
        picked = "They were picked on these seeds: confirm them with fresh seeds."
        return f"Pareto front of {counted} over {goals}: {'; '.join(front)}. {picked}{exhausted}"
    value = f"{search.metric} = {best.value:.{decimals(best.value)}f}"
    optimistic = "It was picked for its value on these seeds, so the value is optimistic: confirm it with fresh seeds."
    return f"Best of {counted}: {best.arm}, {value}. {optimistic}{exhausted}"


# ---- what is left out


def exclusions(results: Results) -> list[str]:
    """Return a line on everything of one sweep that is in no mean or in no comparison, and why."""
    lines = [line for run in results.members for line in troubles(run, run.all_troubles())]
    for arm, runs in results.by_arm.items():
        if missing := sorted(set(results.sweep.seeds) - set(runs)):
            lines.append(f"{arm}: the sweep names no run for seed {', '.join(map(str, missing))}.")
    lines += [line for row in results.rows for line in _row_exclusions(results, row)]
    for status, reason in ((RunStatus.PRUNED, "by the search"), (RunStatus.STOPPED, "by a rule of the sweep")):
        if ended := [run.arm.label for run in results.members if run.status == status]:
            told = f"{len(ended)} of {len(results.members)} runs were ended early {reason}"
            lines.append(f"{told} ({listed(list(dict.fromkeys(ended)))}): they count as far as they got.")
    if orphans := results.sweep.orphaned:
        lines.append(f"{len(orphans)} runs that an earlier version of the spec asked for are in no number here.")
    count = len(results.measured())
    for axis in (axis for axis in AXES if axis not in results.axes):  # no curve is drawn over what some runs lack
        if known := len(results.measured(axis)):
            lines.append(f"No curves over {axis.label}, which {count - known} of {count} measured runs did not record.")
    return lines


def troubles(run: SweepRun, found: Sequence[Trouble]) -> Iterator[str]:
    """Yield a line on what of a run could not be read, if anything."""
    if found:
        reasons = "; ".join(f"{where}: {what}" for where, what in found[:_MAX_TROUBLES])
        more = f"; and {len(found) - _MAX_TROUBLES} more" if len(found) > _MAX_TROUBLES else ""
        yield f"{run.arm.label}, seed {run.seed} (run {run.run_id}): {reasons}{more}."


def _row_exclusions(results: Results, row: Row) -> Iterator[str]:
    """Yield why values are not in a row of the summary, and in what else than its setting an arm differs."""
    arm, baseline, metric, step = row["arm"], row["baseline"], row["metric"], row["step"]
    if is_protocol(metric):
        curves = results.seed_curves(arm, metric)
        unmeasured = [str(seed) for seed in sorted(results.by_arm[arm]) if seed not in curves]
        infinite = [str(seed) for seed, curve in curves.items() if not math.isfinite(curve[step])]
        last = max(max(curve) for curve in curves.values())
        reasons = [f"seed {listed(unmeasured)} never measured"] if unmeasured else []
        reasons += [f"seed {listed(infinite)} not finite"] if infinite else []
        reasons += [f"measurements after step {step:,} (up to {last:,})"] if last > step else []
        if reasons:
            yield f"{arm}: not in the means of {metric} at step {step:,}: {'; '.join(reasons)}."
    if row["conflicts"]:
        means = " and has no mean" if math.isnan(row["mean"]) else ""
        other = f" with {baseline}" if baseline else ""
        reason = f"because under this one name runs were measured differently: {row['conflicts']}"
        yield f"{arm}: {metric} is not compared{other}{means}, {reason}."
    if metric == results.metric and row["n_pairs"]:  # batches may differ in size
        first_runs = [next(iter(results.by_arm[label].values())) for label in (arm, baseline)]
        seen, baseline_seen = (run.places["images"].get(step, math.nan) for run in first_runs)
        if seen != baseline_seen and not math.isnan(seen + baseline_seen):
            counts = f"at step {step:,} it has seen {seen:,.0f} images and {baseline} {baseline_seen:,.0f}"
            yield f"{arm}: {counts}; the summary compares equal steps, the curves over images show the rest."


# ---- how numbers were made


def methods(results: Results) -> list[str]:
    """Return a line on every protocol in use, on averages over too few steps, and on how arms were compared."""
    metrics = dict.fromkeys(row["metric"] for row in results.rows if is_protocol(row["metric"]))
    protocols = [_protocol(metric) + _bias(results, metric) for metric in metrics]
    return [*protocols, *dict.fromkeys(_averages(results)), *_comparisons(results)]


def _protocol(metric: str) -> str:
    match = _PROTOCOL.fullmatch(metric)
    if match is None:
        return f"{metric}: comparable only with values of exactly this name."
    samples = f"{match['samples']} generated samples ({match['sampler']})"
    if match["kind"] == "fid":
        fid = f"{metric}: FID of {samples}. FID depends on the number of samples: "
        return f"{fid}compare it only with FIDs of the same number."
    if match["kind"] == "frechet":
        distance = f"Frechet distance between {match['extractor']} features of {samples} and of the reference images"
        return f"{metric}: {distance}. It is not FID and cannot be compared with published FIDs."
    return f"{metric}: {match['kind']} with {match['extractor']} on {samples}."


def _bias(results: Results, metric: str) -> str:
    """Warn of a Frechet distance over fewer samples than features."""
    for protocols in results.protocols.by_run.values():
        protocol = protocols.get(metric, {})
        samples, real, width = (protocol.get(key) for key in ("samples", "real", "features"))
        if isinstance(samples, int) and isinstance(real, int) and isinstance(width, int):
            count = min(samples, real or samples)
            if count <= width:
                biased = "make a covariance singular and bias the distance upward: it ranks arms, no more."
                return f" {count} images for {width} features {biased}"
    return ""


def _averages(results: Results) -> Iterator[str]:
    """Warn of averaged weights that still hold much of the initial ones."""
    from repa_lab.spec.train import EmaConfig

    for run in results.members:
        with suppress(TypeError, KeyError, ValueError, ArithmeticError):  # of a damaged spec.json
            ema, steps = run.setting("train.ema"), int(run.setting("train.steps"))
            settings = EmaConfig.model_validate(ema if isinstance(ema, dict) else {"decay": ema})
            if warning := settings.warning(steps):
                yield f"{warning}."


def _comparisons(results: Results) -> Iterator[str]:
    yield (
        "An arm and its baseline are compared at equal progress: the last step that all measured runs of both have. "
        "Intervals and bands are 95 % Student-t intervals over seeds. Differences are taken seed by seed: arms share "
        "seeds."
    )
    yield (
        "Pairing r is the correlation of arm and baseline over the seeds, from three seeds on: near 1, pairing has "
        "removed most of the variation between seeds; below 0, pairing has widened the interval."
    )
    yield (
        "One seed has no interval and two are insufficient. A difference is called resolved if at least three seeds "
        "were paired and Holm's p is below 0.05. How much sooner compares the steps at which the arm and the baseline "
        "itself first reach the baseline's final value, interpolated between evaluations that both have, over the "
        "seeds in which both do: the geometric mean of the ratios, with the Student-t interval of their logarithms."
    )
    count = len(results.compared_arms)
    if count > 1:
        yield (
            f"There are {count} comparisons of each metric, those not measured yet included. Holm's p holds for all of "
            "them at once; intervals are for each arm alone and not widened. Metrics are not corrected for each other."
        )
