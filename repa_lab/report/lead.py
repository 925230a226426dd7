"""The answer of a sweep in one sentence."""

from __future__ import annotations

import math

import pandas as pd

from repa_lab.report.results import Results
from repa_lab.report.search import best_trial
from repa_lab.report.words import comparable_row, conclusions, difference, is_better, search_lines


def lead(results: Results) -> str:
    """The answer in a sentence with interval and n.

    It is that of a search, that of the only compared arm, or how many of several arms differ from their baselines and
    the best of them.
    """
    best = best_trial(results)
    if best is not None:
        return "".join(search_lines(results, best))
    found = [comparable_row(results, arm) for arm, baseline in results.baselines.items() if baseline is not None]
    rows = [row for row in found if row is not None]
    if not rows:
        return next(iter(conclusions(results)), "Nothing was asked for.")
    return difference(results, rows[0]) if len(rows) == 1 else _of_several(results, rows)


def _of_several(results: Results, rows: list[pd.Series]) -> str:
    resolved = [row for row in rows if row["verdict"] == "resolved"]
    better = [row for row in resolved if is_better(results, row)]
    best = difference(results, min(better or rows, key=lambda row: _loss(results, row)))
    if not resolved:
        return f"None of {len(rows)} compared arms is resolved to differ from its baseline. The most favourable: {best}"
    counts = f"{len(better)} resolved to be better than the baseline, {len(resolved) - len(better)} to be worse"
    which = "The best, picked for its value, which is therefore optimistic" if len(better) > 1 else "The best"
    return f"Of {len(rows)} compared arms: {counts}. {which}: {best}"


def _loss(results: Results, row: pd.Series) -> float:
    """The relative difference, or the absolute one where there is none; less is better."""
    change = row["diff"] if math.isnan(row["relative"]) else row["relative"]
    return float(change if results.goal == "min" else -change)
