"""What people see: the tables and sentences of `plan`, and the progress of a sweep while it runs."""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from repa_lab.orchestration.cost import GIB, UTILISATION, Estimate, PlannedCache, Share, rounded, trials_at_most
from repa_lab.orchestration.plan import BLOCKED, Match, Plan, PlannedRun
from repa_lab.runs import RunStatus
from repa_lab.runs.files import Row

_STATUSES = (*(status.value for status in reversed(RunStatus)), BLOCKED)  # what is over first
_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))
_REFRESH_PER_S = 4
_BAR_WIDTH = 24
_LINE_EVERY_S = 20.0


def arm_rows(estimate: Estimate) -> list[dict[str, Any]]:
    """Return a row for each arm, with the statuses of its runs; for an arm that is searched around, its trials."""
    experiment, rows = estimate.plan.experiment, []
    words = {arm.label: Counter[str]() for arm in experiment.arms}
    shares = dict.fromkeys(words, Share())
    for entry, share in zip(estimate.plan.runs, estimate.shares, strict=True):
        words[entry.arm.label][entry.word] += 1
        shares[entry.arm.label] += share
    for arm in experiment.arms:
        runs = ", ".join(f"{count} {word}" for word in _STATUSES if (count := words[arm.label][word]))
        left, trials = shares[arm.label], 1
        if experiment.search and arm.label in estimate.trials:
            left, trials = estimate.trials[arm.label], trials_at_most(arm, experiment.search)
            runs = f"{left.runs} at most"
        cost = estimate.costs[arm.label]
        rows.append(
            {
                "arm": arm.label,
                "runs": runs,
                **_left(left),
                "parameters": short(cost.parameters),
                "trained": short(cost.trained),
                "FLOPs/image": short(cost.image_flops),
                "GiB on GPU": _gib(cost.memory.total),
                "GiB on disk": _gib(cost.checkpoint_bytes * trials * len(experiment.seeds)),
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
            **_left(share),
        }
        for entry, share in zip(estimate.plan.runs, estimate.shares, strict=True)
    ]


def orphan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each run that the spec no longer asks for."""
    return [
        {"arm": run.label, "seed": run.seed, "run_id": run.run_id, "state": run.status.value} for run in plan.orphans
    ]


def sentences(estimate: Estimate) -> list[str]:
    """Return the total, the caches, the budget, and what the estimate rests on."""
    plan, total = estimate.plan, estimate.total
    search, budget, sharing = plan.experiment.search, plan.experiment.budget, plan.sharing
    lines: list[str] = []
    if search:
        fixed = ", ".join(f"'{label}'" for label in estimate.fixed)
        where = "each arm" + (f" but {fixed}, where that changes nothing" if fixed else "")
        counts = [trials_at_most(arm, search) for arm in plan.experiment.arms if arm.label in estimate.trials]
        number = f"{max(counts, default=1)} trials with {len(plan.experiment.seeds)} seeds each"
        settings = ", all settings of the space" if max(counts, default=search.trials) < search.trials else ""
        lines.append(f"searches {', '.join(search.space)} around {where}: {number}{settings}")
    runs, most = "run" if total.runs == 1 else "runs", " at most" if search else ""
    lines.append(
        f"{total.runs} {runs} to train{most}: {total.steps:,} steps, {short(total.images)} images, "
        f"{short(total.flops, 'FLOPs')}, {_hours(total.gpu_hours)} GPU h, {_gib(total.disk_bytes)} GiB of disk"
    )
    if sharing.forks:
        lines.append(
            f"{sharing.asked:,} steps are asked, {sharing.trained:,} have to be trained: {len(sharing.forks)} runs "
            "begin where another one was (--no-share trains each by itself)"
        )
    lines += map(_cache_line, estimate.caches)
    if estimate.caches and total.runs:
        lines.append(_saving(estimate))
    limits = {"GPU h": budget.gpu_hours, "GiB": budget.disk_gib}
    if given := [f"{limit:,.6g} {unit}" for unit, limit in limits.items() if limit is not None]:
        lines.append(f"budget: {', '.join(given)}")
    return [*lines, *plan.notes, *estimate.notes]


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
    texts = (": ".join(filter(None, ("blocked", problem.path, problem.message))) for problem in problems)
    return list(dict.fromkeys(texts))


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Return the whole estimate as plain data: hours of one GPU, bytes, FLOPs."""
    plan, experiment, total = estimate.plan, estimate.plan.experiment, estimate.total
    return {
        "name": experiment.name,
        "question": experiment.question,
        "runs": [_run_json(entry, share) for entry, share in zip(plan.runs, estimate.shares, strict=True)],
        "arms": [_arm_json(estimate, arm.label) for arm in experiment.arms],
        "steps": {"asked": plan.sharing.asked, "trained": plan.sharing.trained},
        "orphaned": [{**row, "orphaned": True} for row in orphan_rows(plan)],
        "caches": [
            {
                "what": planned.cache.what,
                "images": planned.images,
                "begun": planned.is_begun,
                "flops_per_image": planned.cache.image_flops,
                "bytes_per_image": planned.cache.image_bytes,
                "gpu_hours_left": planned.gpu_hours,
                "disk_bytes_left": planned.disk_bytes,
            }
            for planned in estimate.caches
        ],
        "total": {**_share_json(total), "runs": total.runs, "saved_gpu_hours": estimate.saved_hours},
        "budget": experiment.budget.model_dump(mode="json"),
        "assumed": {
            "device": estimate.device.name,
            "peak_flops": estimate.device.peak(estimate.options.precision),
            "options": {name: getattr(estimate.options, name) for name in experiment.run.automatic},
            "utilisation": UTILISATION,
        },
        "notes": [*plan.notes, *estimate.notes],
        "blocked": blocked_lines(plan),
    }


