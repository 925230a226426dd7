"""Look across sweeps and into runs: profiles of blocks, leaderboards, the upload to W&B."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repa_lab.cli.shared import JsonOption, RootOption, UsageError, WeightsOption, out, require_choice, table
from repa_lab.runs import RunDirectory, RunsRoot
from repa_lab.runs.files import DamagedFileError, garbage_collection_paused
from repa_lab.runs.root import DEFAULT_ROOT, SweepDirectory, UnknownRunError, UnknownSweepError

if TYPE_CHECKING:
    from repa_lab.align.settings import EncoderSettings
    from repa_lab.report.leaderboard import Board

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def profile(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Ids or folders; the others are compared with the first.")
    ],
    timesteps: Annotated[str, typer.Option(help="From 0, data, to 1, noise.")] = "0.1,0.3,0.5,0.7,0.9",
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Encoder to compare with, or its settings as in a spec; else the run's own."),
    ] = None,
    weights: WeightsOption = "ema",
    samples: Annotated[int | None, typer.Option(min=1, help="How many of the held-out images; else all.")] = None,
    metrics: Annotated[str, typer.Option(help="The metrics to measure.")] = "cka,cknna,mutual_knn,lds,cds,rmsc",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto is that of the run's training.")] = "auto",
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Measure how well every block of a run agrees with its encoder at several times, and draw it.

    Of several runs the differences from the first are drawn too.
    """
    directories = [RunsRoot(root).find_run(run) for run in dict.fromkeys(runs)]
    from repa_lab.spec import RunOptions  # takes seconds, for torch; a mistyped run need not wait
    from repa_lab.training.profile import Request, profile_run

    require_choice("--precision", precision, PRECISIONS)
    options, names = RunOptions.model_validate({"precision": precision}), _words(metrics)
    try:
        times = tuple(sorted(float(word) for word in _words(timesteps)))
    except ValueError:
        raise UsageError(f"expected numbers with commas between them, got '{timesteps}'", "--timesteps") from None
    request = Request(times, tuple(names), weights, samples, _encoder(encoder, directories))
    profiles = [profile_run(run, request, options, RunsRoot(root).cache) for run in directories]
    drawn = _draw(directories)
    if json_:
        print(json.dumps(profiles))
        return
    for run in directories:
        _print_profile(run, names)
    for path in drawn:
        typer.echo(path)


@garbage_collection_paused()
def leaderboard(
    place: Annotated[
        Path | None, typer.Argument(metavar="[ROOT]", help="The folder of all runs; the same as --root.")
    ] = None,
    root: RootOption = DEFAULT_ROOT,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME|KIND", help="One metric, or one kind, such as fid.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(metavar="TEXT", help="What the metric's name must contain, such as @50k/sde250.")
    ] = "",
    json_: JsonOption = False,
) -> None:
    """Show the arms of all sweeps, best first, a table for each protocol."""
    from repa_lab.report.leaderboard import leaderboards

    boards = leaderboards(place or root, metric, protocol, tell=lambda line: typer.echo(line, err=True))
    if json_:
        print(json.dumps(list(map(_board_json, boards))))
        return
    for board in boards:
        better = "lower is better" if board.goal == "min" else "higher is better"
        fields = [f"{field}: {json.dumps(value)}" for field, value in board.protocol.items()]
        out.print(table("\n".join([f"{board.metric} ({better})", *fields]), _board_rows(board)))


def sync(
    names: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|SWEEP]...", help="Ids of runs, names of sweeps, or folders; else all."),
    ] = None,
    root: RootOption = DEFAULT_ROOT,
) -> None:
    """Send W&B what run directories hold and its server does not have."""
    from repa_lab.report.statistics import headline
    from repa_lab.tracking.server import require_server
    from repa_lab.tracking.wandb import WandbRun, descriptions
    from repa_lab.tracking.wandb import sync as upload

    runs, sweeps = _runs_and_sweeps(RunsRoot(root), names or [])
    described = descriptions(sweeps, headline)
    pairs = [(run, described.get(run.run_id) or WandbRun.by_itself(run)) for run in runs if _may_have_rows(run)]
    if not names:
        wanted = [(run, description) for run, description in pairs if description.options.mode != "disabled"]
        if unwanted := len(pairs) - len(wanted):
            typer.echo(
                f"{unwanted} runs left: their sweeps have run.wandb.mode disabled; name a sweep to send its runs"
            )
        pairs = wanted
    if not pairs:
        typer.echo(f"no rows to send in {root}")
        return
    require_server()
    failed = False
    for run, description in pairs:
        with out.status(f"uploading {run.run_id}"):
            result = upload(run, description)
        failed |= result.outcome == "failed"
        typer.echo(": ".join(filter(None, (result.run_id, result.outcome, result.detail))))
    if failed:
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _encoder(given: str | None, directories: Sequence[RunDirectory]) -> EncoderSettings | None:
    """Return the named encoder, with the settings under which one of the runs uses it, or else with the defaults."""
    from repa_lab.align.settings import EncoderSettings
    from repa_lab.spec.document import Draft, parse_scalar
    from repa_lab.spec.identity import Run
    from repa_lab.spec.schema import validate
    from repa_lab.training.profile import known_encoder

    if given is None:
        return None
    try:
        value = parse_scalar(given)
    except ValueError as error:
        raise UsageError(str(error), "--encoder") from None
    if isinstance(value, dict):
        return validate(EncoderSettings, Draft(value))
    return known_encoder([Run.read(run).config for run in directories], given) or EncoderSettings(name=given)


