"""How the numbers of a report came about, in words: protocols, intervals, comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import pandas as pd

from repa_lab.report.results import Results
from repa_lab.report.statistics import MIN_BOOTSTRAP
from repa_lab.report.summary import comparisons, is_protocol
from repa_lab.spec.schema import EmaConfig

_PROTOCOL = re.compile(r"(?P<kind>[^:]+):(?P<extractor>[^@]+)@(?P<samples>\d+k?)/(?P<sampler>.+)")


def measured_how(results: Results) -> list[str]:
    """A line on every protocol in use, on averages of too few steps, and on how arms were compared."""
    metrics = dict.fromkeys(metric for metric in results.summary["metric"] if is_protocol(metric))
    return [
        *(_protocol(metric) + _bias(results, metric) for metric in metrics),
        *_averages(results),
        *_comparisons(results),
    ]


def _protocol(metric: str) -> str:
    parts = _PROTOCOL.fullmatch(metric)
    if parts is None:
        return f"{metric}: comparable only with values of this very name."
    made = f"{parts['samples']} generated samples ({parts['sampler']})"
    if parts["kind"] == "fid":
        return f"{metric}: FID of {made}. It depends on the number of samples: compare it only with FIDs of as many."
    if parts["kind"] == "frechet":
        features = f"Frechet distance between {parts['extractor']} features of {made} and of the reference images"
        return f"{metric}: {features}. It is not FID and cannot be set beside published FIDs."
    return f"{metric}: {parts['kind']} with {parts['extractor']} on {made}."


def _bias(results: Results, metric: str) -> str:
    """What is to be said of a Frechet distance over fewer samples than features, as the runs recorded them."""
    known = [held.get(metric, {}) for held in results.protocols.by_run.values()]
    recorded = [one for one in known if all(isinstance(one.get(key), int) for key in ("samples", "real", "features"))]
    sides = [(min(one["samples"], one["real"] or one["samples"]), one["features"]) for one in recorded]
    few = next(((count, width) for count, width in sides if count <= width), None)
    if few is None:
        return ""
    count, width = few
    biased = "leave a covariance singular, and the distance biased upward: it ranks, no more."
    return f" {count} images for {width} features {biased}"


def _averages(results: Results) -> Iterator[str]:
    """Warn of averages of the weights that still hold much of the initial ones."""
    columns = [name for name in ("train.steps", *_EMA) if name in results.runs]
    found: dict[str, None] = {}
    for run in results.runs[columns].to_dict("records"):
        with suppress(ValueError, TypeError):  # of a damaged spec.json
            given = {field: run[name] for name, field in _EMA.items() if pd.notna(run.get(name))}
            if given and (warning := EmaConfig.model_validate(given).warning(int(run["train.steps"]))):
                found[f"{warning}."] = None
    yield from found


# The columns of a run's averaging, which is a number or a section.
_EMA = {"train.ema": "decay", "train.ema.decay": "decay", "train.ema.warmup": "warmup"}


def _comparisons(results: Results) -> Iterator[str]:
    yield (
        "An arm and its baseline are compared at equal progress: the last step that all measured runs of both have. "
        "Intervals are 95 % Student-t intervals over seeds; differences are taken seed by seed, for arms share seeds. "
        f"Bands of curves are bootstrap intervals from {MIN_BOOTSTRAP} seeds on and Student-t intervals below."
    )
    yield (
        "Pairing r is the correlation of arm and baseline over the seeds, from three seeds on: near 1, pairing has taken away "
        "most of what seeds add to both; below 0 it has widened the interval."
    )
    yield (
        "One seed has no interval and two are insufficient. A difference is called resolved if at least three seeds were "
        "paired and Holm's p is below 0.05. How much sooner compares the steps at which the arm and the baseline itself first "
        "reach the baseline's final value, interpolated between evaluations that both have, over the seeds in which both do: "
        "the geometric mean of the seeds' ratios, with the Student-t interval of their logarithms."
    )
    compared = comparisons(results.runs).get(results.name, 0)
    if compared > 1:
        yield (
            f"There are {compared} comparisons of each metric, those not measured yet included: Holm's p holds for all of them "
            "at once, the intervals are each arm's own and are not widened for that. Metrics are not corrected for each other."
        )
