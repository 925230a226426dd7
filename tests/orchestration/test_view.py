"""What a person sees of a sweep: names as they are written."""

import io

from rich.console import Console

from repa_lab.orchestration.progress import ProgressView
from repa_lab.runs import State

NAME = "with [/x] and [red]not[/red] :100:, seed 0"


def test_a_name_is_shown_as_it_is_written(tmp_path):
    seen = io.StringIO()
    with ProgressView(Console(file=seen, width=200), "tiny", 1) as view:
        view.progress(NAME, 3, 3)
        view.started("abc", NAME, 6)
        view.row("abc", {"step": 1, "loss/total": 0.5})
        view.finished("abc", State.DONE, None)
    assert seen.getvalue().splitlines() == [
        f"{NAME}: 3 images cached",
        f"{NAME}: step 1/6, loss 0.500",
        f"{NAME}: done, loss 0.500",
    ]


def test_the_live_table_shows_it_too():
    seen = io.StringIO()
    console = Console(file=seen, width=200)
    view = ProgressView(console, "tiny", 1)
    view.started("abc", NAME, 6)
    console.print(view._render())
    assert NAME in seen.getvalue()


def test_the_time_left_is_shown_between_two_runs_and_not_after_the_last():
    view = ProgressView(Console(quiet=True), "tiny", 2)
    view.counts(0, 5)
    assert view._footer() == ""
    view.started("abc", NAME, 6)
    view._runs["abc"].begun -= 100
    view.finished("abc", State.DONE, None)
    view.counts(1, 5)
    assert view._footer() == "about 0:03:20 left in all"  # 4 runs of 100 s in 2 slots
    view.started("def", NAME, 6)
    assert view._footer() == "about 0:04:10 left in all"  # one that has told nothing, and 3 that wait
    view.counts(5, 5)
    view.withdrawn("def")
    assert view._footer() == ""
