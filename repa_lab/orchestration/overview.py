"""What `plan` shows: rows for people, one an arm or one a run, and everything as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from repa_lab.orchestration.estimate import GIB, Estimate, PlannedCache, Share, rounded
from repa_lab.orchestration.plan import BLOCKED, PlannedRun
from repa_lab.orchestration.speed import UTILISATION
from repa_lab.runs import RunStatus

# From what is over to what is not.
_ORDER = (*(status.value for status in reversed(RunStatus)), BLOCKED)
_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def arm_rows(found: Estimate) -> list[dict[str, Any]]:
    """A row an arm, its runs' states counted; of a search, its trials."""
    rows = []
    for label, members in _members(found).items():
        left, trials = sum((share for _, share in members), Share()), found.trials.get(label)
        words = Counter(entry.word for entry, _ in members)
        states = ", ".join(f"{words[word]} {word}" for word in _ORDER if words[word])
        runs = states if trials is None else f"{trials.runs} at most"
        rows.append({"arm": label, "runs": runs, **_left(trials or left), **_of_arm(found, label)})
    return rows


def run_rows(found: Estimate) -> list[dict[str, Any]]:
    """A row a run."""
    return [
        {
            "arm": entry.arm.label,
            "seed": entry.run.seed,
            "run_id": entry.run.run_id,
            "state": _state(entry),
            "steps": f"{entry.run.config.train.steps:,}",
            **_left(share),
        }
        for entry, share in zip(found.plan.runs, found.shares, strict=True)
    ]


def orphan_rows(found: Estimate) -> list[dict[str, Any]]:
    """A row a run that the spec asks for no more."""
    return [
        {"arm": one.label, "seed": one.seed, "run_id": one.run_id, "state": one.status.value, "orphaned": True}
        for one in found.plan.orphans
    ]


def sentences(found: Estimate) -> list[str]:
    """The total, the caches, the budget, and what all of it rests on."""
    total, experiment = found.total, found.plan.experiment
    budget, search = experiment.budget, experiment.search
    most, lines = " at most" if search else "", list[str]()
    runs = "run" if total.runs == 1 else "runs"
    if search:
        what = f"{search.trials} trials with {len(experiment.seeds)} seeds each"
        lines.append(f"searches {', '.join(search.space)} around each arm{_but(found.fixed)}: {what}")
    lines += [
        f"{total.runs} {runs} to train{most}: {total.steps:,} steps, {short(total.images)} images, "
        f"{short(total.flops, 'FLOPs')}, {hours(total.gpu_hours)} GPU h, {gib(total.disk_bytes)} GiB of disk"
    ]
    sharing = found.plan.sharing
    if sharing.forks:
        lines.append(
            f"{sharing.asked:,} steps are asked, {sharing.trained:,} have to be trained: {len(sharing.forks)} runs begin where"
            " another one was (--no-share trains each by itself)"
        )
    lines += [_cache_line(one) for one in found.caches]
    if found.caches and total.runs:
        lines.append(_saving(found))
    limits = {"GPU h": budget.gpu_hours, "GiB": budget.disk_gib}
    if given := [f"{limit:,.6g} {unit}" for unit, limit in limits.items() if limit is not None]:
        lines.append(f"budget: {', '.join(given)}")
    return [*lines, *found.plan.notes, *found.notes]


def as_json(found: Estimate) -> dict[str, Any]:
    """All of it as plain data: hours on one GPU, bytes, FLOPs."""
    experiment, budget = found.plan.experiment, found.plan.experiment.budget
    return {
        "name": experiment.name,
        "question": experiment.question,
        "runs": [_run_json(*pair) for pair in zip(found.plan.runs, found.shares, strict=True)],
        "arms": [_arm_json(found, arm.label) for arm in experiment.arms],
        "steps": {"asked": found.plan.sharing.asked, "trained": found.plan.sharing.trained},
        "orphaned": orphan_rows(found),
        "caches": [_cache_json(one) for one in found.caches],
        "total": {**_share_json(found.total), "runs": found.total.runs, "saved_gpu_hours": found.saved_hours},
        "budget": budget.model_dump(mode="json"),
        "assumed": {
            "device": found.device.name,
            "peak_flops": found.device.peak(experiment.run.precision),
            "utilisation": UTILISATION,
        },
        "notes": [*found.plan.notes, *found.notes],
    }


def short(number: float, unit: str = "") -> str:
    """A large number in three digits: ``4.1 M``, ``4.1 TFLOPs``."""
    for scale, letter in _SCALES:
        if number >= scale:
            return f"{number / scale:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _but(fixed: Sequence[str]) -> str:
    named = ", ".join(f"'{label}'" for label in fixed)
    return f" but {named}, where that changes nothing" if fixed else ""


