"""The tables of a report and how its numbers are formatted. Markdown, LaTeX and HTML share the cells."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from repa_lab.report.results import IMAGES, Axis, Results
from repa_lab.report.statistics import finite, mean_interval, speedup, steps_to_reach
from repa_lab.report.summary import bare_name, dotted, goal_of, metric_kind

if TYPE_CHECKING:
    import pandas as pd

NONE = "n/a"
_EMPTY = (NONE, "", "not reached")
_NUMBER = re.compile(r"[+<-]?[\d.]")
_LATEX_NAMES = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}
_LATEX_NAMES |= {"<": "textless", ">": "textgreater", "|": "textbar"}
_LATEX = str.maketrans(
    {"\n": " ", **{c: f"\\{name}{{}}" for c, name in _LATEX_NAMES.items()}, **{c: f"\\{c}" for c in "&%$#_{}"}}
)
# Also inside of words; underscores at the edges of words; what begins entities, links, headings, quotes and lists.
_MARKDOWN = re.compile(r"[\\`*<~$|]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|\](?=[(\[:])|^[#>+\[-](?!\d)")
_MARKDOWN_NUMBER = re.compile(r"^(\d+)([.)] )")
_MAX_LATEX_COLUMNS = 6
_MAX_SETTINGS_ARMS = 60
_SECONDS_PER_HOUR = 3600
TRAINING_HOURS, _EVALUATION_HOURS = "device hours, training", "device hours, evaluation"
_HOURS = {
    TRAINING_HOURS: "seconds",
    "device hours, encoder (within training)": "cost/encoder_seconds",
    _EVALUATION_HOURS: "cost/evaluation_seconds",
}
_FLOPS = {
    "FLOPs, training": "cost/train_flops",
    "FLOPs, encoder": "cost/encoder_flops",
    "FLOPs, evaluation": "cost/evaluation_flops",
}
_SPEED = ("cost/data_seconds", "cost/encoder_seconds", "cost/flops_utilisation", "cost/peak_memory_gib")


# ---- formats


def decimals(value: float, digits: int = 4) -> int:
    """Return how many decimals show ``digits`` significant digits of a value; at most six."""
    magnitude = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return min(max(digits - 1 - magnitude, 0), 6)


def interval(low: float, high: float, places: int) -> str:
    """Format an interval as ``[low, high]`` with ``places`` decimals."""
    return f"[{low:.{places}f}, {high:.{places}f}]"


def number(value: float, form: str) -> str:
    """Format a value by a format specification such as ``.2f``; ``n/a`` for NaN."""
    return NONE if math.isnan(value) else format(value, form)


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
    return "<0.001" if p < 0.001 else number(p, ".2f" if p >= 0.1 else ".3f")


def seed_count(n: int) -> str:
    """Format a number of seeds: ``1 seed``, ``2 seeds``."""
    return f"{n} seed" if n == 1 else f"{n} seeds"


def markdown(text: str) -> str:
    """Escape text for GitHub's Markdown, where it would be anything but text."""
    return _MARKDOWN_NUMBER.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split())))


def latex(text: str) -> str:
    """Escape text for LaTeX."""
    return text.translate(_LATEX)


