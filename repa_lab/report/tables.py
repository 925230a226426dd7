"""The tables of a report and how its numbers are formatted. Markdown, LaTeX and HTML share the cells."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from repa_lab.report.results import IMAGES, Axis, Results
from repa_lab.report.search import ordered_trials, parameters
from repa_lab.report.statistics import finite, mean_interval, speedup, steps_to_reach
from repa_lab.report.summary import bare_name, goal_of, metric_kind

NONE = "n/a"
_EMPTY = (NONE, "", "not reached")
_NUMBER = re.compile(r"[+<-]?[\d.]")
_LATEX_NAMES = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}
_LATEX_NAMES |= {"<": "textless", ">": "textgreater", "|": "textbar"}
_LATEX = str.maketrans(
    {"\n": " ", **{c: f"\\{name}{{}}" for c, name in _LATEX_NAMES.items()}, **{c: f"\\{c}" for c in "&%$#_{}"}}
)
_MAX_LATEX_COLUMNS = 6
_MAX_SETTINGS_ARMS = 60
_SECONDS_PER_HOUR = 3600
_SECONDS = {"training": "seconds", "encoder": "cost/encoder_seconds", "evaluation": "cost/evaluation_seconds"}
_HOURS = ("training", "encoder (within training)", "evaluation")  # names of _SECONDS in the table
_FLOPS = {"training": "cost/train_flops", "encoder": "cost/encoder_flops", "evaluation": "cost/evaluation_flops"}
_OPTIONS = ("device", "precision", "executor", "compile", "micro_batch", "gradient_checkpointing", "encoder_precision")


# ---- formats


def decimals(*values: float, digits: int = 4) -> int:
    """Return how many decimals show ``digits`` significant digits of the largest value; at most six."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    magnitude = math.floor(math.log10(largest)) if largest > 0 else 0
    return min(max(digits - 1 - magnitude, 0), 6)


def interval(low: float, high: float, places: int) -> str:
    """Format an interval as ``[low, high]`` with ``places`` decimals."""
    return f"[{low:.{places}f}, {high:.{places}f}]"


def number(value: float, places: int, sign: str = "") -> str:
    """Format a value with ``places`` decimals; ``n/a`` for NaN."""
    return NONE if math.isnan(value) else f"{value:{sign}.{places}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Format a value of any magnitude with ``digits`` significant digits: ``12,800``, ``0.00353``, ``1.31e+11``."""
    if value is None or math.isnan(value):
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{decimals(value, digits=digits)}f}"


def p_value(p: float) -> str:
    """Format a p-value: ``0.011``, ``<0.001`` or ``n/a``."""
    if math.isnan(p):
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.{2 if p >= 0.1 else 3}f}"


def seed_count(n: int) -> str:
    """Format a number of seeds: ``1 seed``, ``2 seeds``."""
    return f"{n} seed" if n == 1 else f"{n} seeds"


