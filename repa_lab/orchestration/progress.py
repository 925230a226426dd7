"""The progress of a sweep while it runs: a live table, a notebook's bar, or a line per event."""

from __future__ import annotations

import html
import re
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from repa_lab.runs import RunStatus
from repa_lab.runs.files import Row

_REFRESH_PER_S = 4
_BAR_WIDTH = 24
_LINE_EVERY_S = 20.0
_NUMBERS = {  # by column: the metrics of which the first is shown, and its format
    "loss": (re.compile("loss/total"), ".3f"),
    "cosine": (re.compile("align/.*cosine"), ".3f"),
    "distance": (re.compile("(fid|frechet):.*"), ".1f"),
}


@dataclass
class _ShownRun:
    name: str
    steps: int
    begun: float = field(default_factory=time.monotonic)
    first_step: int | None = None
    row: Row = field(default_factory=dict)
    last_line: float = 0.0

    @property
    def step(self) -> int:
        return int(self.row.get("step", 0))

    @property
    def numbers(self) -> dict[str, tuple[str, str]]:
        """The metric's name and last value, by column."""
        shown = {}
        for column, (pattern, format_) in _NUMBERS.items():
            measured = ((name, value) for name, value in self.row.items() if value is not None)
            if number := next(((name, value) for name, value in measured if pattern.fullmatch(name)), None):
                shown[column] = (number[0], f"{number[1]:{format_}}")
        return shown

    def seconds_left(self) -> float | None:
        """Return the seconds left at the pace since this process took the run up."""
        done = self.step - (self.first_step or 0)
        return (time.monotonic() - self.begun) / done * (self.steps - self.step) if done > 0 else None


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
        self._begun, self._cell = time.monotonic(), None  # the output of a notebook's cell
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
        if self._counts[1]:
            self._show_bar(self._share(), f"{self._headline()} in {_duration(time.monotonic() - self._begun)}")

    def progress(self, activity: str, done: int, total: int) -> None:
        """Show how far the filling of a cache is."""
        if done == total and not self._console.is_jupyter:
            self.say(f"{activity}: {total:,} images cached")
        self._activity = (activity, done, total) if done < total else None
        self._show_bar(done / max(total, 1), f"{self._title}: {activity}: {done:,} of {total:,} images")

    def started(self, run_id: str, name: str, steps: int) -> None:
        """Show a run that was given to a worker."""
        self._runs[run_id] = _ShownRun(name, steps)

    def row(self, run_id: str, row: Row) -> None:
        """Show what a run measured."""
        if (run := self._runs.get(run_id)) is None:
            return
        if run.first_step is None:
            run.first_step = row["step"]
        run.row |= row
        now, has_lines = time.monotonic(), not (self._console.is_terminal or self._console.is_jupyter)
        if has_lines and now - run.last_line > _LINE_EVERY_S:
            run.last_line = now
            self._say_of(run, f"step {run.step}/{run.steps}")

    def finished(self, run_id: str, status: RunStatus, error: str | None) -> None:
        """Say how a run came to rest."""
        run = self._runs.pop(run_id)
        self._durations.append(time.monotonic() - run.begun)
        if error or not self._console.is_jupyter:
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
        self._show_bar(self._share(), ", ".join(filter(None, (self._headline(), self._footer()))))

    def _show_bar(self, share: float, text: str) -> None:
        """In a notebook, show what share of the work is done, from 0 to 1, in the place of the last bar."""
        if not self._console.is_jupyter:
            return
        from IPython import display  # a notebook has it

        filled = round(share * _BAR_WIDTH)
        bar = f'<progress value="{share:.4f}" style="width: {_BAR_WIDTH}em"></progress>'
        content = {
            "text/plain": f"{'█' * filled}{'░' * (_BAR_WIDTH - filled)} {text}",
            "text/html": f"<div>{bar} {html.escape(text)}</div>",
        }
        if self._cell is None:
            show: Any = display.display
            self._cell = show(content, raw=True, display_id=True)
        else:
            self._cell.update(content, raw=True)

    def _say_of(self, run: _ShownRun, event: str) -> None:
        numbers = (f"{name if column == 'distance' else column} {text}" for column, (name, text) in run.numbers.items())
        self.say(", ".join([f"{run.name}: {event}", *numbers]))

    def _share(self) -> float:
        """Return the share of the runs that is done; a run that goes on counts by its steps."""
        done, total = self._counts
        return min((done + sum(run.step / run.steps for run in self._runs.values())) / max(total, 1), 1.0)

    def _headline(self) -> str:
        return "{}: {} of {} runs done".format(self._title, *self._counts)

    def _render(self) -> Group:
        table = Table(title=self._headline(), title_justify="left")
        for column in ("run", "", "step", *_NUMBERS, "left"):
            table.add_column(column, justify="left" if column in ("run", "") else "right")
        for run in self._runs.values():
            numbers = (run.numbers.get(column, ("", "-"))[1] for column in _NUMBERS)
            bar, step = ProgressBar(run.steps, run.step, width=20), f"{run.step}/{run.steps}"
            table.add_row(Text(run.name), bar, step, *numbers, _duration(run.seconds_left()))
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


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=int(seconds)))
