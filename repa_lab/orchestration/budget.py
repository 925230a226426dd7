"""The refusal of what would take more than a spec allows."""

from __future__ import annotations

from collections.abc import Iterator

from repa_lab.orchestration.estimate import GIB, Estimate, estimate, rounded
from repa_lab.orchestration.plan import Plan
from repa_lab.spec import Problem, SpecError


def require_budget(plan: Plan) -> None:
    """Refuse what would take more than the spec's budget.

    Raises:
        SpecError: at the limit that does not suffice, with both numbers.
    """
    budget = plan.experiment.budget
    if budget.gpu_hours is None and budget.disk_gib is None:
        return
    if problems := list(_over_budget(estimate(plan))):
        raise SpecError(problems)


def _over_budget(found: Estimate) -> Iterator[Problem]:
    experiment, total = found.plan.experiment, found.total
    needed = {"gpu_hours": (total.gpu_hours, "GPU hours"), "disk_gib": (total.disk_bytes / GIB, "GiB")}
    for name, (value, unit) in needed.items():
        limit = getattr(experiment.budget, name)
        if limit is not None and value > limit:
            advice = f"allow it with --set budget.{name}={_rounded_up(value)}, or ask for less; see `repa-lab plan`"
            message = f"what is left takes about {rounded(value)} {unit}, the budget is {limit:,.6g}: {advice}"
            yield experiment.problem(f"budget.{name}", message)


def _rounded_up(value: float) -> float:
    """A number of two digits that suffices."""
    nearest = float(f"{value:.2g}")
    return nearest if nearest >= value else float(f"{value * 1.1:.2g}")