def listed(labels: Sequence[str], most: int = 4) -> str:
    """Join the first ``most`` labels and count the rest."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return " / ".join(labels[:most]) + more


@dataclass(frozen=True)
class Table:
    """Headers and rows of text; a table without rows is false."""

    headers: list[str]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def is_number(self) -> list[bool]:
        """Whether every cell of a column begins with a number, column by column."""
        columns = ([row[place] for row in self.rows if row[place] not in _EMPTY] for place in range(len(self.headers)))
        return [bool(cells) and all(_NUMBER.match(cell) for cell in cells) for cells in columns]

    @property
    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.headers, ["---:" if number else "---" for number in self.is_number], *self.rows]
        cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)

    @property
    def latex(self) -> str:
        """The table as a ``tabular`` with booktabs rules; a table with many columns is scaled to the line width."""
        kinds = "".join("r" if number else "l" for number in self.is_number)
        head, *body = [" & ".join(map(latex, line)) + r" \\" for line in (self.headers, *self.rows)]
        lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        lines.append(r"\end{tabular}")
        if len(self.headers) > _MAX_LATEX_COLUMNS:
            lines = [r"\resizebox{\linewidth}{!}{%", *lines[:-1], lines[-1] + "}"]
        return "\n".join(lines)

    def without_empty_columns(self) -> Table:
        """Drop the columns that are empty in every row."""
        kept = [place for place in range(len(self.headers)) if any(row[place] not in _EMPTY for row in self.rows)]
        return Table([self.headers[place] for place in kept], [[row[place] for place in kept] for row in self.rows])


def latex(text: str) -> str:
    """Escape text for LaTeX."""
    return text.translate(_LATEX)


# ---- measurements


def summary_tables(results: Results, compared: bool = True) -> dict[str, Table]:
    """Return arms beside their baselines at equal progress, a table per metric and protocol, the compared one first.

    Args:
        results: of one sweep.
        compared: whether to show the metrics of the kind that the sweep compares, or all other metrics.
    """
    headers = ["arm", "step", "n", "mean [95 % interval]", "baseline", "paired difference [95 % interval]", "relative"]
    headers += ["pairing r", "Holm's p", "verdict"]
    kind = metric_kind(results.metric)
    metrics = [str(name) for name in results.summary["metric"].unique() if (metric_kind(name) == kind) is compared]
    rows: dict[str, list[list[str]]] = {}
    for metric in _compared_first(results, metrics):
        for _, row in results.summary[results.summary["metric"] == metric].iterrows():
            rows.setdefault(results.names(metric)[row["arm"]], []).append(_summary_row(row))
    return {name: Table(headers, cells) for name, cells in rows.items()}


def _compared_first(results: Results, metrics: list[str]) -> list[str]:
    return sorted(metrics, key=lambda metric: bare_name(metric) != results.metric)


def _summary_row(row: pd.Series) -> list[str]:
    places = max(decimals(row["mean"]), decimals(row["diff"], digits=2))
    baseline = NONE if pd.isna(row["baseline"]) else row["baseline"]
    if not math.isnan(row["baseline_mean"]):
        baseline = f"{baseline}: {number(row['baseline_mean'], places)}"
    return [
        row["arm"],
        f"{row['step']}",
        f"{row['n']}" if row["n"] == row["seeds"] else f"{row['n']} of {row['seeds']}",
        _with_interval(number(row["mean"], places), row["low"], row["high"], places),
        baseline,
        _with_interval(number(row["diff"], places, sign="+"), row["diff_low"], row["diff_high"], places),
        NONE if math.isnan(row["relative"]) else f"{100 * row['relative']:+.1f} %",
        number(row["correlation"], 2),
        p_value(row["p_holm"]),
        row["verdict"] or NONE,
    ]


def _with_interval(text: str, low: float, high: float, places: int) -> str:
    return text if math.isnan(low) else f"{text} {interval(low, high, places)}"


def targets_tables(results: Results) -> dict[str, Table]:
    """Return, by metric, when arms reached the targets and their baselines' final values, and how much sooner.

    Progress is the mean over the seeds that reached the target; speed-ups are paired by seed, over the seeds in which
    both arm and baseline reached it.
    """
    # Images are proportional to steps, and give the same ratios, unless batches differ in size.
    per_step = (results.curves["images"] / results.curves["step"].where(results.curves["step"] > 0)).dropna()
    ratio_axes = [axis for axis in results.axes if axis is not IMAGES or per_step.nunique() > 1]
    headers = ["target", "arm", "reached by", *(axis.unit for axis in results.axes)]
    headers += [f"speed-up in {axis.unit} [95 % interval]" for axis in ratio_axes]
    rows: dict[str, list[list[str]]] = {}
    for metric, target, arm in _targets(results):
        rows.setdefault(results.names(metric)[arm], []).append(_target_row(results, metric, target, arm, ratio_axes))
    return {name: Table(headers, rows[name]).without_empty_columns() for name in _compared_first(results, list(rows))}


def _targets(results: Results) -> Iterator[tuple[str, float | None, str]]:
    """Yield metric, target and arm of every row; a target of None is the baseline's final value, seed by seed."""
    for arm, baseline in results.baselines.items():
        metric = results.compared_metric(arm)
        if baseline is not None and metric is not None and results.run_ids(arm) != results.run_ids(baseline):
            yield metric, None, arm
    for metric, targets in results.sweep.compare.targets.items():
        measured = [arm for arm in results.baselines if results.seed_curves(arm, metric)]
        # An arm whose own runs were measured differently has no mean.
        arms = [arm for arm in measured if not results.protocols.conflicts(results.run_ids(arm), metric)]
        yield from ((metric, target, arm) for target in targets for arm in arms)