def _print_profile(run: RunDirectory, metrics: Sequence[str]) -> None:
    """Print, for each timestep and metric, the block with the largest value, and the value that the run measures."""
    from repa_lab.report.figure_data import load_profile, shown_metrics

    frame, rows = load_profile(run), []
    protocol, aligned, measured = (frame.attrs[key] for key in ("protocol", "aligned_block", "measured_block"))
    for timestep in protocol["timesteps"]:
        row = {"timestep": f"{timestep:g}"}
        for metric in shown_metrics([frame]):
            values = frame[(frame["timestep"] == timestep) & (frame["metric"] == metric)].set_index("block")["value"]
            row[f"{metric}: best block"] = f"{values.idxmax()} ({values.max():.3f})"
            if measured in values.index:
                row[f"{metric} at {measured}"] = f"{values[measured]:.3f}"
        rows.append(row)
    source = f"{protocol['weights']} weights of step {protocol['step']:,}, {protocol['images']:,} held-out images"
    out.print(table(f"{run.run_id}: {source}, {protocol['encoder']['name']}", rows))
    typer.echo("not aligned" if aligned is None else f"aligned at block {aligned}")
    if missing := [metric for metric in metrics if metric not in set(frame["metric"])]:
        typer.echo(f"the grid is too small for {', '.join(missing)}")


def _draw(directories: Sequence[RunDirectory]) -> list[Path]:
    """Draw each run, and each run beside the first; print why a pair cannot be drawn."""
    from repa_lab.report.figure_data import load_profile, why_not_comparable
    from repa_lab.report.figures import profile_figure, save

    profiles = [load_profile(run) for run in directories]
    pairs = list(zip(directories, profiles, strict=True))
    drawn = [save(profile_figure([profile]), run.profile_picture()) for run, profile in pairs]
    (first, first_profile), *others = pairs
    for run, profile in others:
        if reason := why_not_comparable(first_profile, profile):
            typer.echo(reason, err=True)
        else:
            drawn.append(save(profile_figure([first_profile, profile]), run.profile_picture(first)))
    return drawn


def _board_json(board: Board) -> dict[str, Any]:
    rows = json.loads(board.frame.to_json(orient="records"))  # pandas writes what is not a number as null
    return {"metric": board.metric, "goal": board.goal, "protocol": dict(board.protocol), "arms": rows}


def _board_rows(board: Board) -> list[dict[str, Any]]:
    from repa_lab.report.tables import decimals, interval

    rows = []
    for arm in board.rows:
        places = decimals(arm["mean"])
        spread = "" if math.isnan(arm["low"]) else f" {interval(arm['low'], arm['high'], places)}"
        rows.append(
            {
                "arm": arm["arm"],
                "sweeps": arm["sweeps"],
                "model": f"{arm['family']} {arm['size']}".strip(),
                "regularizer": f"{arm['regularizer']} {arm['encoder']}".strip(),
                "state": arm["state"],
                "mean [95 % interval]": f"{arm['mean']:.{places}f}{spread}",
                "n": f"{arm['n']} of {arm['seeds']}",
                "best": f"{arm['best']:.{places}f}",
                "step": arm["step"],
                "images": f"{arm['images']:.0f}",
            }
        )
    return rows


def _runs_and_sweeps(root: RunsRoot, names: Sequence[Path]) -> tuple[list[RunDirectory], list[SweepDirectory]]:
    """Return the runs of sweeps, or the runs, of these names, each once; all runs without names.

    Returns:
        The runs, and the sweeps that may ask for them, the named ones first.
    """
    runs, sweeps = [] if names else root.runs(), list[SweepDirectory]()
    for name in names:
        found = _sweep_or_run(root, name)
        if isinstance(found, SweepDirectory):
            sweeps.append(found)
            runs += [found.run(run_id) for run_id in found.manifest.run_ids]
        else:
            runs.append(found)
    roots = {run.path.parents[1]: RunsRoot(run.path.parents[1]) for run in runs}
    sweeps += [sweep for root in roots.values() for sweep in root.sweeps()]
    return list({run.path.resolve(): run for run in runs}.values()), sweeps


def _may_have_rows(run: RunDirectory) -> bool:
    try:
        return bool(run.rows())
    except DamagedFileError:  # its upload says so
        return True


def _sweep_or_run(root: RunsRoot, name: Path) -> SweepDirectory | RunDirectory:
    with suppress(UnknownSweepError):
        return root.find_sweep(name)
    try:
        return root.find_run(name)
    except UnknownRunError:
        known = ", ".join(sweep.path.name for sweep in root.sweeps()) or "none"
        message = f"no run and no sweep '{name}' in {root.path}; sweeps: {known}; `repa-lab status` lists runs"
        raise UnknownRunError(message) from None
