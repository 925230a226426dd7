"""Layer by timestep profiles of runs, as `repa-lab profile` stores them: a DataFrame, and heat maps of it.

A difference is drawn of two profiles only if one protocol made both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from repa_lab.report.results import Results, ResultsError
from repa_lab.runs import RunDirectory, RunsRoot, profiles
from repa_lab.runs.files import DamagedFileError

COLUMNS = ["run_id", "block", "timestep", "metric", "value"]
LABELS = {
    "cka": "CKA with the encoder",
    "cknna": "CKNNA with the encoder",
    "mutual_knn": "mutual kNN with the encoder",
    "lds": "LDS: near less far cosine",
    "cds": "CDS: decay of the cosine",
    "rmsc": "RMSC: contrast of tokens",
}
# What may differ between two profiles whose values are compared all the same.
_OWN = ("step", "packages")
_MOST_CELLS = 400  # beyond which the numbers in them could not be read
_FINE = 0.15  # a range of values below which two decimals would hide what differs
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": "#24292f",
    "text.color": "#24292f",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
}
_VALUES, _DIFFERENCES = "viridis", "RdBu"


@dataclass(frozen=True)
class _Map:
    """A panel: a matrix of blocks by timesteps, its title, and the aligned block, if any."""

    matrix: pd.DataFrame
    title: str
    aligned: int | str | None
    is_difference: bool = False


def load_profile(run: str | Path | RunDirectory) -> pd.DataFrame:
    """A run's profile as tidy rows.

    Args:
        run: its directory.

    Returns:
        Columns ``run_id``, ``block`` (0-based, or the name of a UNet's stage), ``timestep`` (1 is noise), ``metric``
        and ``value``; blocks in the order of a forward pass. ``attrs`` has ``protocol``, ``measured_block``,
        ``aligned_block``.

    Raises:
        ResultsError: it has no profile, or one that cannot be read.
    """
    stored = _stored(run)
    frame = pd.DataFrame(stored["values"], columns=COLUMNS[1:])
    frame.insert(0, "run_id", stored["run_id"])
    frame.attrs = {key: stored[key] for key in ("protocol", "measured_block", "aligned_block")}
    return frame


def profile_matrix(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of a profile as blocks by timesteps, in the frame's own order of blocks.

    Raises:
        ResultsError: it was not measured.
    """
    rows = frame[frame["metric"] == metric]
    if rows.empty:
        raise ResultsError(
            f"the profile of {_name(frame)} has no {metric}; it has {', '.join(frame['metric'].unique())}"
        )
    matrix = rows.pivot(index="block", columns="timestep", values="value")
    return matrix.reindex(index=rows["block"].unique())


def profile_difference(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The second profile less the first, blocks by timesteps.

    Raises:
        ResultsError: they were measured by different protocols, have other blocks, or lack the metric.
    """
    require_one_protocol(first, second)
    one, other = (profile_matrix(frame, metric) for frame in (first, second))
    if not (one.index.equals(other.index) and one.columns.equals(other.columns)):
        raise ResultsError(f"the profiles of {_name(first)} and {_name(second)} have different blocks")
    return other - one


def require_one_protocol(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Refuse to compare what was not measured alike.

    Raises:
        ResultsError: naming what differs.
    """
    one, other = (_flat(frame.attrs["protocol"]) for frame in (first, second))
    for key in {**one, **other}:
        if one.get(key) != other.get(key):
            differs = f"{key} is {one.get(key)} and {other.get(key)}"
            raise ResultsError(f"the profiles of {_name(first)} and {_name(second)} cannot be compared: {differs}")


def profile_figure(
    runs: Sequence[str | Path | RunDirectory], metrics: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Heat maps, blocks by timesteps: a column for each run and, of two runs, what the second has more than the first.

    Args:
        runs: run directories that have a profile.
        metrics: a row for each; None takes the agreement with the encoder that all of them measured, or else all they
            measured.
        names: what to call the runs; None takes their ids.

    Raises:
        ResultsError: a run has no profile, or two were measured by different protocols.
    """
    frames = [load_profile(run) for run in runs]
    shown = list(metrics or shown_metrics(frames))
    titles = [_title(frame, name) for frame, name in zip(frames, names or map(_name, frames), strict=True)]
    rows = [_maps(frames, metric, titles) for metric in shown]
    with mpl.rc_context(_STYLE):
        return _draw(rows, shown)


def shown_metrics(frames: Sequence[pd.DataFrame]) -> list[str]:
    """Of the metrics that all profiles have, the agreement with the encoder; else all of them."""
    shared = [name for name in frames[0]["metric"].unique() if all(name in set(frame["metric"]) for frame in frames)]
    return [name for name in shared if name in profiles.ALIGNMENT] or shared


def profile_figures(results: Results, root: RunsRoot) -> Iterator[tuple[str, Figure]]:
    """A caption and a figure for every arm of one sweep that has a run with a profile, beside its baseline if it can
    be.

    Of an arm's seeds the lowest is shown that has a baseline to stand beside, else the lowest; a baseline that stands
    beside an arm is not shown again.
    """
    runs = {(str(row.arm), int(row.seed)): root.run(str(row.run_id)) for row in results.runs.itertuples()}
    profiled = {key: run for key, run in sorted(runs.items()) if profiles.path_of(run).is_file()}
    pairs = {arm: pair for arm in results.baselines if (pair := _pair(arm, results.baselines[arm], profiled))}
    beside = {results.baselines[arm] for arm in pairs}
    for arm in results.baselines:
        seeds = [seed for one, seed in profiled if one == arm]
        if arm in pairs:
            seed, shown = pairs[arm]
            yield f"{arm}, seed {seed}, and its baseline", profile_figure(shown, names=["baseline", "this arm"])
        elif seeds and arm not in beside:
            yield f"{arm}, seed {seeds[0]}", profile_figure([profiled[arm, seeds[0]]])


def _pair(
    arm: str, baseline: str | None, profiled: dict[tuple[str, int], RunDirectory]
) -> tuple[int, list[RunDirectory]] | None:
    """The first seed of which an arm and its baseline can be compared, and both runs, the baseline first."""
    seeds = [seed for one, seed in profiled if one == arm and (baseline, seed) in profiled]
    pairs = ((seed, [profiled[str(baseline), seed], profiled[arm, seed]]) for seed in seeds)
    return next(((seed, pair) for seed, pair in pairs if why_not_comparable(*pair) is None), None)


def why_not_comparable(first: str | Path | RunDirectory, second: str | Path | RunDirectory) -> str | None:
    """Why no difference can be drawn of the profiles of two runs; None if it can."""
    one, other = load_profile(first), load_profile(second)
    try:
        for metric in one["metric"].unique():
            profile_difference(one, other, metric)
    except ResultsError as error:
        return str(error)
    return None


def _stored(run: str | Path | RunDirectory) -> dict[str, Any]:
    directory = run if isinstance(run, RunDirectory) else RunDirectory(Path(run).resolve())
    try:
        stored = profiles.read(directory)
        return {key: stored[key] for key in ("run_id", "measured_block", "aligned_block", "protocol", "values")}
    except FileNotFoundError:
        hint = f"make one with `repa-lab profile {directory.run_id}`"
        raise ResultsError(f"run {directory.run_id} has no profile; {hint}") from None
    except (DamagedFileError, KeyError, TypeError) as error:
        raise ResultsError(f"'{profiles.path_of(directory)}' cannot be read as a profile: {error!r}") from error


def _name(frame: pd.DataFrame) -> str:
    return str(frame["run_id"].iloc[0])


def _flat(protocol: dict[str, Any]) -> dict[str, Any]:
    """What must agree, the encoder's settings one by one."""
    encoder = {f"encoder.{key}": value for key, value in protocol["encoder"].items()}
    return {key: value for key, value in protocol.items() if key not in (*_OWN, "encoder")} | encoder


def _maps(frames: Sequence[pd.DataFrame], metric: str, titles: Sequence[str]) -> list[_Map]:
    panels = zip(frames, titles, strict=True)
    maps = [_Map(profile_matrix(frame, metric), title, frame.attrs["aligned_block"]) for frame, title in panels]
    if len(frames) == 2:
        aligned = frames[1].attrs["aligned_block"]
        maps.append(_Map(profile_difference(frames[0], frames[1], metric), "second less first", aligned, True))
    return maps


def _title(frame: pd.DataFrame, name: str) -> str:
    protocol = frame.attrs["protocol"]
    return f"{name}, {protocol['weights']} of step {protocol['step']:,}"


def _draw(rows: Sequence[Sequence[_Map]], metrics: Sequence[str]) -> Figure:
    blocks, times = rows[0][0].matrix.shape
    size = max(3.6, 1.9 + 0.52 * times) * len(rows[0]), max(2.4, 1.1 + 0.27 * blocks) * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, maps, metric in zip(panels, rows, metrics, strict=True):
        values = np.concatenate([one.matrix.to_numpy().ravel() for one in maps if not one.is_difference])
        for axes, one in zip(line, maps, strict=True):
            most = float(np.abs(one.matrix.to_numpy()).max()) or 1.0
            limits = (-most, most) if one.is_difference else (float(values.min()), float(values.max()))
            _panel(axes, one, limits)
        line[0].set_ylabel(f"{LABELS.get(metric, metric)}\nblock")
    return figure


def _panel(axes: Axes, shown: _Map, limits: tuple[float, float]) -> None:
    matrix = shown.matrix.to_numpy(dtype=float)
    image = axes.imshow(
        matrix, cmap=_DIFFERENCES if shown.is_difference else _VALUES, vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    times, blocks = list(shown.matrix.columns), list(shown.matrix.index)
    axes.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    marked = [f"{block} aligned" if block == shown.aligned else str(block) for block in blocks]
    axes.set_yticks(range(len(blocks)), marked)
    axes.set(title=shown.title, xlabel="timestep (1 is noise)")
    _numbers(axes, matrix, limits, shown.is_difference)
    if shown.aligned in blocks:
        place = blocks.index(shown.aligned)
        axes.add_patch(
            Rectangle((-0.5, place - 0.5), len(times), 1, fill=False, ec="#d1570a", lw=2.2, zorder=4, clip_on=False)
        )
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)


def _numbers(axes: Axes, matrix: np.ndarray[Any, Any], limits: tuple[float, float], signed: bool) -> None:
    """The values in their cells, in the ink that can be read there."""
    if matrix.size > _MOST_CELLS:
        return
    span = (limits[1] - limits[0]) or 1.0
    digits = 2 if span > _FINE else 3
    for (row, column), value in np.ndenumerate(matrix):
        share = (value - limits[0]) / span
        dark = abs(share - 0.5) > 0.35 if signed else share < 0.55
        rounded = round(value, digits) + 0.0  # no minus before a zero
        text = f"{rounded:+.{digits}f}" if signed and rounded else f"{rounded:.{digits}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "#24292f")