def _text(value: Any) -> str:
    """Format a setting, a fact or a parameter."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict | tuple | bool):
        return json.dumps(value)
    if isinstance(value, float):
        return number(value, ".4g")
    return NONE if value is None else str(value)


@dataclass(frozen=True)
class Table:
    """Rows of text by column; all rows have the same columns. A table without rows is false."""

    rows: list[dict[str, str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @cached_property
    def is_number(self) -> dict[str, bool]:
        """Whether every cell of a column begins with a number, by column."""
        columns = {name: [row[name] for row in self.rows] for name in next(iter(self.rows), {})}
        filled = {name: [cell for cell in cells if cell not in _EMPTY] for name, cells in columns.items()}
        return {name: bool(cells) and all(map(_NUMBER.match, cells)) for name, cells in filled.items()}

    @property
    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        head, *body = ([markdown(cell) for cell in line] for line in self._lines)
        lines = [head, ["---:" if number else "---" for number in self.is_number.values()], *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    @property
    def latex(self) -> str:
        """The table as a ``tabular`` with booktabs rules; a table with many columns is scaled to the line width."""
        kinds = "".join("r" if number else "l" for number in self.is_number.values())
        head, *body = [" & ".join(map(latex, line)) + r" \\" for line in self._lines]
        start, end = rf"\begin{{tabular}}{{{kinds}}}", r"\end{tabular}"
        text = "\n".join([start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])
        return "\\resizebox{\\linewidth}{!}{%\n" + text + "}" if len(kinds) > _MAX_LATEX_COLUMNS else text

    @property
    def _lines(self) -> list[list[str]]:
        return [list(self.is_number), *(list(row.values()) for row in self.rows)]

    def without_empty_columns(self) -> Table:
        """Drop the columns that are empty in every row."""
        kept = [name for name in self.is_number if any(row[name] not in _EMPTY for row in self.rows)]
        return Table([{name: row[name] for name in kept} for row in self.rows])


# ---- measurements


def summary_tables(results: Results, compared: bool = True) -> dict[str, Table]:
    """Return arms beside their baselines at equal progress, a table per metric and protocol, the compared one first.

    The metrics are those of the kind that the sweep compares, or, if not ``compared``, all others.
    """
    kind = metric_kind(results.metric)
    shown = [row for row in results.rows if (metric_kind(row["metric"]) == kind) is compared]
    return _by_metric(results, ((row["metric"], _summary_row(row)) for row in shown))


def _by_metric(results: Results, rows: Iterable[tuple[str, dict[str, str]]]) -> dict[str, Table]:
    """Return a table per metric and protocol, the compared metric first, from the rows and their metrics."""
    tables: dict[str, list[dict[str, str]]] = {}
    for metric, row in rows:
        tables.setdefault(results.names[metric][row["arm"]], []).append(row)
    return {name: Table(tables[name]) for name in sorted(tables, key=lambda name: bare_name(name) != results.metric)}


def _summary_row(row: Mapping[str, Any]) -> dict[str, str]:
    places = max(decimals(row["mean"]), decimals(row["diff"], digits=2))
    baseline = row["baseline"] or NONE
    if not math.isnan(row["baseline_mean"]):
        baseline = f"{baseline}: {row['baseline_mean']:.{places}f}"
    difference = number(row["diff"], f"+.{places}f")
    return {
        "arm": row["arm"],
        "step": f"{row['step']}",
        "n": f"{row['n']}" if row["n"] == row["seeds"] else f"{row['n']} of {row['seeds']}",
        "mean [95 % interval]": _with_interval(number(row["mean"], f".{places}f"), row["low"], row["high"], places),
        "baseline": baseline,
        "paired difference [95 % interval]": _with_interval(difference, row["diff_low"], row["diff_high"], places),
        "relative": NONE if math.isnan(row["relative"]) else f"{100 * row['relative']:+.1f} %",
        "pairing r": number(row["correlation"], ".2f"),
        "Holm's p": p_value(row["p_holm"]),
        "verdict": row["verdict"] or NONE,
    }


def _with_interval(text: str, low: float, high: float, places: int) -> str:
    return text if math.isnan(low) else f"{text} {interval(low, high, places)}"


def targets_tables(results: Results) -> dict[str, Table]:
    """Return, by metric, when arms reached the targets and their baselines' final values, and how much sooner.

    Progress is the mean over the seeds that reached the target; speed-ups are paired by seed, over the seeds in which
    both arm and baseline reached it.
    """
    # Images are proportional to steps, and give the same ratios, unless batches differ in size.
    seen = [(step, images) for run in results.members for step, images in run.places["images"].items()]
    per_step = {images / step for step, images in seen if step > 0 and not math.isnan(images)}
    ratio_axes = [axis for axis in results.axes if axis is not IMAGES or len(per_step) > 1]
    rows = (
        (metric, _target_row(results, metric, target, arm, ratio_axes)) for metric, target, arm in _targets(results)
    )
    return {name: table.without_empty_columns() for name, table in _by_metric(results, rows).items()}


def _targets(results: Results) -> Iterator[tuple[str, float | None, str]]:
    """Yield metric, target and arm of every row; a target of None is the baseline's final value, seed by seed."""
    for arm in results.compared_arms:
        if (metric := results.compared_metrics[arm]) is not None:
            yield metric, None, arm
    for metric, targets in results.sweep.compare.targets.items():
        measured = [arm for arm in results.baselines if results.seed_curves(arm, metric)]
        # An arm whose own runs were measured differently has no mean.
        arms = [arm for arm in measured if not results.protocols.conflicts(results.run_ids(arm), metric)]
        yield from ((metric, target, arm) for target in targets for arm in arms)