def _target_row(results: Results, metric: str, target: float | None, arm: str, ratio_axes: Sequence[Axis]) -> list[str]:
    goal = results.goal if metric_kind(metric) == metric_kind(results.metric) else goal_of(metric)
    means, ratios, count = [], [], ""
    for axis in results.axes:
        curves, baseline_curves = (
            results.seed_curves(label, metric, axis.name) for label in (arm, results.baselines[arm])
        )
        targets = dict.fromkeys(curves, target or 0.0)
        if target is None:
            finals = {seed: finite(curve) for seed, curve in baseline_curves.items()}
            targets = {seed: curve[max(curve)] for seed, curve in finals.items() if curve}
        places = [steps_to_reach(curve, targets[seed], goal) for seed, curve in curves.items() if seed in targets]
        reached = [place for place in places if place is not None]
        count = count or f"{len(reached)} of {len(places)}"
        means.append(significant(mean_interval(reached).mean) if reached else "not reached")
    for axis in ratio_axes:
        result = None
        if not results.conflicts(arm, metric):
            result = speedup(*results.paired_curves(arm, metric, axis.name), goal, target)
        if result is None or not result.reached:
            ratios.append(NONE)
            continue
        partly = f" ({result.reached} of {result.n} seeds)" if result.reached < result.n else ""
        ratio = result.ratio
        ratios.append(_with_interval(f"{ratio.mean:.2f}x", ratio.low, ratio.high, 2) + partly)
    return ["the baseline's final value" if target is None else f"{target:g}", arm, count, *means, *ratios]


# ---- runs, trials and costs


def runs_table(results: Results) -> Table:
    """Return where every run stands."""
    rows = [
        [
            *(run["arm"], str(run["seed"]), run["run_id"], run["state"], str(run["step"])),
            NONE if pd.isna(run["seconds"]) else f"{run['seconds']:.0f}",
            "" if pd.isna(run["error"]) else str(run["error"]),
        ]
        for _, run in results.runs.iterrows()
    ]
    return Table(["arm", "seed", "run", "state", "step", "training seconds", "error"], rows)


def trials_table(results: Results) -> Table:
    """Return the trials of a search, the best first, those without a value last."""
    names, rows = parameters(results), []
    for place, trial in enumerate(ordered_trials(results), start=1):
        value = NONE if trial.value is None else f"{trial.value:.{decimals(trial.value)}f}"
        params = [trial.params.get(name, NONE) for name in names]
        texts = [f"{param:.4g}" if isinstance(param, float) else str(param) for param in params]
        rows.append([str(place), trial.arm, trial.state, value, *texts])
    metric = results.sweep.search.metric if results.sweep.search else "value"
    return Table(["rank", "arm", "state", metric, *names], rows)


def importance_table(frame: pd.DataFrame) -> Table:
    """Return the rows of :func:`repa_lab.report.search.importance_frame`, the most important setting first."""
    rows = frame.sort_values("importance", ascending=False, kind="stable").itertuples()
    headers = ["objective", "setting", "importance"]
    return Table(headers, [[row.objective, row.param, f"{row.importance:.2f}"] for row in rows])


def cost_frame(results: Results) -> pd.DataFrame:
    """Return the cost of every run of one sweep so far; a run that several arms share is listed once, with the first.

    Columns: ``arm``, ``run_id``; ``hours/<phase>`` in device hours and ``flops/<phase>`` for ``training``, ``encoder``
    (its hours are part of the training hours, its FLOPs are not) and ``evaluation``; NaN where a run has no record.
    """
    runs = results.runs.drop_duplicates("run_id")
    nan = pd.Series(math.nan, index=runs.index)
    frame = runs[["arm", "run_id"]].copy()
    for phase, column in _SECONDS.items():
        frame[f"hours/{phase}"] = runs.get(column, nan).astype(float) * runs["processes"] / _SECONDS_PER_HOUR
    for phase, column in _FLOPS.items():
        frame[f"flops/{phase}"] = runs.get(column, nan).astype(float)
    return frame


