"""The data behind the figures as frames: curves, differences, the trials of a search, profiles of blocks.

Imports no drawing library.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from repa_lab.report.results import STEPS, Axis, Results, ResultsError
from repa_lab.report.statistics import MIN_SEEDS, mean_interval, speedup
from repa_lab.report.summary import SUMMARY_COLUMNS, bare_name, dotted, is_protocol
from repa_lab.runs import RunDirectory
from repa_lab.runs.directory import ALIGNMENT_METRICS
from repa_lab.runs.files import DamagedFileError
from repa_lab.runs.root import run_at

COLUMNS = [
    *("group", "arm", "name", "rank", "hue", "resolved", "metric", "seed", "step", "progress", "value"),
    *("n", "place", "mean", "low", "high", "speedup"),
]
ALIGNMENT = {
    "heldout/cka": "CKA with the encoder",
    "heldout/cosine": "cosine to the encoder",
    "heldout/gap": "matched - mismatched",
}
PALETTE = ("#0b6fb8", "#d1570a", "#128a5f", "#a83a86", "#8a6d00", "#5b4bb5")
GREY = "#7d848c"
FAINT = "#cdd2d8"
INK = "#24292f"
SOFT = "#57606a"
MAX_BANDS = 3  # arms of a panel that have bands; those of more arms would hide each other
MIN_TRIALS = 10  # completed trials for an importance of settings
_DECADE = 10.0
_PROFILE_COLUMNS = ["block", "timestep", "metric", "value"]
_MAY_DIFFER = ("step", "packages")  # fields of protocols that may differ between compared profiles


# ---- curves


def convergence_frame(results: Results, axis: Axis = STEPS) -> pd.DataFrame:
    """Return the compared metric of every arm of one sweep over a measure of progress.

    Columns: ``group`` (the baseline that arms share) and ``arm``; ``name``, the arm's label without what its group
    shares; ``rank`` of the arm in its group by the compared metric, 0 is best and -1 the baseline; ``hue``, its colour;
    ``resolved``, whether the summary calls it different from its baseline; ``metric`` by :attr:`Results.names`;
    ``value`` by ``seed``, ``step`` and ``progress`` along the axis; and, repeated for every seed of a step, ``n``,
    ``mean`` and its 95 % interval ``low`` to ``high`` at ``place``, the mean progress. Steps that some of the arm's
    measured seeds lack have no ``mean``: the mean would jump as seeds drop out. ``speedup`` over the baseline is there
    if every seed has one and its interval excludes 1.
    """
    return _frame(results, [(arm, metric) for arm, metric in results.compared_metrics.items() if metric], axis)


def alignment_frame(results: Results) -> pd.DataFrame:
    """Return held-out alignment of every arm of one sweep over steps; columns as in :func:`convergence_frame`."""
    measured = dict.fromkeys(metric for arm in results.baselines for metric in results.metrics(arm))
    metrics = [*ALIGNMENT, *(metric for metric in measured if not is_protocol(metric) and metric not in ALIGNMENT)]
    pairs = [(arm, metric) for arm in results.baselines for metric in metrics if not results.conflicts(arm, metric)]
    return _frame(results, pairs, STEPS)


def quality_frame(results: Results, alignment: str = "heldout/cka") -> pd.DataFrame:
    """Return a row per run and evaluation of one sweep that measured both the compared metric and alignment.

    ``quality`` is the compared metric and ``alignment`` the one named ``alignment_metric``; the other columns are those
    of :func:`convergence_frame`.
    """
    quality = convergence_frame(results).rename(columns={"value": "quality"}).drop(columns=["n", "mean", "low", "high"])
    aligned = alignment_frame(results)
    aligned = aligned[aligned["metric"].map(bare_name) == alignment][["arm", "seed", "step", "value", "metric"]]
    aligned = aligned.rename(columns={"value": "alignment", "metric": "alignment_metric"})
    return quality.merge(aligned, on=["arm", "seed", "step"]).dropna(subset=["alignment", "quality"])


def differences_frame(results: Results) -> pd.DataFrame:
    """Return the rows of the summary with a difference of the compared metric, named by :attr:`Results.names`."""
    rows = [row for row in results.compared_rows.values() if row["n_pairs"] > 0]
    named = [{**row, "metric": results.names[row["metric"]][row["arm"]]} for row in rows]
    return pd.DataFrame(named, columns=SUMMARY_COLUMNS)


def panels(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the rows of every panel (group and metric), in the order of the frame; each can be drawn alone."""
    for _, rows in frame.groupby(["group", "metric"], sort=False):
        yield rows


