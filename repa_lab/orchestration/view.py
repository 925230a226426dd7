"""What a person sees while a sweep runs: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from repa_lab.runs import RunStatus
from repa_lab.runs.files import Row

_REFRESH_PER_S = 4
_LINE_EVERY_S = 20.0


@dataclass
class _Watched:
    name: str
    steps: int
    begun: float = field(default_factory=time.monotonic)
    first_step: int | None = None
    row: Row = field(default_factory=dict)
    metric: tuple[str, float] | None = None
    said: float = 0.0

    @property
    def step(self) -> int:
        return int(self.row.get("step", 0))

    def eta(self) -> float | None:
        """Seconds left at the pace since this process took the run up."""
        done = self.step - (self.first_step or 0)
        if done <= 0:
            return None
        return (time.monotonic() - self.begun) / done * (self.steps - self.step)


class View:
    """Shows running runs with step, loss, cosine, the latest Frechet distance and the time left.

    Args:
        console: where to show it.
        title: the sweep's name.
        slots: how many runs go on at a time, for the time left of the whole.
    """

    def __init__(self, console: Console, title: str, slots: int) -> None:
        self._console, self._title, self._slots = console, title, slots
        self._runs: dict[str, _Watched] = {}
        self._lengths: list[float] = []
        self._task: tuple[str, int, int] | None = None
        self._counts = (0, 0)
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=_REFRESH_PER_S, transient=True
        )

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def progress(self, task: str, done: int, total: int) -> None:
        """A task of preparation went on."""
        if done == total:
            self.say(f"{task}: {total:,} images cached")
        self._task = (task, done, total) if done < total else None

    def started(self, run_id: str, name: str, steps: int) -> None:
        """A run was given to a worker."""
        self._runs[run_id] = _Watched(name, steps)

    def row(self, run_id: str, row: Row) -> None:
        """A run wrote a row."""
        watched = self._runs.get(run_id)
        if watched is None:
            return
        if watched.first_step is None:
            watched.first_step = row["step"]
        watched.row |= row
        for name, value in row.items():
            if name.startswith(("fid:", "frechet:")) and value is not None:
                watched.metric = (name, value)
        now = time.monotonic()
        if not self._console.is_terminal and now - watched.said > _LINE_EVERY_S:
            watched.said = now
            self._say(watched, f"step {watched.step}/{watched.steps}")

    def finished(self, run_id: str, status: RunStatus, error: str | None) -> None:
        """A run came to rest."""
        watched = self._runs.pop(run_id)
        self._lengths.append(time.monotonic() - watched.begun)
        self._say(watched, status.value + (f": {error}" if error else ""))

    def withdrawn(self, run_id: str) -> None:
        """A run was taken back before it began."""
        del self._runs[run_id]

    def say(self, what: str) -> None:
        """Something that a person should know."""
        self._console.print(Text(what), soft_wrap=True)  # names may hold what rich would take for markup

    def counts(self, done: int, total: int) -> None:
        """How many runs are done, of how many."""
        self._counts = (done, total)

    def _say(self, watched: _Watched, what: str) -> None:
        numbers = [f"loss {watched.row['loss/total']:.3f}"] if "loss/total" in watched.row else []
        if "align/cosine" in watched.row:
            numbers.append(f"cosine {watched.row['align/cosine']:.3f}")
        if watched.metric:
            numbers.append(f"{watched.metric[0]} {watched.metric[1]:.1f}")
        self.say(", ".join([f"{watched.name}: {what}", *numbers]))

    def _render(self) -> Group:
        table = Table(title=f"{self._title}: {self._counts[0]} of {self._counts[1]} runs done", title_justify="left")
        for column in ("run", "", "step", "loss", "cosine", "distance", "left"):
            table.add_column(column, justify="left" if column in ("run", "") else "right")
        for watched in self._runs.values():
            bar = ProgressBar(watched.steps, watched.step, width=20)
            table.add_row(Text(watched.name), bar, f"{watched.step}/{watched.steps}", *self._cells(watched))
        return Group(table, Text(self._foot(), style="dim"))

    def _cells(self, watched: _Watched) -> tuple[str, str, str, str]:
        def number(key: str) -> str:
            return f"{watched.row[key]:.3f}" if key in watched.row else "-"

        distance = f"{watched.metric[1]:.1f}" if watched.metric else "-"
        return number("loss/total"), number("align/cosine"), distance, _duration(watched.eta())

    def _foot(self) -> str:
        if self._task:
            return "{}: {:,} of {:,} images".format(*self._task)
        done, total = self._counts
        waiting = max(total - done - len(self._runs), 0)
        running = [eta for watched in self._runs.values() if (eta := watched.eta()) is not None]
        if not running or (waiting and not self._lengths):
            return ""
        typical = sum(self._lengths) / max(len(self._lengths), 1)
        return f"about {_duration(max(running) + waiting * typical / self._slots)} left in all"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
