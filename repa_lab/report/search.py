"""The trials of a search: their order, a data frame of them, and the importance of the searched settings."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from repa_lab.report.results import Results
from repa_lab.runs import RunStatus
from repa_lab.runs.root import TrialRecord

if TYPE_CHECKING:
    import pandas as pd

MIN_TRIALS = 10
_DECADE = 10.0
_ORDER = {"complete": 0, "pruned": 1}


def ordered_trials(results: Results) -> list[TrialRecord]:
    """Return the trials of one sweep's search: completed trials from the best on, then pruned ones, then the rest.

    A trial with a value waits again if a run of its arm was deleted since, because no run holds the value any more.
    """
    return [trial for _, trial in _numbered_trials(results)]


def _numbered_trials(results: Results) -> list[tuple[int, TrialRecord]]:
    """Return :func:`ordered_trials`, each with its place in the order in which trials were begun."""
    search = results.sweep.search
    lost = {member.arm.label for member in results.members if search and member.reader.status == RunStatus.NEW}
    sign = -1.0 if search and search.goal == "max" else 1.0

    def order(numbered: tuple[int, TrialRecord]) -> tuple[int, float]:
        trial = numbered[1]
        return _ORDER.get(trial.state, 2), math.inf if trial.value is None else sign * trial.value

    def confirmed(trial: TrialRecord) -> TrialRecord:
        is_lost = trial.value is not None and trial.arm in lost
        return TrialRecord(arm=trial.arm, state="waiting", params=trial.params) if is_lost else trial

    return sorted(enumerate(map(confirmed, search.trials if search else ())), key=order)


def best_trial(results: Results) -> TrialRecord | None:
    """Return the completed trial with the best value of one sweep's search; None if there is none."""
    complete = (trial for trial in ordered_trials(results) if trial.state == "complete")
    return next((trial for trial in complete if trial.value is not None), None)


def objectives(results: Results) -> list[tuple[str, str]]:
    """Return metric and goal of every objective of one sweep's search; empty without a search."""
    search = results.sweep.search
    return [(objective.metric, objective.goal) for objective in search.objectives] if search else []


def search_frame(results: Results) -> pd.DataFrame:
    """Return a row per trial of one sweep's search, in the order of :func:`ordered_trials`.

    Columns: ``trial`` (number in the order in which trials were begun), ``arm``, ``state``, ``on_front`` (whether the
    trial is on the Pareto front), ``value/<objective>`` (NaN without a value) and ``param/<dotted path>`` (JSON text
    for lists and booleans, None where the setting was not searched).
    """
    import pandas as pd

    search = results.sweep.search
    names = dict.fromkeys(name for trial in ordered_trials(results) for name in trial.params)
    front = set(search.pareto if search else ())
    metrics = [metric for metric, _ in objectives(results)]
    rows = []
    for number, trial in _numbered_trials(results):
        row = {"trial": number, "arm": trial.arm, "state": trial.state}
        row |= {"on_front": trial.arm in front and trial.value is not None}
        row |= {f"value/{name}": trial.values.get(name, math.nan) for name in metrics}
        rows.append(row | {f"param/{name}": _plain(trial.params.get(name)) for name in names})
    return pd.DataFrame(rows)


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str | None):
        return json.dumps(value, sort_keys=True)
    return value


def importance_frame(results: Results) -> pd.DataFrame:
    """Return how much of each objective's variance over the completed trials a setting explains, by fANOVA.

    fANOVA is by Hutter et al., ICML 2014, as implemented in Optuna. Settings that only some trials have are left out.
    Columns: ``objective``, ``param``, ``importance`` (sums to 1 over the settings of an objective). Empty below
    :data:`MIN_TRIALS` completed trials or two settings.
    """
    import pandas as pd

    frame, columns = search_frame(results), ["objective", "param", "importance"]
    done = frame[frame["state"] == "complete"] if len(frame) else frame
    params = [name for name in done.columns if name.startswith("param/")]
    shared = [name for name in params if done[name].notna().all() and done[name].nunique() > 1]
    if len(done) < MIN_TRIALS or len(shared) < 2:
        return pd.DataFrame(columns=columns)
    rows = [
        (metric, name.removeprefix("param/"), share)
        for metric, _ in objectives(results)
        for name, share in _importance(done, f"value/{metric}", shared).items()
    ]
    return pd.DataFrame(rows, columns=columns)


def _importance(done: pd.DataFrame, value: str, names: list[str]) -> dict[str, float]:
    import optuna
    import pandas as pd
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    measured = done[done[value].notna()]
    if len(measured) < MIN_TRIALS or measured[value].nunique() < 2:
        return {}
    # The range that the trials cover stands for the searched range, which they do not record.
    distributions: dict[str, BaseDistribution] = {}
    for name in names:
        column = measured[name]
        if pd.api.types.is_numeric_dtype(column):
            distributions[name] = FloatDistribution(float(column.min()), float(column.max()), log=is_wide(column))
        else:
            distributions[name] = CategoricalDistribution(sorted(set(column)))
    study = optuna.create_study()
    for _, row in measured.iterrows():
        params = {name: row[name] for name in names}
        trial = optuna.trial.create_trial(params=params, distributions=distributions, value=float(row[value]))
        study.add_trial(trial)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    importances: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return importances


def is_wide(values: pd.Series) -> bool:
    """Return whether positive numbers span more than a decade, so that a logarithmic axis suits them."""
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(values):
        return False
    known = values.dropna()
    return bool(len(known) and known.min() > 0 and known.max() / known.min() > _DECADE)
