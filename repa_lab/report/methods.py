"""How the numbers of a report came about, in words: protocols, intervals, and what the runs were made with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from repa_lab.report.results import Results
from repa_lab.report.summary import is_protocol

_PROTOCOL = re.compile(r"(?P<kind>[^:]+):(?P<extractor>[^@]+)@(?P<samples>\d+)/(?P<sampler>.+)")


def measured_how(results: Results) -> list[str]:
    """A line on every protocol in use, and on how arms were compared."""
    metrics = dict.fromkeys(metric for metric in results.summary["metric"] if is_protocol(metric))
    return [*(_protocol(metric) for metric in metrics), *_comparisons(results)]


def made_with(provenances: Iterable[dict[str, Any]]) -> list[str]:
    """Packages, code and machines of the runs; what differs between runs is listed side by side."""
    provenances = list(provenances)
    if not provenances:
        return ["No run has started, so there is nothing to say of code and machine."]
    packages = dict.fromkeys(name for one in provenances for name in one["packages"])
    versions = [f"{name} {_distinct(one['packages'].get(name, 'absent') for one in provenances)}" for name in packages]
    machine = _distinct(f"{one['platform']}, {one['cpus']} CPU cores, Python {one['python']}" for one in provenances)
    return [
        f"Packages: {', '.join(versions)}.",
        f"Code: {_distinct(_code(one['git']) for one in provenances)}.",
        f"Machine: {machine}.",
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


def _comparisons(results: Results) -> Iterator[str]:
    yield (
        "An arm and its baseline are compared at equal progress: the last step that all measured runs of both have. "
        "Intervals are 95 % Student-t intervals over seeds; differences are taken seed by seed, for arms share seeds."
    )
    yield (
        "A difference is called resolved if at least three seeds were paired and its interval excludes 0. How much "
        "sooner compares the steps at which the arm and the baseline itself first reach the baseline's final value, "
        "interpolated between evaluations."
    )
    compared = sum(baseline is not None for baseline in results.baselines.values())
    if compared > 1:
        yield (
            f"There are {compared} comparisons and their intervals are not widened for that: "
            "the more comparisons, the likelier that some interval excludes 0 by chance."
        )


def _code(git: dict[str, Any] | None) -> str:
    if git is None:
        return "not from a git checkout"
    return f"commit {git['commit'][:12]}" + (" with uncommitted changes" if git["dirty"] else "")


def _distinct(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))
