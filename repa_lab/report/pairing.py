"""Curves of an arm beside those of its baseline, measured as often as each other."""

from __future__ import annotations

from repa_lab.report.results import Results
from repa_lab.report.statistics import Curve, in_common
from repa_lab.report.summary import SeedCurves


def paired_curves(results: Results, arm: str, metric: str, axis: str = "step") -> tuple[SeedCurves, SeedCurves]:
    """The curves by seed of an arm of one sweep and of its baseline, as :func:`pair` leaves them.

    Args:
        results: of the sweep.
        arm: its label.
        metric: full name.
        axis: the measure of progress, a column of ``results.curves``.
    """
    sides = (arm, results.baselines[arm])
    curves = (results.seed_curves(label, metric, axis) for label in sides)
    places = (results.places(label, metric, axis) for label in sides)
    return pair(*curves, *places)


def pair(own: SeedCurves, other: SeedCurves, places: SeedCurves, others: SeedCurves) -> tuple[SeedCurves, SeedCurves]:
    """Two sides' curves over progress; where they were evaluated at other steps, a seed's are left those of
    :func:`repa_lab.report.statistics.in_common`.

    Args:
        own: value by progress.
        other: the same of the other side.
        places: progress by step of ``own``.
        others: the same of ``other``.
    """
    kept = {seed: in_common(places.get(seed, {}), others.get(seed, {})) for seed in own.keys() & other.keys()}
    return (
        {seed: _at(curve, places[seed], kept[seed][0]) if seed in kept else curve for seed, curve in own.items()},
        {seed: _at(curve, others[seed], kept[seed][1]) if seed in kept else curve for seed, curve in other.items()},
    )


def _at(curve: Curve, places: Curve, steps: set[float]) -> Curve:
    wanted = {place for step, place in places.items() if step in steps}
    return {place: value for place, value in curve.items() if place in wanted}
