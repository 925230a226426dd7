"""What every block of runs' denoisers knows, at several times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repa_lab.cli.shared import JsonOption, RootOption, clean_errors, err, mistake, out, table
from repa_lab.runs.root import DEFAULT_ROOT

if TYPE_CHECKING:
    import pandas as pd

    from repa_lab.runs import RunDirectory
    from repa_lab.spec import EncoderSettings
    from repa_lab.training.profile import Request

PRECISIONS = ("fp32", "bf16", "fp16")


def profile(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Ids or folders; the others are set against the first.")
    ],
    timesteps: Annotated[str, typer.Option(help="From 0, data, to 1, noise.")] = "0.1,0.3,0.5,0.7,0.9",
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whom to compare with, or its settings as in a spec; else the run's own."),
    ] = None,
    weights: Annotated[str, typer.Option(help="ema (the averages that are measured) or last.")] = "ema",
    samples: Annotated[int | None, typer.Option(min=1, help="How many of the held-out images; else all.")] = None,
    metrics: Annotated[str, typer.Option(help="What to measure.")] = "cka,cknna,mutual_knn,lds,cds,rmsc",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16: what the run was trained in.")] = "fp32",
    root: RootOption = DEFAULT_ROOT,
    json_: JsonOption = False,
) -> None:
    """Measure what every block of a run knows of its encoder at several times, and draw it; of more runs the difference too."""
    with clean_errors():
        from repa_lab.runs import RunsRoot

        directories = [RunsRoot(root).find_run(run) for run in dict.fromkeys(runs)]
        from repa_lab.training.profile import Request, profile_run  # seconds, for torch; a mistyped run need not wait

        asked = Request(_numbers(timesteps), tuple(_words(metrics)), weights, samples, _encoder(encoder, directories))
        profiles = [profile_run(run, asked, _options(precision), RunsRoot(root).cache) for run in directories]
        if json_:
            _draw(directories)
            print(json.dumps(profiles))
            return
        for run in directories:
            _tell(run, asked)
        for path in _draw(directories):
            out.print(str(path), highlight=False, markup=False, soft_wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted(float(word) for word in _words(text)))
    except ValueError:
        raise mistake("--timesteps", f"expected numbers with commas between them, got '{text}'") from None


def _options(precision: str) -> Any:
    from repa_lab.spec import RunOptions

    if precision not in PRECISIONS:
        raise mistake("--precision", f"unknown precision '{precision}'; allowed: {', '.join(PRECISIONS)}")
    return RunOptions.model_validate({"precision": precision})


def _encoder(given: str | None, directories: Sequence[RunDirectory]) -> EncoderSettings | None:
    """The encoder that is named: with the settings under which one of the runs uses it, or else with the spec's defaults."""
    from repa_lab.spec import EncoderSettings
    from repa_lab.spec.document import Draft
    from repa_lab.spec.identity import Run
    from repa_lab.spec.validate import validate
    from repa_lab.spec.yaml import parse_scalar
    from repa_lab.training.profile import known_encoder

    if given is None:
        return None
    try:
        value = parse_scalar(given)
    except ValueError as error:
        raise mistake("--encoder", str(error)) from None
    if isinstance(value, dict):
        return validate(EncoderSettings, Draft(value))
    configs = [Run.from_json(run.run_id, run.spec).config for run in directories]
    return known_encoder(configs, given) or EncoderSettings(name=given)


def _tell(run: RunDirectory, asked: Request) -> None:
    from repa_lab.report.profile import load_profile, shown_metrics

    frame = load_profile(run)
    protocol, measured = frame.attrs["protocol"], frame.attrs["measured_block"]
    shown = shown_metrics([frame])
    rows = [_row(frame, timestep, shown, measured) for timestep in protocol["timesteps"]]
    told = f"{protocol['weights']} weights of step {protocol['step']:,}, {protocol['images']:,} held-out images"
    out.print(table(f"{run.run_id}: {told}, {protocol['encoder']['name']}", rows))
    aligned = frame.attrs["aligned_block"]
    out.print(f"aligned at block {aligned}" if aligned is not None else "not aligned", highlight=False)
    if missing := [metric for metric in asked.metrics if metric not in set(frame["metric"])]:
        out.print(f"the grid is too small for {', '.join(missing)}", highlight=False)


def _row(frame: pd.DataFrame, timestep: float, metrics: Sequence[str], measured: int | str) -> dict[str, Any]:
    """Of each metric the block where it is largest, and its value where the run measures itself."""
    row: dict[str, Any] = {"timestep": f"{timestep:g}"}
    for metric in metrics:
        values = frame[(frame["timestep"] == timestep) & (frame["metric"] == metric)].set_index("block")["value"]
        row[f"{metric}: best block"] = f"{values.idxmax()} ({values.max():.3f})"
        if measured in values.index:
            row[f"{metric} at {measured}"] = f"{values[measured]:.3f}"
    return row


def _draw(directories: Sequence[RunDirectory]) -> list[Path]:
    """A picture of each run, and of each but the first beside the first; why one cannot be drawn is said."""
    from repa_lab.report.figures import save
    from repa_lab.report.profile import profile_figure, why_not_comparable
    from repa_lab.runs.profiles import picture_of

    drawn = [save(profile_figure([run]), picture_of(run)) for run in directories]
    first, *others = directories
    for other in others:
        if reason := why_not_comparable(first, other):
            err.print(reason, highlight=False, markup=False, soft_wrap=True)
        else:
            drawn.append(save(profile_figure([first, other]), picture_of(other, first)))
    return drawn
