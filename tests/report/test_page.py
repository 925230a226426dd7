from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from repa_lab.report import ReportPaths, ResultsError, write_report
from repa_lab.runs import RunsRoot, State, SweepDirectory

from .conftest import METRIC, STEPS, Build, FakeArm, FakeRun, build_quickstart, builder, constant_runs


class Outline(HTMLParser):
    """Text, image sources and the tags left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.images, self.links, self.open = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    """The report on the quick start; drawing takes its time, so it is written once."""
    return write_report(build_quickstart(builder(RunsRoot(tmp_path_factory.mktemp("page") / "runs"))))


@pytest.fixture
def troubled(build: Build) -> SweepDirectory:
    """A sweep with a failure, a straggler, a run that never started, targets and awkward names."""
    failed = FakeRun(2, {100: 30.0}, State.FAILED, "OutOfMemoryError: tried <3 GiB> | on cuda:0")
    arms = [
        FakeArm("base", constant_runs([20.0, 21.0, 22.0])),
        FakeArm("w|1", [*constant_runs([10.0, 12.0]), failed], "base"),
        FakeArm("<w2>", [FakeRun(0, {100: 9.0}, State.RUNNING), 1], "base"),
    ]
    return build(arms, targets={METRIC: [15.0, 5.0]})


def test_everything_is_written_into_the_sweep(written: ReportPaths) -> None:
    sweep = written.html.parent
    assert written.markdown == sweep / "report.md"
    assert written.figures == (sweep / "figures" / "convergence.png", sweep / "figures" / "alignment.png")
    assert all(path.stat().st_size > 1000 for path in (*written.figures, written.markdown, written.html))
    assert not [path for path in sweep.rglob("*") if path.name.endswith(".tmp")]


def test_the_html_needs_nothing_outside_it(written: ReportPaths) -> None:
    page = Outline(written.html.read_text())
    assert page.open == []
    assert len(page.images) == 2 + 4
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert page.links == []


def test_markdown_images_exist(written: ReportPaths) -> None:
    text = written.markdown.read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(links) == 6
    assert all((written.markdown.parent / link).is_file() for link in links)


def test_question_answer_protocol_and_provenance(written: ReportPaths) -> None:
    for text in (written.markdown.read_text(), Outline(written.html.read_text()).text):
        assert "Does it help?" in text
        assert "95 % interval of the paired difference" in text
        assert "n = 3 seeds" in text
        assert "It is not FID" in text
        assert "torch 2.9.0" in text
        assert "commit 0123456789ab" in text
        assert "2 CPU cores" in text
        assert "There are 2 comparisons" in text


def test_markdown_tables_are_rectangular(troubled: SweepDirectory) -> None:
    text = write_report(troubled).markdown.read_text()
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_failures_are_prominent(troubled: SweepDirectory) -> None:
    paths = write_report(troubled)
    html = paths.html.read_text()
    alert = html[html.index('role="alert"') :].split("</div>")[0]
    assert "w|1: seed 2 failed at step 100 (OutOfMemoryError: tried &lt;3 GiB&gt; | on cuda:0)." in alert
    assert "&lt;w2&gt;: seed 0 is running at step 100; seed 1 has not started." in alert
    assert "<w2>" not in html
    assert "## Incomplete arms" in paths.markdown.read_text()


def test_targets(troubled: SweepDirectory) -> None:
    text = write_report(troubled).markdown.read_text()
    assert f"| {METRIC} | 15 | w\\|1 | 100 | 2 of 3 |" in text
    assert f"| {METRIC} | 5 | base | not reached | 0 of 3 |" in text


def test_a_sweep_that_has_not_started(build: Build) -> None:
    paths = write_report(build([FakeArm("base", [0]), FakeArm("arm", [0], "base")]))
    assert paths.figures == ()
    assert "No evaluation has finished yet." in paths.markdown.read_text()
    assert "No run has started" in paths.html.read_text()


def test_a_search_lists_its_trials_best_first(build: Build) -> None:
    facts = [("t0", "complete", 3.0), ("t1", "complete", 2.0), ("t2", "pruned", 1.0), ("t3", "failed", None)]
    trials = [{"arm": a, "state": s, "value": v, "params": {"regularizer.weight": 0.12345}} for a, s, v in facts]
    arms = [FakeArm(arm, [FakeRun(0, dict.fromkeys(STEPS, value or 9.0))]) for arm, _, value in facts]
    sweep = build(arms, search={"metric": METRIC, "goal": "min", "trials": trials})
    text = write_report(sweep).markdown.read_text()
    rows = re.findall(r"^\| \d \| (t\d) \|.*$", text, flags=re.MULTILINE)
    assert rows == ["t1", "t0", "t2", "t3"]
    assert "| 1 | t1 | complete | 2.000 | 0.1235 |" in text
    assert "Best of 2 completed trials (4 in all): t1" in text


def test_the_summary_groups_metrics_and_puts_the_compared_one_first(written: ReportPaths) -> None:
    lines = written.markdown.read_text().split("## Summary")[1].split("## Convergence")[0].strip().splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == (
        4 * [METRIC] + 4 * ["heldout/cka"] + 2 * ["heldout/cosine"] + 2 * ["heldout/gap"]
    )


def test_writing_again_replaces(build: Build) -> None:
    sweep = build([FakeArm("arm", constant_runs([1.0]))])
    first = write_report(sweep).html.read_bytes()
    assert write_report(sweep).html.read_bytes() == first


def test_a_sweep_that_was_never_recorded(root: RunsRoot) -> None:
    with pytest.raises(ResultsError, match="no results at"):
        write_report(root.sweep("nothing"))