def _target_row(
    results: Results, metric: str, target: float | None, arm: str, ratio_axes: Sequence[Axis]
) -> dict[str, str]:
    goal = results.goal if metric_kind(metric) == metric_kind(results.metric) else goal_of(metric)
    row = {"target": "the baseline's final value" if target is None else f"{target:g}", "arm": arm, "reached by": ""}
    finals = {}
    for seed, curve in results.seed_curves(results.baselines[arm], metric).items():
        if known := finite(curve):
            finals[seed] = known[max(known)]
    for axis in results.axes:
        curves = results.seed_curves(arm, metric, axis.name)
        targets = finals if target is None else dict.fromkeys(curves, target)
        places = [steps_to_reach(curve, targets[seed], goal) for seed, curve in curves.items() if seed in targets]
        reached = [place for place in places if place is not None]
        row["reached by"] = row["reached by"] or f"{len(reached)} of {len(places)}"
        row[axis.unit] = significant(mean_interval(reached).mean) if reached else "not reached"
    for axis in ratio_axes:
        result, text = None, NONE
        if not results.conflicts(arm, metric):
            result = speedup(*results.paired_curves(arm, metric, axis.name), goal, target)
        if result is not None and result.reached:
            ratio, text = result.ratio, f"{result.ratio.mean:.2f}x"
            partly = f" ({result.reached} of {result.n} seeds)" if result.reached < result.n else ""
            text = _with_interval(text, ratio.low, ratio.high, 2) + partly
        row[f"speed-up in {axis.unit} [95 % interval]"] = text
    return row


# ---- runs, trials and costs


def runs_table(results: Results) -> Table:
    """Return where every run stands."""
    rows = []
    for run in results.members:
        seconds = max(run.curves.get("seconds", {}).values(), default=math.nan)
        row = {"arm": run.arm.label, "seed": str(run.seed), "run": run.run_id, "state": run.status}
        row |= {"step": str(run.last_step), "training seconds": number(seconds, ".0f"), "error": run.error or ""}
        rows.append(row)
    return Table(rows)


def trials_table(results: Results) -> Table:
    """Return the trials of a search, the best first, those without a value last."""
    names = dict.fromkeys(name for _, trial in results.trials for name in trial.params)
    rows = []
    for rank, (_, trial) in enumerate(results.trials, start=1):
        values = {metric: significant(trial.values.get(metric), 4) for metric in results.objectives}
        params = {name: _text(trial.params.get(name)) for name in names}
        rows.append({"rank": str(rank), "arm": trial.arm, "state": trial.state, **values, **params})
    return Table(rows)


def importance_table(frame: pd.DataFrame) -> Table:
    """Return the rows of :func:`repa_lab.report.figure_data.importance_frame`."""
    rows = frame.itertuples()
    return Table([{"objective": r.objective, "setting": r.param, "importance": f"{r.importance:.2f}"} for r in rows])


