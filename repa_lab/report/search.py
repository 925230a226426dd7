"""The trials of a search: in their order, as a frame, and which of the searched settings mattered."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from repa_lab.report.results import Results

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Trial = dict[str, Any]
MIN_TRIALS = 10
_WIDE = 10.0


def best_trial(results: Results) -> Trial | None:
    """The completed trial with the best value of one sweep's search, None if there is none."""
    trials = (trial for trial in ordered_trials(results) if trial["state"] == "complete")
    return next((trial for trial in trials if trial["value"] is not None), None)


def ordered_trials(results: Results) -> list[Trial]:
    """The trials of one sweep's search: the completed ones from the best on, then the pruned ones, then the rest."""
    search = results.sweep.get("search") or {"trials": []}
    sign = -1.0 if search.get("goal") == "max" else 1.0
    states = {"complete": 0, "pruned": 1}

    def order(trial: Trial) -> tuple[int, float]:
        value = trial["value"]
        return states.get(trial["state"], 2), math.inf if value is None else sign * value

    return sorted(search["trials"], key=order)


def objectives(results: Results) -> list[tuple[str, str]]:
    """Metric and goal of all that one sweep's search improves; none without a search."""
    search = results.sweep.get("search")
    if not search:
        return []
    return [(one["metric"], one["goal"]) for one in search.get("objectives") or [search]]


def parameters(results: Results) -> list[str]:
    """The dotted paths that were searched."""
    return list(dict.fromkeys(name for trial in ordered_trials(results) for name in trial["params"]))


def search_frame(results: Results) -> pd.DataFrame:
    """A row per trial of one sweep's search in :func:`ordered_trials`' order.

    Columns: ``trial``, its number in the order in which they were begun; ``arm``, ``state``, ``on_front`` (whether none
        is
    better in every objective), ``value/<objective>`` (NaN without a value) and ``param/<dotted path>`` (text where it
    is no number, None where it was not searched).
    """
    search, aims = results.sweep.get("search") or {}, objectives(results)
    front = set(search.get("pareto") or [])
    begun = {id(trial): number for number, trial in enumerate(search.get("trials") or [])}
    rows = [
        {
            **{
                "trial": begun[id(trial)],
                "arm": trial["arm"],
                "state": trial["state"],
                "on_front": trial["arm"] in front,
            },
            **{f"value/{metric}": value for metric, value in _values(trial, aims).items()},
            **{f"param/{name}": _plain(trial["params"].get(name)) for name in parameters(results)},
        }
        for trial in ordered_trials(results)
    ]
    return pd.DataFrame(rows)


def importance_frame(results: Results) -> pd.DataFrame:
    """How much of the variance of each objective over the completed trials the searched settings explain, by fANOVA.

    Hutter et al., ICML 2014, as Optuna computes it. Settings that only some trials have are left out. Columns
    ``objective``, ``param`` and ``importance``, which sums to 1 over the settings of an objective; empty below
    :data:`MIN_TRIALS` completed trials or two settings, where it would say nothing.
    """
    frame, columns = search_frame(results), ["objective", "param", "importance"]
    done = frame[frame["state"] == "complete"] if len(frame) else frame
    shared = [name for name in done.columns if name.startswith("param/") and _varies(done[name])]
    if len(done) < MIN_TRIALS or len(shared) < 2:
        return pd.DataFrame(columns=columns)
    aims = [metric for metric, _ in objectives(results)]
    found = [(aim, name, value) for aim in aims for name, value in _importance(done, f"value/{aim}", shared).items()]
    return pd.DataFrame([(aim, name.removeprefix("param/"), value) for aim, name, value in found], columns=columns)


def is_wide(values: pd.Series) -> bool:
    """Whether positive numbers span more than a decade, so that a logarithmic axis shows them better."""
    if not pd.api.types.is_numeric_dtype(values):
        return False
    known = values.dropna()
    return bool(len(known) and known.min() > 0 and known.max() / known.min() > _WIDE)


def _values(trial: Trial, aims: list[tuple[str, str]]) -> dict[str, float]:
    held = trial.get("values") or ({aims[0][0]: trial["value"]} if aims else {})
    return {metric: math.nan if held.get(metric) is None else float(held[metric]) for metric, _ in aims}


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str | None):
        return json.dumps(value, sort_keys=True)
    return value


def _varies(column: pd.Series) -> bool:
    return bool(column.notna().all() and column.nunique() > 1)


def _importance(done: pd.DataFrame, value: str, names: list[str]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    measured = done[done[value].notna()]
    if len(measured) < MIN_TRIALS or measured[value].nunique() < 2:
        return {}
    kinds = {name: _distribution(measured[name]) for name in names}
    study = optuna.create_study()
    for _, row in measured.iterrows():
        params = {name: row[name] for name in names}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=float(row[value])))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found


def _distribution(column: pd.Series) -> BaseDistribution:
    """The range that the trials cover; which range was searched is not told by them, and matters little."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not pd.api.types.is_numeric_dtype(column):
        return CategoricalDistribution(sorted(set(column)))
    return FloatDistribution(float(column.min()), float(column.max()), log=is_wide(column))