def caption(frame: pd.DataFrame) -> str:
    """Explain the lines and bands of a figure of curves."""
    most = int(frame["n"].max())
    if most <= 1:
        return "One seed: no interval."
    is_crowded = frame.groupby(["group", "metric"])["arm"].nunique().max() > MAX_BANDS
    if is_crowded and most < MIN_SEEDS:
        return "Line: mean over two seeds, which are too few for a useful interval."
    spread = "Bar: 95 % interval of the last mean" if is_crowded else "Band: 95 % interval of that mean"
    thin = "; thin: single seeds" if needs_seeds(frame) and not is_crowded else ""
    return f"Line: mean over n seeds{thin}. {spread}; by seed (paired), arms may differ clearly where these overlap."


def needs_seeds(rows: pd.DataFrame) -> bool:
    """Return whether to draw single seeds: the band of two is very wide, and the mean ends where a seed stops."""
    return rows["n"].max() in range(2, MIN_SEEDS) or bool(rows["mean"].isna().any())


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of an arm that have a mean, one per step."""
    return rows.drop_duplicates("step").dropna(subset=["mean"]).sort_values("step")


def unique(frame: pd.DataFrame, column: str) -> list[str]:
    """Return the distinct values of a column in their order."""
    return [str(value) for value in frame[column].unique()]


def shared_parts(labels: Sequence[str]) -> list[str]:
    """Return the comma-separated parts that all of several labels share."""
    if len(labels) < 2:
        return []
    others = [set(label.split(", ")) for label in labels[1:]]
    return [part for part in labels[0].split(", ") if all(part in parts for parts in others)]


def _frame(results: Results, pairs: Iterable[tuple[str, str]], axis: Axis) -> pd.DataFrame:
    ranks = _ranks(results)
    resolved = {(row["arm"], row["metric"]) for row in results.rows if row["verdict"] == "resolved"}
    rows: list[dict[str, Any]] = []
    for arm, metric in pairs:
        if points := _points(results, arm, metric, axis):
            is_resolved = (arm, metric) in resolved
            faster = speedup(*results.paired_curves(arm, metric, axis.name), results.goal) if is_resolved else None
            is_sooner = faster is not None and faster.reached == faster.n >= MIN_SEEDS and faster.ratio.low > 1
            labels = {
                "group": results.baselines[arm] or (arm if ranks[arm] < 0 else ""),
                "arm": arm,
                "rank": ranks[arm],
                "metric": results.names[metric][arm],
                "resolved": is_resolved,
                "speedup": faster.ratio if faster and is_sooner else None,
            }
            rows += [{**labels, **point} for point in points]
    frame, names, hues = pd.DataFrame(rows, columns=COLUMNS), dict[str, str](), dict.fromkeys(ranks, -1)
    for place, arms in enumerate(frame.groupby("group", sort=False)["arm"].unique()):
        shared = shared_parts(arms)
        names |= {arm: ", ".join(part for part in arm.split(", ") if part not in shared) or arm for arm in arms}
        others = sorted((arm for arm in arms if ranks[arm] >= 0), key=lambda arm: ranks[arm])
        first = place if len(others) == 1 else 0  # an arm alone against its baseline has the colour of its group
        hues |= {arm: first + rank for rank, arm in enumerate(others)}
    return frame.assign(name=frame["arm"].map(names), hue=frame["arm"].map(hues))


def _points(results: Results, arm: str, metric: str, axis: Axis) -> list[dict[str, float]]:
    """Return the finite values of an arm, step by step, each with the mean and interval of its step."""
    steps: dict[float, dict[int, tuple[float, float]]] = {}  # place and value by step and seed
    for seed, curve in results.seed_curves(arm, metric).items():
        places = results.by_arm[arm][seed].places[axis.name]
        for step, value in curve.items():
            if math.isfinite(value) and not math.isnan(places[step]):
                steps.setdefault(step, {})[seed] = places[step], value
    most, points = max(map(len, steps.values()), default=0), []
    for step, seeds in sorted(steps.items()):
        interval = mean_interval(value for _, value in seeds.values())
        band = {"mean": interval.mean, "low": interval.low, "high": interval.high} if interval.n == most else {}
        mean_place = sum(place for place, _ in seeds.values()) / len(seeds)
        for seed, (place, value) in seeds.items():
            point = {"seed": seed, "step": step, "progress": place, "value": value}
            points.append({**point, "n": interval.n, "place": mean_place, **band})
    return points


def _ranks(results: Results) -> dict[str, int]:
    """Rank arms by the compared metric at equal progress, so that an arm has one colour in all figures; NaN is last."""
    sign = 1.0 if results.goal == "min" else -1.0
    order = {arm: sign * row["mean"] for arm, row in results.compared_rows.items()}
    ranks = dict.fromkeys((arm for arm in results.baselines.values() if arm), -1)
    counts: Counter[str | None] = Counter()  # by baseline
    for arm in sorted(results.baselines, key=lambda arm: (math.isnan(order.get(arm, math.nan)), order.get(arm, 0.0))):
        if arm not in ranks:
            ranks[arm] = counts[results.baselines[arm]]
            counts[results.baselines[arm]] += 1
    return ranks


# ---- the trials of a search


def search_frame(results: Results) -> pd.DataFrame:
    """Return a row per trial of one sweep's search, in the order of :attr:`Results.trials`.

    Columns: ``trial`` (number in the order in which trials were begun), ``arm``, ``state``, ``on_front`` (whether the
    trial is on the Pareto front), ``value/<objective>`` (NaN without a value) and ``param/<dotted path>`` (JSON text
    for lists and booleans, None where the setting was not searched).
    """
    names = dict.fromkeys(name for _, trial in results.trials for name in trial.params)
    front = results.sweep.search.pareto if results.sweep.search else ()
    rows = []
    for number, trial in results.trials:
        row = {"trial": number, "arm": trial.arm, "state": trial.state}
        row |= {"on_front": trial.arm in front and trial.value is not None}
        row |= {f"value/{metric}": trial.values.get(metric, math.nan) for metric in results.objectives}
        for name in names:
            value = trial.params.get(name)
            is_plain = isinstance(value, int | float | str | None) and not isinstance(value, bool)
            row[f"param/{name}"] = value if is_plain else json.dumps(value, sort_keys=True)
        rows.append(row)
    return pd.DataFrame(rows)


def importance_frame(results: Results) -> pd.DataFrame:
    """Return how much of each objective's variance over the completed trials a setting explains, by fANOVA.

    fANOVA is by Hutter et al., ICML 2014, as implemented in Optuna. Settings that only some trials have are left out.
    Columns: ``objective``, ``param``, ``importance`` (sums to 1 over the settings of an objective), the most important
    setting first. Empty below :data:`MIN_TRIALS` completed trials or two settings.
    """
    frame = search_frame(results)
    done = frame[frame["state"] == "complete"] if len(frame) else frame
    params = [name for name in done if name.startswith("param/")]
    shared = [name for name in params if done[name].notna().all() and done[name].nunique() > 1]
    rows = []
    for value in (name for name in done if name.startswith("value/")):
        measured = done[done[value].notna()]
        if len(measured) >= MIN_TRIALS and len(shared) > 1 and measured[value].nunique() > 1:
            shares = _importance(measured, value, shared)
            rows += [(value.partition("/")[2], name.partition("/")[2], share) for name, share in shares.items()]
    importance = pd.DataFrame(rows, columns=["objective", "param", "importance"])
    return importance.sort_values("importance", ascending=False, kind="stable")


def _importance(measured: pd.DataFrame, value: str, names: list[str]) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
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
    known = values.dropna()
    if not pd.api.types.is_numeric_dtype(values) or known.empty:
        return False
    return bool(known.min() > 0 and known.max() / known.min() > _DECADE)


# ---- profiles of blocks, as `repa-lab profile` stores them


def load_profile(run: str | Path | RunDirectory) -> pd.DataFrame:
    """Read a run's profile as tidy rows.

    Returns:
        Columns ``run_id``, ``block`` (0-based, or the name of a UNet's stage), ``timestep`` (1 is noise), ``metric``
        and ``value``; blocks in the order of a forward pass. ``attrs`` has ``protocol``, ``measured_block`` and
        ``aligned_block``.

    Raises:
        ResultsError: the run has no profile, or the profile cannot be read.
    """
    directory = run if isinstance(run, RunDirectory) else run_at(Path(run))
    try:
        stored = directory.profile
        frame = pd.DataFrame(stored["values"], columns=_PROFILE_COLUMNS)
        frame.insert(0, "run_id", stored["run_id"])
        frame.attrs = {key: stored[key] for key in ("protocol", "measured_block", "aligned_block")}
        return frame
    except FileNotFoundError:
        hint = f"make one with `repa-lab profile {directory.run_id}`"
        raise ResultsError(f"run {directory.run_id} has no profile; {hint}") from None
    except (DamagedFileError, KeyError, TypeError) as error:
        raise ResultsError(f"'{directory.profile_file}' cannot be read as a profile: {error!r}") from error


def profile_matrix(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one metric of a profile as blocks by timesteps, in the frame's order of blocks.

    Raises:
        ResultsError: the metric was not measured.
    """
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        measured = ", ".join(frame["metric"].unique())
        raise ResultsError(f"the profile of {run_id_of(frame)} has no {metric}; it has {measured}")
    matrix = rows.pivot(index="block", columns="timestep", values="value")
    return matrix.reindex(index=rows["block"].unique())


def profile_difference(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the second profile minus the first, blocks by timesteps.

    Raises:
        ResultsError: they were measured under different protocols, have different blocks, or lack the metric.
    """
    names = f"the profiles of {run_id_of(first)} and {run_id_of(second)}"
    protocols = [frame.attrs["protocol"].items() for frame in (first, second)]
    fields, others = (dotted({key: value for key, value in items if key not in _MAY_DIFFER}) for items in protocols)
    for key in fields | others:
        if fields.get(key) != others.get(key):
            raise ResultsError(f"{names} cannot be compared: {key} is {fields.get(key)} and {others.get(key)}")
    matrices = [profile_matrix(frame, metric) for frame in (first, second)]
    if not (matrices[0].index.equals(matrices[1].index) and matrices[0].columns.equals(matrices[1].columns)):
        raise ResultsError(f"{names} have different blocks")
    return matrices[1] - matrices[0]


def run_id_of(frame: pd.DataFrame) -> str:
    """Return the run of a profile."""
    return str(frame["run_id"].iloc[0])


def why_not_comparable(first: pd.DataFrame, second: pd.DataFrame) -> str | None:
    """Return why two profiles cannot be subtracted; None if they can."""
    try:
        for metric in first["metric"].unique():
            profile_difference(first, second, metric)
    except ResultsError as error:
        return str(error)
    return None


def shown_metrics(frames: Sequence[pd.DataFrame]) -> list[str]:
    """Return the metrics that all profiles have: those of agreement with the encoder, else all."""
    shared = [name for name in frames[0]["metric"].unique() if all(name in set(frame["metric"]) for frame in frames)]
    return [name for name in shared if name in ALIGNMENT_METRICS] or shared


def load_profiles(results: Results) -> dict[str, dict[int, pd.DataFrame]]:
    """Read the profiles of the runs of one sweep, by arm and seed, the lowest seed first."""
    profiles: dict[str, dict[int, pd.DataFrame]] = {}
    for run in sorted(results.members, key=lambda run: run.seed):
        if run.directory.profile_file.is_file():
            profiles.setdefault(run.arm.label, {})[run.seed] = load_profile(run.directory)
    return profiles


def shown_profiles(results: Results) -> Iterator[tuple[str, list[pd.DataFrame], list[str] | None]]:
    """Yield title, profiles and names of a profile figure for every arm of one sweep with a profiled run.

    An arm stands beside its baseline if their profiles can be compared; that baseline is not shown again. The lowest
    seed for which this holds is shown, else the lowest seed with a profile.
    """
    profiles = load_profiles(results)
    pairs: dict[str, tuple[int, list[pd.DataFrame]]] = {}
    for arm, by_seed in profiles.items():
        baselines = profiles.get(str(results.baselines[arm]), {})
        compared = ((seed, [baselines[seed], profile]) for seed, profile in by_seed.items() if seed in baselines)
        if pair := next((pair for pair in compared if why_not_comparable(*pair[1]) is None), None):
            pairs[arm] = pair
    shown_baselines = {results.baselines[arm] for arm in pairs}
    for arm in results.baselines:
        if arm in pairs:
            seed, frames = pairs[arm]
            yield f"{arm}, seed {seed}, and its baseline", frames, ["baseline", "this arm"]
        elif arm in profiles and arm not in shown_baselines:
            seed, profile = next(iter(profiles[arm].items()))
            yield f"{arm}, seed {seed}", [profile], None
