"""Layer by timestep profiles of runs, as `repa-lab profile` stores them.

Profiles are subtracted only if they were measured under one protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from repa_lab.report.results import Results, ResultsError
from repa_lab.runs import RunDirectory
from repa_lab.runs.directory import ALIGNMENT_METRICS
from repa_lab.runs.files import DamagedFileError
from repa_lab.runs.root import run_at

COLUMNS = ["run_id", "block", "timestep", "metric", "value"]
_MAY_DIFFER = ("step", "packages")  # fields of protocols that may differ between compared profiles


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
        frame = pd.DataFrame(stored["values"], columns=COLUMNS[1:])
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
    require_one_protocol(first, second)
    matrices = [profile_matrix(frame, metric) for frame in (first, second)]
    if not (matrices[0].index.equals(matrices[1].index) and matrices[0].columns.equals(matrices[1].columns)):
        raise ResultsError(f"the profiles of {run_id_of(first)} and {run_id_of(second)} have different blocks")
    return matrices[1] - matrices[0]


def require_one_protocol(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Check that two profiles were measured under one protocol.

    Raises:
        ResultsError: they were not; the message names the first field that differs.
    """
    fields, others = (_comparable_fields(frame.attrs["protocol"]) for frame in (first, second))
    for key in {**fields, **others}:
        if fields.get(key) != others.get(key):
            reason = f"{key} is {fields.get(key)} and {others.get(key)}"
            raise ResultsError(
                f"the profiles of {run_id_of(first)} and {run_id_of(second)} cannot be compared: {reason}"
            )


def _comparable_fields(protocol: dict[str, Any]) -> dict[str, Any]:
    encoder = {f"encoder.{key}": value for key, value in protocol["encoder"].items()}
    return {key: value for key, value in protocol.items() if key not in (*_MAY_DIFFER, "encoder")} | encoder


def run_id_of(frame: pd.DataFrame) -> str:
    """Return the run of a profile."""
    return str(frame["run_id"].iloc[0])


def why_not_comparable(first: str | Path | RunDirectory, second: str | Path | RunDirectory) -> str | None:
    """Return why the profiles of two runs cannot be subtracted; None if they can."""
    frames = load_profile(first), load_profile(second)
    try:
        for metric in frames[0]["metric"].unique():
            profile_difference(*frames, metric)
    except ResultsError as error:
        return str(error)
    return None


def shown_metrics(frames: Sequence[pd.DataFrame]) -> list[str]:
    """Return the metrics that all profiles have: those of agreement with the encoder, else all."""
    shared = [name for name in frames[0]["metric"].unique() if all(name in set(frame["metric"]) for frame in frames)]
    return [name for name in shared if name in ALIGNMENT_METRICS] or shared


def shown_profiles(results: Results) -> Iterator[tuple[str, list[RunDirectory], list[str] | None]]:
    """Yield caption, runs and names for :func:`profile_figure`, for every arm of one sweep with a profiled run.

    An arm stands beside its baseline if their profiles can be compared; that baseline is not shown again. The lowest
    seed for which this holds is shown, else the lowest seed with a profile.
    """
    profiled: dict[str, dict[int, RunDirectory]] = {}
    for member in sorted(results.members, key=lambda member: int(member.keys["seed"])):
        if member.reader.run.profile_file.is_file():
            profiled.setdefault(member.arm.label, {})[member.keys["seed"]] = member.reader.run
    pairs: dict[str, tuple[int, list[RunDirectory]]] = {}
    for arm, runs in profiled.items():
        baselines = profiled.get(str(results.baselines[arm]), {})
        compared = ((seed, [baselines[seed], run]) for seed, run in runs.items() if seed in baselines)
        if pair := next((pair for pair in compared if why_not_comparable(*pair[1]) is None), None):
            pairs[arm] = pair
    shown_baselines = {results.baselines[arm] for arm in pairs}
    for arm in results.baselines:
        if arm in pairs:
            seed, runs_of_pair = pairs[arm]
            yield f"{arm}, seed {seed}, and its baseline", runs_of_pair, ["baseline", "this arm"]
        elif arm in profiled and arm not in shown_baselines:
            seed, run = next(iter(profiled[arm].items()))
            yield f"{arm}, seed {seed}", [run], None