def _saving(found: Estimate) -> str:
    if found.saved_hours < 0:
        return f"filling the caches takes {hours(-found.saved_hours)} GPU h more than they save in so few steps"
    net = "" if any(one.images is None for one in found.caches) else ", their own filling deducted"
    return f"caches save {hours(found.saved_hours)} GPU h of encoding in every step{net}"


def hours(value: float) -> str:
    """Hours for people; two digits below ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def gib(value: float) -> str:
    """Bytes in GiB for people."""
    return f"{value / GIB:,.0f}" if value >= 10 * GIB else f"{value / GIB:.2g}"


def _members(found: Estimate) -> dict[str, list[tuple[PlannedRun, Share]]]:
    members: dict[str, list[tuple[PlannedRun, Share]]] = {arm.label: [] for arm in found.plan.experiment.arms}
    for entry, share in zip(found.plan.runs, found.shares, strict=True):
        members[entry.arm.label].append((entry, share))
    return members


def _left(share: Share) -> dict[str, str]:
    return {"steps left": f"{share.steps:,}", "images left": short(share.images), "GPU h": hours(share.gpu_hours)}


def _of_arm(found: Estimate, label: str) -> dict[str, str]:
    cost = found.costs[label]
    return {
        "parameters": short(cost.parameters),
        "trained": short(cost.trained),
        "FLOPs/image": short(cost.image_flops),
        "GiB on GPU": gib(cost.memory.total),
        "GiB on disk": gib(cost.checkpoint_bytes * _runs(found, label)),
    }


def _runs(found: Estimate, label: str) -> int:
    """How many runs an arm has in all."""
    experiment = found.plan.experiment
    trials = experiment.search.trials if experiment.search and label in found.trials else 1
    return trials * len(experiment.seeds)


def _state(entry: PlannedRun) -> str:
    at = {RunStatus.RUNNING: f" at step {entry.step:,}", RunStatus.RESUMABLE: f" from step {entry.step:,}"}
    at[RunStatus.FAILED] = f" from step {entry.step:,}: {entry.error}" if entry.step else f": {entry.error}"
    return entry.word + ("" if entry.word == BLOCKED else at.get(entry.status, ""))


def _cache_line(one: PlannedCache) -> str:
    cache = one.cache
    if one.images is None:
        return f"caches: {cache.what}, {short(cache.image_flops, 'FLOPs')} and {rounded(cache.image_bytes / 1024)} KiB an image"
    kept = f"{one.images:,} images x {rounded(cache.image_bytes / 1024)} KiB"
    filled = "begun already" if one.is_begun else f"{hours(one.gpu_hours)} GPU h once, {gib(one.disk_bytes)} GiB"
    return f"caches: {cache.what}, {kept} ({filled})"


def _run_json(entry: PlannedRun, share: Share) -> dict[str, Any]:
    return {
        "arm": entry.arm.label,
        "seed": entry.run.seed,
        "run_id": entry.run.run_id,
        "state": entry.word,
        "steps": entry.run.config.train.steps,
        "steps_left": entry.steps_left,
        "blocked": entry.blocked.message if entry.blocked else None,
        "reason": entry.blocked.message if entry.word == BLOCKED and entry.blocked else entry.error,
        "from_step": entry.step,
        **_share_json(share),
    }


def _share_json(share: Share) -> dict[str, Any]:
    return {
        "images_left": share.images,
        "flops_left": share.flops,
        "gpu_hours_left": share.gpu_hours,
        "disk_bytes_left": share.disk_bytes,
    }


def _arm_json(found: Estimate, label: str) -> dict[str, Any]:
    cost, speed = found.costs[label], found.speeds[label]
    return {
        "arm": label,
        "parameters": cost.parameters,
        "trained_parameters": cost.trained,
        "flops_per_image": cost.image_flops,
        "encoder_flops_per_image": cost.active * cost.encoder_flops,
        "flops_per_evaluation": cost.evaluation_flops,
        "memory_bytes": {**vars(cost.memory), "total": cost.memory.total},
        "checkpoint_bytes": cost.checkpoint_bytes,
        "seconds_per_image": speed.image,
        "seconds_per_evaluation": speed.evaluation,
        "measured_on_runs": speed.runs,
    }


def _cache_json(one: PlannedCache) -> dict[str, Any]:
    return {
        "what": one.cache.what,
        "images": one.images,
        "begun": one.is_begun,
        "flops_per_image": one.cache.image_flops,
        "bytes_per_image": one.cache.image_bytes,
        "gpu_hours_left": one.gpu_hours,
        "disk_bytes_left": one.disk_bytes,
    }


def blocked_lines(entries: Iterable[PlannedRun]) -> list[str]:
    """Every reason that stands in the way, once."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry.blocked:
            reasons.setdefault(f"{entry.blocked.path}: {entry.blocked.message}", []).append(entry.arm.label)
    return [f"blocked: {reason}" for reason in reasons]