def short(number: float, unit: str = "") -> str:
    """Return a large number in three digits: ``4.1 M``, ``4.1 TFLOPs``."""
    for scale, letter in _SCALES:
        if number >= scale:
            return f"{number / scale:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _gib(value: float) -> str:
    return f"{value / GIB:,.0f}" if value >= 10 * GIB else f"{value / GIB:.2g}"


def _left(share: Share) -> dict[str, str]:
    return {"steps left": f"{share.steps:,}", "images left": short(share.images), "GPU h": _hours(share.gpu_hours)}


def _status_text(entry: PlannedRun) -> str:
    details = {RunStatus.RUNNING: f" at step {entry.step:,}", RunStatus.RESUMABLE: f" from step {entry.step:,}"}
    details[RunStatus.FAILED] = f" from step {entry.step:,}: {entry.error}" if entry.step else f": {entry.error}"
    return entry.word + ("" if entry.word == BLOCKED else details.get(entry.status, ""))


def _cache_line(planned: PlannedCache) -> str:
    cache, kib = planned.cache, rounded(planned.cache.image_bytes / 1024)
    if planned.images is None:
        return f"caches: {cache.what}, {short(cache.image_flops, 'FLOPs')} and {kib} KiB an image"
    filling = f"{_hours(planned.gpu_hours)} GPU h once, {_gib(planned.disk_bytes)} GiB"
    if planned.is_begun:
        filling = "begun already"
    return f"caches: {cache.what}, {planned.images:,} images x {kib} KiB ({filling})"


def _saving(estimate: Estimate) -> str:
    if estimate.saved_hours < 0:
        return f"filling the caches takes {_hours(-estimate.saved_hours)} GPU h more than they save in so few steps"
    net = "" if any(planned.images is None for planned in estimate.caches) else ", their own filling deducted"
    return f"caches save {_hours(estimate.saved_hours)} GPU h of encoding in every step{net}"


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


