"""One run in a few numbers: where the compared metric ended, where it was best, and when it reached its targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repa_lab.report.statistics import Goal, steps_to_reach
from repa_lab.runs.files import Row


@dataclass(frozen=True)
class Compared:
    """What a sweep compares: the full name of a metric, its good direction, and values of metrics by full name to reach."""

    metric: str
    goal: Goal = "min"
    targets: Mapping[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Compared:
        """As a sweep's manifest has it."""
        compare = manifest["compare"]
        return cls(compare["metric"], "max" if compare["goal"] == "max" else "min", compare.get("targets") or {})


def headline(compared: Compared, rows: list[Row]) -> dict[str, Any]:
    """The headline of a run; empty until the compared metric was measured.

    Args:
        compared: what the run's sweep compares.
        rows: all metric rows of the run.

    Returns:
        ``metric`` by name; its ``final`` value; the ``best`` with its ``best_step``; and ``steps_to/<value>`` in
        optimizer steps, interpolated between measurements, for the metric's targets that were reached.
    """
    curve = {row["step"]: row[compared.metric] for row in rows if row.get(compared.metric) is not None}
    if not curve:
        return {}
    best = (min if compared.goal == "min" else max)(curve, key=lambda step: curve[step])
    targets = {
        value: steps_to_reach(curve, value, compared.goal) for value in compared.targets.get(compared.metric, [])
    }
    reached = {f"steps_to/{value:g}": steps for value, steps in targets.items() if steps is not None}
    return {"metric": compared.metric, "final": curve[max(curve)], "best": curve[best], "best_step": best, **reached}
