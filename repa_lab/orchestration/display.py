"""What `plan` shows of a sweep: tables and sentences for people, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from repa_lab.orchestration.cost import GIB, UTILISATION, Estimate, PlannedCache, Share, rounded
from repa_lab.orchestration.plan import BLOCKED, Match, Plan, PlannedRun
from repa_lab.runs import RunStatus

_STATUSES = (*(status.value for status in reversed(RunStatus)), BLOCKED)  # what is over first
_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def arm_rows(estimate: Estimate) -> list[dict[str, Any]]:
    """Return a row for each arm, with the statuses of its runs; for an arm that is searched around, its trials."""
    plan, rows = estimate.plan, []
    words = Counter((entry.arm.label, entry.word) for entry in plan.runs)
    for label, cost in estimate.costs.items():
        left, trials = estimate.left[label], estimate.trials.get(label)
        runs = ", ".join(f"{count} {word}" for word in _STATUSES if (count := words[label, word]))
        rows.append(
            {
                "arm": label,
                "runs": runs if trials is None else f"{left.runs} at most",
                **_left(left),
                "parameters": short(cost.parameters),
                "trained": short(cost.trained),
                "FLOPs/image": short(cost.image_flops),
                "GiB on GPU": _coarse(cost.memory.total / GIB),
                "GiB on disk": _coarse(cost.checkpoint_bytes * (trials or 1) * len(plan.experiment.seeds) / GIB),
            }
        )
    return rows


def run_rows(estimate: Estimate) -> list[dict[str, Any]]:
    """Return a row for each run."""
    return [
        {
            "arm": entry.arm.label,
            "seed": entry.run.seed,
            "run_id": entry.run.run_id,
            "state": _status_text(entry),
            "steps": f"{entry.run.config.train.steps:,}",
            **_left(estimate.shares[entry.run.run_id]),
        }
        for entry in estimate.plan.runs
    ]


def orphan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each run that the spec no longer asks for."""
    return [
        {"arm": run.label, "seed": run.seed, "run_id": run.run_id, "state": plan.root.run(run.run_id).status().value}
        for run in plan.orphans
    ]


def sentences(estimate: Estimate) -> list[str]:
    """Return the total, the caches, the budget, and what the estimate rests on."""
    plan, total, trials, lines = estimate.plan, estimate.total, estimate.trials, list[str]()
    search, forks = plan.experiment.search, len(plan.forks)
    if search:
        fixed = ", ".join(f"'{label}'" for label in estimate.costs if label not in trials)
        where = "each arm" + (f" but {fixed}, where that changes nothing" if fixed else "")
        most = max(trials.values(), default=1)
        settings = ", all settings of the space" if trials and most < search.trials else ""
        number = f"{most} trials with {len(plan.experiment.seeds)} seeds each{settings}"
        lines.append(f"searches {', '.join(search.space)} around {where}: {number}")
    runs = f"{total.runs} {'run' if total.runs == 1 else 'runs'} to train{' at most' if search else ''}"
    lines.append(
        f"{runs}: {total.steps:,} steps, {short(total.images)} images, {short(total.flops, 'FLOPs')}, "
        f"{_coarse(total.gpu_hours)} GPU h, {_coarse(total.disk_bytes / GIB)} GiB of disk"
    )
    if forks:
        lines.append(
            f"{plan.steps['asked']:,} steps are asked, {plan.steps['trained']:,} have to be trained: {forks} runs "
            "begin where another one was (--no-share trains each by itself)"
        )
    lines += map(_cache_line, estimate.caches)
    if estimate.caches and total.runs:
        lines.append(_saving(estimate))
    limits = zip(plan.experiment.budget.model_dump().values(), ("GPU h", "GiB"), strict=True)
    if given := [f"{limit:,.6g} {unit}" for limit, unit in limits if limit is not None]:
        lines.append(f"budget: {', '.join(given)}")
    return [*lines, *estimate.notes]


def baseline_lines(plan: Plan) -> list[str]:
    """Return sentences on what every arm is compared with, and why with nothing; none for a search."""
    served: dict[str, list[str]] = {}
    unmatched: dict[str, list[str]] = {}
    for label, match in plan.baselines.items():
        if match.baseline is not None:
            served.setdefault(match.baseline, []).append(f"'{label}'")
        elif match.reason:
            unmatched.setdefault(match.reason, []).append(f"'{label}'")
    arms_of = {label: ", ".join(arms) for label, arms in served.items()}
    if len(served) == 1 and len(plan.baselines) > 2 and sum(map(len, served.values())) == len(plan.baselines) - 1:
        arms_of = dict.fromkeys(served, "every other arm")
    lines = [f"baseline: '{label}' for {arms}" for label, arms in arms_of.items()]
    return lines + [f"no baseline for {', '.join(arms)}: {reason}" for reason, arms in unmatched.items()]


