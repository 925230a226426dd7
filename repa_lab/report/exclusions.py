"""What a report leaves out, and why: nothing is dropped in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from repa_lab.report.phrases import listed
from repa_lab.report.progress import AXES
from repa_lab.report.results import Results
from repa_lab.report.summary import is_protocol

_MOST_PER_RUN = 8


def exclusions(results: Results) -> list[str]:
    """A line on everything of one sweep that is in no mean or in no comparison, and why."""
    return [
        *troubles(results),
        *_missing_seeds(results),
        *_missing_values(results),
        *_refusals(results),
        *_unvouched(results),
        *_unequal_images(results),
        *_pruned(results),
        *_orphans(results),
        *_axes(results),
    ]


def troubles(results: Results) -> Iterator[str]:
    """A line on everything of a run that could not be read."""
    for (arm, seed, run_id), rows in results.troubles.groupby(["arm", "seed", "run_id"], sort=False):
        found = [f"{where}: {what}" for where, what in zip(rows["where"], rows["what"], strict=True)]
        more = f"; and {len(found) - _MOST_PER_RUN} more" if len(found) > _MOST_PER_RUN else ""
        yield f"{arm}, seed {seed} (run {run_id}): {'; '.join(found[:_MOST_PER_RUN])}{more}."


def _missing_seeds(results: Results) -> Iterator[str]:
    wanted = set(results.sweep.get("seeds") or [])
    for arm, runs in results.runs.groupby("arm", sort=False):
        missing = sorted(wanted - set(runs["seed"]))
        if missing:
            yield f"{arm}: the sweep names no run for seed {', '.join(map(str, missing))}."


def _missing_values(results: Results) -> Iterator[str]:
    """Seeds without a finite value where the arm is shown, and measurements beyond that step."""
    rows = results.summary[results.summary["metric"].map(is_protocol).astype(bool)]
    for _, row in rows.iterrows():
        curves = results.seed_curves(row["arm"], row["metric"])
        planned = sorted(results.runs.loc[results.runs["arm"] == row["arm"], "seed"])
        unmeasured = [seed for seed in planned if seed not in curves]
        broken = [seed for seed, curve in curves.items() if not math.isfinite(curve[row["step"]])]
        later = max(max(curve) for curve in curves.values())
        parts = [
            *([f"seed {listed([str(seed) for seed in unmeasured])} never measured"] if unmeasured else []),
            *([f"seed {listed([str(seed) for seed in broken])} not finite"] if broken else []),
            *([f"measurements after step {row['step']:,} (up to {later:,})"] if later > row["step"] else []),
        ]
        if parts:
            yield f"{row['arm']}: not in the means of {row['metric']} at step {row['step']:,}: {'; '.join(parts)}."


def _refusals(results: Results) -> Iterator[str]:
    for _, row in results.summary[results.summary["conflicts"] != ""].iterrows():
        means = " and has no mean" if math.isnan(row["mean"]) else ""
        against = "" if pd.isna(row["baseline"]) else f" with {row['baseline']}"
        yield (
            f"{row['arm']}: {row['metric']} is not compared{against}{means}, for under this one name runs were measured "
            f"differently: {row['conflicts']}."
        )


def _unvouched(results: Results) -> Iterator[str]:
    """Runs without a record of what their numbers depend on, beside runs that have one."""
    for metric, rows in results.evaluations.groupby("metric", sort=False):
        if not is_protocol(str(metric)):
            continue
        ids = list(rows["run_id"].unique())
        lacking = results.protocols.lacking(ids, str(metric))
        if lacking and len(lacking) < len(ids):
            yield f"{len(lacking)} of {len(ids)} runs did not record what {metric} depends on: for them its name alone vouches."


def _unequal_images(results: Results) -> Iterator[str]:
    """Equal steps are no equal progress where batches differ in size."""
    images = results.evaluations.dropna(subset=["images"]).groupby(["arm", "step"])["images"].first()
    rows = results.summary[results.summary["metric"] == results.metric].dropna(subset=["baseline", "diff"])
    for arm, baseline, step in zip(rows["arm"], rows["baseline"], rows["step"], strict=True):
        own, other = images.get((arm, step)), images.get((baseline, step))
        if own is not None and other is not None and own != other:
            seen = f"at step {step:,} it has seen {own:,.0f} images and {baseline} {other:,.0f}"
            yield f"{arm}: {seen}; the summary compares equal steps, the curves over images show the rest."


def _pruned(results: Results) -> Iterator[str]:
    ended = results.runs[results.runs["state"].isin(("pruned", "stopped"))]
    for state, runs in ended.groupby("state"):
        why = "by the search" if state == "pruned" else "by a rule of the sweep"
        arms = listed(list(dict.fromkeys(runs["arm"])))
        yield f"{len(runs)} of {len(results.runs)} runs were ended early {why} ({arms}): they count as far as they got."


def _orphans(results: Results) -> Iterator[str]:
    orphans = results.sweep.get("orphaned") or []
    if orphans:
        yield f"{len(orphans)} runs that an earlier version of the spec asked for are in no number here."


def _axes(results: Results) -> Iterator[str]:
    """Measures of progress that only some runs recorded, so that no curves are drawn over them."""
    measured = results.evaluations
    for axis in (axis for axis in AXES if axis not in results.axes):
        lacking, known = (
            measured.loc[gaps, "run_id"].nunique() for gaps in (measured[axis.name].isna(), measured["step"] >= 0)
        )
        if lacking < known:
            yield f"No curves over {axis.label}, which {lacking} of {known} measured runs did not record."
