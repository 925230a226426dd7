"""What a sweep took: training, encoders and measurements apart, so that none outweighs another unseen."""

from __future__ import annotations

import math

import pandas as pd

from repa_lab.report.phrases import NONE, significant
from repa_lab.report.results import Results
from repa_lab.report.table import Table

_SECONDS_PER_HOUR = 3600
_SECONDS = {"training": "seconds", "encoder": "cost/encoder_seconds", "evaluation": "cost/evaluation_seconds"}
_HOURS = ("training", "encoder (within training)", "evaluation")  # what _SECONDS are called in the table
_FLOPS = {"training": "cost/train_flops", "encoder": "cost/encoder_flops", "evaluation": "cost/evaluation_flops"}


def cost_frame(results: Results) -> pd.DataFrame:
    """What every run of one sweep took so far, a row per run: a run that several arms share stands once, with the
    first.

    Columns: ``arm``, ``run_id``; ``hours/<part>``, device hours, and ``flops/<part>`` of ``training``, ``encoder`` (its
        hours
    are in those of training, its FLOPs are not) and ``evaluation``, NaN where a run did not record it.
    """
    runs = results.runs.drop_duplicates("run_id")
    frame = runs[["arm", "run_id"]].copy()
    for part, column in _SECONDS.items():
        frame[f"hours/{part}"] = _column(runs, column) * runs["processes"] / _SECONDS_PER_HOUR
    for part, column in _FLOPS.items():
        frame[f"flops/{part}"] = _column(runs, column)
    return frame


def cost_table(results: Results) -> Table:
    """Sums over the runs of an arm, and over the sweep; columns that no run recorded are left out."""
    frame = cost_frame(results)
    headers = ["arm", "runs", *(f"device hours, {part}" for part in _HOURS), *(f"FLOPs, {part}" for part in _FLOPS)]
    headers.append("evaluation's share of the hours")
    if frame["hours/training"].isna().all():
        return Table(headers, [])
    rows = [_row(str(arm), group) for arm, group in frame.groupby("arm", sort=False)]
    return Table(headers, [*rows, _row("all runs, each once", frame)]).without_empty_columns()


def _row(name: str, runs: pd.DataFrame) -> list[str]:
    sums = runs.drop(columns=["arm", "run_id"]).sum(min_count=1)
    trained, measured = sums["hours/training"], sums["hours/evaluation"]
    share = measured / (trained + measured) if trained + measured > 0 else math.nan
    return [name, str(len(runs)), *map(significant, sums), NONE if math.isnan(share) else f"{100 * share:.0f} %"]


def _column(runs: pd.DataFrame, name: str) -> pd.Series:
    return runs[name].astype(float) if name in runs else pd.Series(math.nan, index=runs.index)