def _share_json(share: Share) -> dict[str, Any]:
    return {
        "images_left": share.images,
        "flops_left": share.flops,
        "gpu_hours_left": share.gpu_hours,
        "disk_bytes_left": share.disk_bytes,
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


@dataclass
class _ShownRun:
    name: str
    steps: int
    begun: float = field(default_factory=time.monotonic)
    first_step: int | None = None
    row: Row = field(default_factory=dict)
    distance: tuple[str, float] | None = None
    last_line: float = 0.0

    @property
    def step(self) -> int:
        return int(self.row.get("step", 0))

    def seconds_left(self) -> float | None:
        """Return the seconds left at the pace since this process took the run up."""
        done = self.step - (self.first_step or 0)
        if done <= 0:
            return None
        return (time.monotonic() - self.begun) / done * (self.steps - self.step)


class _NotebookBar:
    """A bar with a line of text in the output of a notebook's cell; every update takes the place of the last one."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, share: float, text: str) -> None:
        """Show what share of the work is done, from 0 to 1, beside a text."""
        from IPython import display  # a notebook has it

        filled = round(share * _BAR_WIDTH)
        bar = f'<progress value="{share:.4f}" style="width: {_BAR_WIDTH}em"></progress>'
        content = {
            "text/plain": f"{'█' * filled}{'░' * (_BAR_WIDTH - filled)} {text}",
            "text/html": f"<div>{bar} {html.escape(text)}</div>",
        }
        if self._handle is None:
            show: Callable[..., Any] = display.display
            self._handle = show(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def default_console() -> Console:
    """Return the console of a notebook's cell, or elsewhere one that shows nothing."""
    console = Console()
    return console if console.is_jupyter else Console(quiet=True)


class ProgressView:
    """Shows running runs: a live table on a terminal, a bar in a notebook, a line per event elsewhere.

    Args:
        slots: the number of runs that go on at a time, for the time left of the whole.
    """

    def __init__(self, console: Console, title: str, slots: int) -> None:
        self._console, self._title, self._slots = console, title, slots
        self._runs: dict[str, _ShownRun] = {}
        self._durations: list[float] = []
        self._activity: tuple[str, int, int] | None = None
        self._counts = (0, 0)
        self._begun, self._bar = time.monotonic(), _NotebookBar() if console.is_jupyter else None
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=_REFRESH_PER_S, transient=True
        )

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._bar and self._counts[1]:
            self._bar.show(self._share(), f"{self._headline()} in {_duration(time.monotonic() - self._begun)}")

    def progress(self, activity: str, done: int, total: int) -> None:
        """Show how far the filling of a cache is."""
        if done == total and not self._bar:
            self.say(f"{activity}: {total:,} images cached")
        self._activity = (activity, done, total) if done < total else None
        if self._bar:
            self._bar.show(done / max(total, 1), f"{self._title}: {activity}: {done:,} of {total:,} images")

    def started(self, run_id: str, name: str, steps: int) -> None:
        """Show a run that was given to a worker."""
        self._runs[run_id] = _ShownRun(name, steps)

    def row(self, run_id: str, row: Row) -> None:
        """Show what a run measured."""
        run = self._runs.get(run_id)
        if run is None:
            return
        if run.first_step is None:
            run.first_step = row["step"]
        run.row |= row
        for name, value in row.items():
            if name.startswith(("fid:", "frechet:")) and value is not None:
                run.distance = (name, value)
        now = time.monotonic()
        if not self._console.is_terminal and not self._bar and now - run.last_line > _LINE_EVERY_S:
            run.last_line = now
            self._say_of(run, f"step {run.step}/{run.steps}")

    def finished(self, run_id: str, status: RunStatus, error: str | None) -> None:
        """Say how a run came to rest."""
        run = self._runs.pop(run_id)
        self._durations.append(time.monotonic() - run.begun)
        if error or not self._bar:
            self._say_of(run, status.value + (f": {error}" if error else ""))

    def withdrawn(self, run_id: str) -> None:
        """Forget a run that was taken back before it began."""
        del self._runs[run_id]

    def say(self, line: str) -> None:
        """Print a line; names may hold what rich would take for markup."""
        self._console.print(Text(line), soft_wrap=True)

    def counts(self, done: int, total: int) -> None:
        """Show how many runs are done, and how many there are in all."""
        self._counts = (done, total)
        if self._bar:
            self._bar.show(self._share(), ", ".join(filter(None, (self._headline(), self._footer()))))

    def _say_of(self, run: _ShownRun, event: str) -> None:
        numbers = [f"loss {run.row['loss/total']:.3f}"] if "loss/total" in run.row else []
        if cosine := _cosine_name(run.row):
            numbers.append(f"cosine {run.row[cosine]:.3f}")
        if run.distance:
            numbers.append(f"{run.distance[0]} {run.distance[1]:.1f}")
        self.say(", ".join([f"{run.name}: {event}", *numbers]))

    def _share(self) -> float:
        """Return the share of the runs that is done; a run that goes on counts by its steps."""
        done, total = self._counts
        return min((done + sum(run.step / run.steps for run in self._runs.values())) / max(total, 1), 1.0)

    def _headline(self) -> str:
        return "{}: {} of {} runs done".format(self._title, *self._counts)

    def _render(self) -> Group:
        table = Table(title=self._headline(), title_justify="left")
        for column in ("run", "", "step", "loss", "cosine", "distance", "left"):
            table.add_column(column, justify="left" if column in ("run", "") else "right")
        for run in self._runs.values():
            keys = ("loss/total", _cosine_name(run.row))
            numbers = [f"{run.row[key]:.3f}" if key in run.row else "-" for key in keys]
            distance = f"{run.distance[1]:.1f}" if run.distance else "-"
            bar, step = ProgressBar(run.steps, run.step, width=20), f"{run.step}/{run.steps}"
            table.add_row(Text(run.name), bar, step, *numbers, distance, _duration(run.seconds_left()))
        return Group(table, Text(self._footer(), style="dim"))

    def _footer(self) -> str:
        if self._activity:
            return "{}: {:,} of {:,} images".format(*self._activity)
        done, total = self._counts
        waiting = max(total - done - len(self._runs), 0)
        typical = sum(self._durations) / len(self._durations) if self._durations else None
        running = [typical if (left := run.seconds_left()) is None else left for run in self._runs.values()]
        known = [seconds for seconds in running if seconds is not None]
        if (waiting and typical is None) or not (known or waiting):
            return ""
        return f"about {_duration(max(known, default=0.0) + waiting * (typical or 0.0) / self._slots)} left in all"


def _cosine_name(row: Row) -> str:
    """Return the name of the mean token cosine in a row, the first one of several regularizers; empty without any."""
    return next((name for name in row if name.startswith("align/") and name.endswith("cosine")), "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
