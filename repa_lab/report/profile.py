"""Layer by timestep profiles of runs, as `repa-lab profile` stores them: as data frames and as heat maps.

Profiles are subtracted only if they were measured under one protocol.
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

from repa_lab.report.figures.style import shorten
from repa_lab.report.results import Results, ResultsError
from repa_lab.runs import RunDirectory, RunsRoot
from repa_lab.runs.directory import ALIGNMENT_METRICS
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
_MAY_DIFFER = ("step", "packages")  # fields of protocols that may differ between compared profiles
_MAX_CELLS = 400  # beyond this many cells their numbers would be illegible
_NARROW = 0.15  # range of values below which two decimals would hide differences
_ALIGNED = "#d1570a"
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": "#24292f",
    "text.color": "#24292f",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
}


def load_profile(run: str | Path | RunDirectory) -> pd.DataFrame:
    """Read a run's profile as tidy rows.

    Args:
        run: its directory.

    Returns:
        Columns ``run_id``, ``block`` (0-based, or the name of a UNet's stage), ``timestep`` (1 is noise), ``metric``
        and ``value``; blocks in the order of a forward pass. ``attrs`` has ``protocol``, ``measured_block`` and
        ``aligned_block``.

    Raises:
        ResultsError: the run has no profile, or the profile cannot be read.
    """
    directory = run if isinstance(run, RunDirectory) else RunDirectory(Path(run).resolve())
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
        raise ResultsError(f"the profile of {_run_id(frame)} has no {metric}; it has {measured}")
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
        raise ResultsError(f"the profiles of {_run_id(first)} and {_run_id(second)} have different blocks")
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
            raise ResultsError(f"the profiles of {_run_id(first)} and {_run_id(second)} cannot be compared: {reason}")


def _comparable_fields(protocol: dict[str, Any]) -> dict[str, Any]:
    encoder = {f"encoder.{key}": value for key, value in protocol["encoder"].items()}
    return {key: value for key, value in protocol.items() if key not in (*_MAY_DIFFER, "encoder")} | encoder


def _run_id(frame: pd.DataFrame) -> str:
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


def shown_profiles(results: Results, root: RunsRoot) -> Iterator[tuple[str, list[RunDirectory], list[str] | None]]:
    """Yield caption, runs and names for :func:`profile_figure`, for every arm of one sweep with a profiled run.

    An arm stands beside its baseline if their profiles can be compared; that baseline is not shown again. The lowest
    seed for which this holds is shown, else the lowest seed with a profile.
    """
    runs = {(str(row.arm), int(row.seed)): root.run(str(row.run_id)) for row in results.runs.itertuples()}
    profiled = {key: run for key, run in sorted(runs.items()) if run.profile_file.is_file()}
    seeds = {arm: [seed for label, seed in profiled if label == arm] for arm in results.baselines}
    paired_seeds = {}
    for arm, baseline in results.baselines.items():
        for seed in (seed for seed in seeds[arm] if (baseline, seed) in profiled):
            if why_not_comparable(profiled[str(baseline), seed], profiled[arm, seed]) is None:
                paired_seeds[arm] = seed
                break
    shown_baselines = {results.baselines[arm] for arm in paired_seeds}
    for arm, baseline in results.baselines.items():
        if arm in paired_seeds:
            seed = paired_seeds[arm]
            pair = [profiled[str(baseline), seed], profiled[arm, seed]]
            yield f"{arm}, seed {seed}, and its baseline", pair, ["baseline", "this arm"]
        elif seeds[arm] and arm not in shown_baselines:
            yield f"{arm}, seed {seeds[arm][0]}", [profiled[arm, seeds[arm][0]]], None


# ---- heat maps


@dataclass(frozen=True)
class _Panel:
    """A heat map: blocks by timesteps, the title, and the aligned block if there is one."""

    matrix: pd.DataFrame
    title: str
    aligned: int | str | None
    is_difference: bool = False


def profile_figure(
    runs: Sequence[str | Path | RunDirectory], metrics: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Draw heat maps of blocks by timesteps: a column per run and, for two runs, the second minus the first.

    Args:
        runs: run directories that have a profile.
        metrics: a row for each; None takes :func:`shown_metrics`.
        names: names of the runs in titles; None takes their ids.

    Raises:
        ResultsError: a run has no profile, or two were measured under different protocols.
    """
    frames = [load_profile(run) for run in runs]
    shown = list(metrics or shown_metrics(frames))
    titles = []
    for frame, name in zip(frames, names or map(_run_id, frames), strict=True):
        protocol = frame.attrs["protocol"]
        titles.append(f"{shorten(name)}, {protocol['weights']} of step {protocol['step']:,}")
    rows = [_panels(frames, metric, titles) for metric in shown]
    with mpl.rc_context(_STYLE):
        return _draw(rows, shown)


def _panels(frames: Sequence[pd.DataFrame], metric: str, titles: Sequence[str]) -> list[_Panel]:
    pairs = zip(frames, titles, strict=True)
    panels = [_Panel(profile_matrix(frame, metric), title, frame.attrs["aligned_block"]) for frame, title in pairs]
    if len(frames) == 2:
        aligned = frames[1].attrs["aligned_block"]
        panels.append(_Panel(profile_difference(frames[0], frames[1], metric), "second less first", aligned, True))
    return panels


def _draw(rows: Sequence[Sequence[_Panel]], metrics: Sequence[str]) -> Figure:
    blocks, times = rows[0][0].matrix.shape
    size = max(3.6, 1.9 + 0.52 * times) * len(rows[0]), max(2.4, 1.1 + 0.27 * blocks) * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, panels, metric in zip(grid, rows, metrics, strict=True):
        values = np.concatenate([panel.matrix.to_numpy().ravel() for panel in panels if not panel.is_difference])
        for axes, panel in zip(line, panels, strict=True):
            most = float(np.abs(panel.matrix.to_numpy()).max()) or 1.0
            limits = (-most, most) if panel.is_difference else (float(values.min()), float(values.max()))
            _draw_panel(axes, panel, limits)
        line[0].set_ylabel(f"{LABELS.get(metric, metric)}\nblock")
    return figure


def _draw_panel(axes: Axes, panel: _Panel, limits: tuple[float, float]) -> None:
    matrix = panel.matrix.to_numpy(dtype=float)
    colors = "RdBu" if panel.is_difference else "viridis"
    image = axes.imshow(matrix, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    times, blocks = list(panel.matrix.columns), list(panel.matrix.index)
    axes.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    labels = [f"{block} aligned" if block == panel.aligned else str(block) for block in blocks]
    axes.set_yticks(range(len(blocks)), labels)
    axes.set(title=panel.title, xlabel="timestep (1 is noise)")
    _draw_numbers(axes, matrix, limits, panel.is_difference)
    if panel.aligned in blocks:
        place = blocks.index(panel.aligned)
        frame: dict[str, Any] = {"fill": False, "ec": _ALIGNED, "lw": 2.2, "zorder": 4, "clip_on": False}
        axes.add_patch(Rectangle((-0.5, place - 0.5), len(times), 1, **frame))
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.figure.colorbar(image, ax=axes, shrink=0.9)


def _draw_numbers(axes: Axes, matrix: np.ndarray[Any, Any], limits: tuple[float, float], signed: bool) -> None:
    """Write the values into their cells, in a colour that is legible there."""
    if matrix.size > _MAX_CELLS:
        return
    span = (limits[1] - limits[0]) or 1.0
    digits = 2 if span > _NARROW else 3
    for (row, column), value in np.ndenumerate(matrix):
        share = (value - limits[0]) / span
        is_dark = abs(share - 0.5) > 0.35 if signed else share < 0.55
        rounded = round(value, digits) + 0.0  # no minus sign before a zero
        text = f"{rounded:+.{digits}f}" if signed and rounded else f"{rounded:.{digits}f}"
        color = "white" if is_dark else "#24292f"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
