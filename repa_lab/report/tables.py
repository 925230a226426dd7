"""The tables of a report and how its numbers are formatted. Markdown, LaTeX and HTML share the cells."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from repa_lab.report.results import IMAGES, Axis, Results
from repa_lab.report.search import search_frame
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
_SECONDS = {"training": "seconds", "encoder": "cost/encoder_seconds", "evaluation": "cost/evaluation_seconds"}
_HOURS = ("training", "encoder (within training)", "evaluation")  # names of _SECONDS in the table
_FLOPS = {"training": "cost/train_flops", "encoder": "cost/encoder_flops", "evaluation": "cost/evaluation_flops"}
_SPEED = ("cost/data_seconds", "cost/encoder_seconds", "cost/flops_utilisation", "cost/peak_memory_gib")


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


@dataclass(frozen=True)
class Table:
    """Headers and rows of text; a table without rows is false."""

    headers: list[str]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @cached_property
    def is_number(self) -> list[bool]:
        """Whether every cell of a column begins with a number, column by column."""
        columns = ([row[place] for row in self.rows if row[place] not in _EMPTY] for place in range(len(self.headers)))
        return [bool(cells) and all(map(_NUMBER.match, cells)) for cells in columns]

    @property
    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        head, *body = ([markdown(cell) for cell in line] for line in (self.headers, *self.rows))
        lines = [head, ["---:" if number else "---" for number in self.is_number], *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

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


def markdown(text: str) -> str:
    """Escape text for GitHub's Markdown, where it would be anything but text."""
    return _MARKDOWN_NUMBER.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split())))


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
    rows: dict[str, list[list[str]]] = {}
    for row in results.rows:
        if (metric_kind(row["metric"]) == kind) is compared:
            rows.setdefault(results.names(row["metric"])[row["arm"]], []).append(_summary_row(row))
    return {name: Table(headers, rows[name]) for name in _compared_first(results, list(rows))}


def _compared_first(results: Results, metrics: list[str]) -> list[str]:
    return sorted(metrics, key=lambda metric: bare_name(metric) != results.metric)


def _summary_row(row: Mapping[str, Any]) -> list[str]:
    places = max(decimals(row["mean"]), decimals(row["diff"], digits=2))
    baseline = row["baseline"] or NONE
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
    places = [item for member in results.members for item in member.reader.history.progress.items()]
    per_step = {place.images / step for step, place in places if step > 0 and not math.isnan(place.images)}
    ratio_axes = [axis for axis in results.axes if axis is not IMAGES or len(per_step) > 1]
    headers = ["target", "arm", "reached by", *(axis.unit for axis in results.axes)]
    headers += [f"speed-up in {axis.unit} [95 % interval]" for axis in ratio_axes]
    rows: dict[str, list[list[str]]] = {}
    for metric, target, arm in _targets(results):
        rows.setdefault(results.names(metric)[arm], []).append(_target_row(results, metric, target, arm, ratio_axes))
    return {name: Table(headers, rows[name]).without_empty_columns() for name in _compared_first(results, list(rows))}


def _targets(results: Results) -> Iterator[tuple[str, float | None, str]]:
    """Yield metric, target and arm of every row; a target of None is the baseline's final value, seed by seed."""
    for arm, baseline in results.baselines.items():
        metric = results.compared_metrics[arm]
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
    rows = []
    for member in results.members:
        reader, state = member.reader, member.reader.state
        seconds = reader.history.totals.get("seconds", math.nan)
        cells = [member.arm.label, str(member.keys["seed"]), member.run_id, reader.status, str(reader.last_step)]
        rows.append([*cells, number(seconds, 0), (state and state.error) or ""])
    return Table(["arm", "seed", "run", "state", "step", "training seconds", "error"], rows)


def trials_table(results: Results) -> Table:
    """Return the trials of a search, the best first, those without a value last."""
    frame = search_frame(results)
    names = [name for name in frame.columns if name.startswith(("value/", "param/"))]
    rows = []
    for place, trial in enumerate(frame.to_dict("records"), start=1):
        cells = [_text(trial[name]) if name.startswith("param/") else significant(trial[name], 4) for name in names]
        rows.append([str(place), trial["arm"], trial["state"], *cells])
    return Table(["rank", "arm", "state", *(name.partition("/")[2] for name in names)], rows)


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
    import pandas as pd

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


def speed_table(results: Results) -> Table:
    """Return how fast the training steps of each arm were; without rows if no run has recorded it.

    Means over the arm's runs, and the largest peak of memory; utilisation is that of the last logged steps.
    """
    headers = ["arm", "runs", "images/s", "waiting for data", "encoder", "FLOPs utilisation", "peak memory, GiB"]
    runs = results.runs.drop_duplicates("run_id")
    if "cost/data_seconds" not in runs:
        return Table(headers, [])
    rows = []
    for arm, of_arm in runs.groupby("arm", sort=False):
        numbers = of_arm.reindex(columns=["images", "seconds", *_SPEED]).astype(float)
        images, seconds, waiting, encoder, utilisation, peak = (numbers[name] for name in numbers)
        shares = [(waiting / seconds).mean(), (encoder / seconds).mean(), utilisation.mean()]
        percent = [NONE if math.isnan(share) else f"{100 * share:.1f} %" for share in shares]
        speed = significant(float((images / seconds).mean()))
        rows.append([str(arm), str(len(of_arm)), speed, *percent, significant(float(peak.max()))])
    return Table(headers, rows).without_empty_columns()


# ---- provenance


def provenance_table(results: Results) -> Table:
    """Return code, versions, machines and options with the number of runs; a row for each value of a fact."""
    counts: dict[str, dict[str, int]] = {}
    for provenance in results.provenances.values():
        for name, value in dotted(provenance).items():
            values = counts.setdefault(name, {})
            values[_text(value)] = values.get(_text(value), 0) + 1
    rows = [[name, value, str(count)] for name, values in counts.items() for value, count in values.items()]
    return Table(["what", "value", "runs"], [row for row in rows if row[0] != "time"])


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
    if isinstance(value, float):
        return NONE if math.isnan(value) else f"{value:.4g}"
    return NONE if value is None else str(value)