def cost_table(results: Results) -> Table:
    """Return the cost summed over the runs of each arm and over the sweep; columns without any record are left out."""
    frame = cost_frame(results)
    headers = ["arm", "runs", *(f"device hours, {phase}" for phase in _HOURS), *(f"FLOPs, {phase}" for phase in _FLOPS)]
    headers.append("evaluation's share of the hours")
    if frame["hours/training"].isna().all():
        return Table(headers, [])
    groups = [*frame.groupby("arm", sort=False), ("all runs, each once", frame)]
    rows = []
    for name, runs in groups:
        sums = runs.drop(columns=["arm", "run_id"]).sum(min_count=1)
        trained, measured = sums["hours/training"], sums["hours/evaluation"]
        share = measured / (trained + measured) if trained + measured > 0 else math.nan
        share_text = NONE if math.isnan(share) else f"{100 * share:.0f} %"
        rows.append([str(name), str(len(runs)), *map(significant, sums), share_text])
    return Table(headers, rows).without_empty_columns()


# ---- provenance


def provenance_table(results: Results) -> Table:
    """Return code, versions and machines with the number of runs; a row for each value of a fact."""
    counts: dict[tuple[str, str], int] = {}
    for provenance in results.provenances.values():
        for fact in _facts(provenance):
            counts[fact] = counts.get(fact, 0) + 1
    order = list(dict.fromkeys(name for name, _ in counts))
    rows = sorted(counts.items(), key=lambda item: order.index(item[0][0]))
    return Table(["what", "value", "runs"], [[name, value, str(count)] for (name, value), count in rows])


def _facts(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    git, packages, options = (
        section if isinstance(section := provenance.get(name), Mapping) else {}
        for name in ("git", "packages", "options")
    )
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    is_checkout = isinstance(provenance.get("git"), Mapping)
    yield "code", f"commit {git.get('commit', NONE)}{dirty}" if is_checkout else "not from a git checkout"
    yield from ((name, str(version)) for name, version in packages.items())
    yield "Python", str(provenance.get("python", NONE))
    yield "machine", f"{provenance.get('platform', NONE)}, {provenance.get('cpus', NONE)} CPU cores"
    hardware = ("gpu", "gpus", "accelerator", "processes")
    yield from ((name, _text(provenance[name])) for name in hardware if name in provenance)
    yield from ((f"run.{name}", _text(options[name])) for name in _OPTIONS if name in options)


def settings_table(results: Results) -> Table:
    """Return the settings in which arms differ, a row per arm; all other settings are in every run's ``spec.json``."""
    arms = results.runs.drop_duplicates("arm").head(_MAX_SETTINGS_ARMS)
    names = [str(name) for name in results.runs.columns[list(results.runs.columns).index("error") + 1 :]]
    texts = {name: [_text(value) for value in arms[name]] for name in names if not name.startswith("cost/")}
    differing = {name: column for name, column in texts.items() if len(set(column)) > 1}
    rows = [[str(arm), *(column[place] for column in differing.values())] for place, arm in enumerate(arms["arm"])]
    return Table(["arm", *differing], rows if differing else [])


def protocols_table(results: Results) -> Table:
    """Return the recorded protocol of each metric, a row per metric and field."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for protocols in results.protocols.by_run.values():
        for metric, protocol in protocols.items():
            for name, value in protocol.items():
                values.setdefault((metric, name), {})[_text(value)] = None
    rows = [[metric, name, " / ".join(texts)] for (metric, name), texts in values.items()]
    return Table(["metric", "depends on", "value"], rows)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict | tuple):
        return json.dumps(value)
    return NONE if value is None or pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