def blocked_lines(plan: Plan) -> list[str]:
    """Return every reason why runs, or the whole sweep, cannot be trained here, once."""
    problems = filter(None, (plan.other_sweep, *(entry.blocked for entry in plan.runs)))
    return list(dict.fromkeys(": ".join(filter(None, ("blocked", one.path, one.message))) for one in problems))


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Return the whole estimate as plain data: hours of one GPU, bytes, FLOPs."""
    plan, experiment, total = estimate.plan, estimate.plan.experiment, estimate.total
    return {
        "name": experiment.name,
        "question": experiment.question,
        "runs": [_run_json(entry, estimate.shares[entry.run.run_id]) for entry in plan.runs],
        "arms": [_arm_json(estimate, label) for label in estimate.costs],
        "steps": plan.steps,
        "orphaned": [{**row, "orphaned": True} for row in orphan_rows(plan)],
        "caches": [asdict(cache) for cache in estimate.caches],
        "total": {**_share_json(total), "runs": total.runs, "saved_gpu_hours": estimate.total.saved_hours},
        "budget": experiment.budget.model_dump(mode="json"),
        "assumed": {
            "device": estimate.device.name,
            "peak_flops": estimate.device.peak(estimate.options.precision),
            "options": {name: getattr(estimate.options, name) for name in experiment.run.automatic},
            "utilisation": UTILISATION,
        },
        "notes": estimate.notes,
        "blocked": blocked_lines(plan),
    }


def short(number: float, unit: str = "") -> str:
    """Return a large number in three digits: ``4.1 M``, ``4.1 TFLOPs``."""
    scale, letter = next((known for known in _SCALES if number >= known[0]), (1, ""))
    return f"{number / scale:.3g} {letter}{unit}".rstrip()


def _coarse(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _left(share: Share) -> dict[str, str]:
    return {"steps left": f"{share.steps:,}", "images left": short(share.images), "GPU h": _coarse(share.gpu_hours)}


def _status_text(entry: PlannedRun) -> str:
    step = f" {'at' if entry.status is RunStatus.RUNNING else 'from'} step {entry.step:,}"
    if entry.word == RunStatus.FAILED:
        return f"{entry.word}{step if entry.step else ''}: {entry.error}"
    return entry.word + (step if entry.word in (RunStatus.RUNNING, RunStatus.RESUMABLE) else "")


def _cache_line(cache: PlannedCache) -> str:
    kib = f"{rounded(cache.bytes_per_image / 1024)} KiB"
    if cache.images is None:
        return f"caches: {cache.what}, {short(cache.flops_per_image, 'FLOPs')} and {kib} an image"
    filling = f"{_coarse(cache.gpu_hours_left)} GPU h once, {_coarse(cache.disk_bytes_left / GIB)} GiB"
    return f"caches: {cache.what}, {cache.images:,} images x {kib} ({'begun already' if cache.begun else filling})"


def _saving(estimate: Estimate) -> str:
    if estimate.total.saved_hours < 0:
        return (
            f"filling the caches takes {_coarse(-estimate.total.saved_hours)} GPU h more than they save in so few steps"
        )
    net = "" if any(cache.images is None for cache in estimate.caches) else ", their own filling deducted"
    return f"caches save {_coarse(estimate.total.saved_hours)} GPU h of encoding in every step{net}"


def _share_json(share: Share) -> dict[str, float]:
    return {f"{name}_left": getattr(share, name) for name in ("images", "flops", "gpu_hours", "disk_bytes")}


def _run_json(entry: PlannedRun, share: Share) -> dict[str, Any]:
    blocked = entry.blocked.message if entry.blocked else None
    return {
        "arm": entry.arm.label,
        "seed": entry.run.seed,
        "run_id": entry.run.run_id,
        "state": entry.word,
        "steps": entry.run.config.train.steps,
        "steps_left": entry.steps_left,
        "blocked": blocked,
        "reason": blocked if entry.word == BLOCKED else entry.error,
        "from_step": entry.step,
        **_share_json(share),
    }


def _arm_json(estimate: Estimate, label: str) -> dict[str, Any]:
    cost, speed = estimate.costs[label], estimate.speeds[label]
    match = estimate.plan.baselines.get(label, Match())
    return {
        "arm": label,
        "baseline": match.baseline,
        "unmatched": match.reason or None,
        "parameters": cost.parameters,
        "trained_parameters": cost.trained,
        "flops_per_image": cost.image_flops,
        "encoder_flops_per_image": sum(one.active * one.encoder_flops for one in cost.regularizers),
        "flops_per_evaluation": cost.evaluation_flops,
        "memory_bytes": {**vars(cost.memory), "total": cost.memory.total},
        "checkpoint_bytes": cost.checkpoint_bytes,
        "seconds_per_image": speed.image,
        "seconds_per_evaluation": speed.evaluation,
        "measured_on_runs": speed.runs,
    }