def cost_frame(results: Results) -> pd.DataFrame:
    """Return the cost of every run of one sweep so far; a run that several arms share is listed once, with the first.

    Columns: ``arm``; hours of devices and FLOPs by phase, named as in :func:`cost_table`, NaN where a run has no
    record. The encoder's hours are part of the training hours, its FLOPs are not.
    """
    runs = results.runs.drop_duplicates("run_id")
    costs = runs.reindex(columns=[*_HOURS.values(), *_FLOPS.values()]).astype(float)
    costs.columns = [*_HOURS, *_FLOPS]
    costs[[*_HOURS]] = costs[[*_HOURS]].mul(runs["processes"] / _SECONDS_PER_HOUR, axis=0)
    costs.insert(0, "arm", runs["arm"])
    return costs


def cost_table(results: Results) -> Table:
    """Return the cost summed over the runs of each arm and over the sweep; columns without any record are left out."""
    frame, rows = cost_frame(results), []
    if frame[TRAINING_HOURS].isna().all():
        return Table([])
    for name, runs in [*frame.groupby("arm", sort=False), ("all runs, each once", frame)]:
        sums = runs.drop(columns="arm").sum(min_count=1)
        trained, measured = sums[TRAINING_HOURS], sums[_EVALUATION_HOURS]
        share = measured / (trained + measured) if trained + measured > 0 else math.nan
        row = {"arm": str(name), "runs": str(len(runs)), **{name: significant(cost) for name, cost in sums.items()}}
        rows.append({**row, "evaluation's share of the hours": _percent(share, 0)})
    return Table(rows).without_empty_columns()


def speed_table(results: Results) -> Table:
    """Return how fast the training steps of each arm were; without rows if no run has recorded it.

    Means over the arm's runs, and the largest peak of memory; utilisation is that of the last logged steps.
    """
    runs, rows = results.runs.drop_duplicates("run_id"), []
    if "cost/data_seconds" not in runs:
        return Table([])
    for arm, of_arm in runs.groupby("arm", sort=False):
        numbers = of_arm.reindex(columns=["images", "seconds", *_SPEED]).astype(float)
        images, seconds, waiting, encoder, utilisation, peak = (numbers[name] for name in numbers)
        row = {"arm": str(arm), "runs": str(len(of_arm)), "images/s": significant(float((images / seconds).mean()))}
        shares = {"waiting for data": waiting / seconds, "encoder": encoder / seconds, "FLOPs utilisation": utilisation}
        row |= {name: _percent(share.mean(), 1) for name, share in shares.items()}
        rows.append({**row, "peak memory, GiB": significant(float(peak.max()))})
    return Table(rows).without_empty_columns()


def _percent(share: float, places: int) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.{places}f} %"


# ---- provenance


def provenance_table(results: Results) -> Table:
    """Return code, versions, machines and options with the number of runs; a row for each value of a fact."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for provenance in {run.run_id: run.provenance for run in results.members}.values():
        for name, value in dotted(provenance).items():
            counts[name][_text(value)] += 1
    facts = [(name, value, count) for name, values in counts.items() for value, count in values.items()]
    return Table([{"what": name, "value": value, "runs": str(count)} for name, value, count in facts if name != "time"])


def settings_table(results: Results) -> Table:
    """Return the settings in which arms differ, a row per arm; all other settings are in every run's ``spec.json``."""
    arms = results.runs.drop_duplicates("arm").head(_MAX_SETTINGS_ARMS)
    names = [name for name in arms.loc[:, "error":].columns[1:] if not name.startswith("cost/")]
    texts = {"arm": list(arms["arm"]), **{name: [_text(value) for value in arms[name]] for name in names}}
    columns = {name: column for name, column in texts.items() if name == "arm" or len(set(column)) > 1}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Table(rows if len(columns) > 1 else [])


def protocols_table(results: Results) -> Table:
    """Return the recorded protocol of each metric, a row per metric and field."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for protocols in results.protocols.by_run.values():
        for metric, protocol in protocols.items():
            for name, value in protocol.items():
                values.setdefault((metric, name), {})[_text(value)] = None
    lines = ((metric, name, " / ".join(texts)) for (metric, name), texts in values.items())
    return Table([{"metric": metric, "depends on": name, "value": text} for metric, name, text in lines])
