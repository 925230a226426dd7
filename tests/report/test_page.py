from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from repa_lab.report import curves, write_report
from repa_lab.report.page import Report
from repa_lab.report.results import ResultsError
from repa_lab.runs import RunsRoot, RunWriter, State

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
        if tag not in ("meta", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report on the quick start; drawing takes its time, so it is written once."""
    return write_report(build_quickstart(builder(RunsRoot(tmp_path_factory.mktemp("page") / "runs"))))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A sweep with a failure, a straggler, runs that never started, a damaged file of each kind, targets and awkward names."""
    root = RunsRoot(tmp_path_factory.mktemp("troubled") / "runs")
    failed = FakeRun(2, {100: 30.0}, State.FAILED, "OutOfMemoryError: tried <3 GiB> | on cuda:0")
    hurt = FakeRun(1, dict.fromkeys(STEPS, 12.0), run_id="hurt")
    arms = [
        FakeArm("base", constant_runs([20.0, 21.0, 22.0])),
        FakeArm("w|1", [*constant_runs([10.0]), hurt, failed], "base"),
        FakeArm("<w2>", [FakeRun(0, {100: 9.0}, State.RUNNING), 1], "base"),
        FakeArm("100 % & $5_{a}^b~\\", constant_runs([19.0, 20.1, 21.0]), "base"),
    ]
    sweep = builder(root)(arms, targets={METRIC: [15.0, 5.0]})
    with (root.run("hurt").path / "metrics.jsonl").open("a") as file:
        file.write("<script>alert(1)</script>\n")
    (root.run("hurt").path / "provenance.json").write_text("[")
    grid = max(root.run("hurt").sample_grids().values())
    grid.write_bytes(b"no picture")
    for path in root.run("hurt").path.parent.glob("*/samples/*.png"):
        if path.parent.parent.name != "hurt":
            path.unlink()
    return write_report(sweep)


def test_everything_is_written_into_the_sweep(written: Report) -> None:
    sweep = written.html.parent
    assert (written.html, written.markdown, written.latex) == tuple(
        sweep / f"report.{kind}" for kind in ("html", "md", "tex")
    )
    panels = {"differences": 1, "convergence": 2, "convergence_images": 2, "convergence_hours": 2, "alignment": 6}
    names = [f"{name}_{place}" if place else name for name, count in panels.items() for place in range(count)]
    assert written.figures == tuple(sweep / "figures" / f"{name}.svg" for name in names)
    assert written.all == (written.html, written.markdown, written.latex, *written.figures)
    assert all(path.stat().st_size > 1000 for path in written.all)
    assert not [path for path in sweep.rglob("*") if path.name.endswith(".tmp")]


def test_the_html_needs_nothing_outside_it(written: Report) -> None:
    text = written.html.read_text()
    page = Outline(text)
    assert page.open == []
    assert len(page.images) == 4 * 2  # arms by the two last steps
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(ids)
    assert text.count("<svg") == 1 + 3 * 2 + 6  # differences, convergence by three measures of progress, alignment


def test_markdown_images_exist(written: Report) -> None:
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", written.markdown.read_text())
    assert len(links) == 13 + 4 * 2
    assert all((written.markdown.parent / link).is_file() for link in links)


def test_question_answer_protocol_and_provenance(written: Report) -> None:
    for text in (written.markdown.read_text(), Outline(written.html.read_text()).text):
        assert "Does it help?" in text
        assert "Of 2 compared arms: " in text
        assert "95 % interval of the paired difference" in text
        assert "n = 3 seeds" in text
        assert "It is not FID" in text
        assert "0123456789abcdef" in text
        assert "There are 2 comparisons" in text
    assert re.search(r"\| packages.torch \| 2.9.0 \| 12 \|", written.markdown.read_text())


def test_markdown_tables_are_rectangular(written: Report, troubled: Report) -> None:
    for paths in (written, troubled):
        tables = re.findall(r"(?:^\|.*\|\n)+", paths.markdown.read_text(), flags=re.MULTILINE)
        assert len(tables) >= 6
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_failures_are_prominent(troubled: Report) -> None:
    html = troubled.html.read_text()
    alert = html[html.index('role="alert"') :].split("</div>")[0]
    assert "w|1: seed 2 failed at step 100 (OutOfMemoryError: tried &lt;3 GiB&gt; | on cuda:0)." in alert
    assert "&lt;w2&gt;: seed 0 is resumable at step 100; seed 1 has not started." in alert
    assert "<w2>" not in html
    assert "## Incomplete arms" in troubled.markdown.read_text()


def test_what_was_left_out_is_said_and_harmless(troubled: Report) -> None:
    html = troubled.html.read_text()
    left_out = Outline(html).text.split("Failures and what was left out")[1]
    assert "w|1, seed 1 (run hurt): " in left_out
    assert "provenance.json: cannot be read (DamagedFileError)" in left_out
    assert "metrics.jsonl:14: not JSON; the line is left out" in left_out
    assert "damaged file" in html
    assert "alert(1)" not in html
    assert f"not in the means of {METRIC} at step 100" in troubled.markdown.read_text()


def test_every_number_of_the_summary_has_its_n_and_its_verdict(written: Report) -> None:
    rows = re.findall(r"^\| (\w+, \w+) \| 600 \| (.*?) \|(.*)\|$", written.markdown.read_text(), flags=re.MULTILINE)
    compared = [row for row in rows if "baseline:" in row[2]]
    assert {row[1] for row in rows} == {"3"}
    assert len(compared) == 4  # two arms, two metrics that both arm and baseline have
    assert all(re.search(r"\| -?[01]\.\d\d \| [\\<\d.]+ \| (not )?resolved $", row[2]) for row in compared)


def test_targets(troubled: Report) -> None:
    text = troubled.markdown.read_text()
    # Both seeds of the arm are there at the first measurement; the baseline never is, so there is no speed-up.
    assert re.search(r"\| 15 \| w\\\|1 \| 2 of 3 \| 100 \| 6,400 \| 0.00278 \| n/a \|", text)
    assert re.search(r"\| 5 \| base \| 0 of 3 \| not reached \| not reached \| not reached \| n/a \|", text)


def test_a_sweep_that_has_not_started(build: Build) -> None:
    paths = write_report(build([FakeArm("base", [0]), FakeArm("arm", [0], "base")]))
    assert paths.figures == ()
    assert "No evaluation has finished yet." in paths.markdown.read_text()
    assert "No run has started" in paths.html.read_text()


def test_a_search_lists_its_trials_best_first(build: Build) -> None:
    facts = [("t0", "complete", 3.0), ("t1", "complete", 2.0), ("t2", "pruned", 1.0), ("t3", "failed", None)]
    trials = [{"arm": a, "state": s, "value": v, "params": {"regularizer.weight": 0.12345}} for a, s, v in facts]
    arms = [FakeArm(arm, [FakeRun(0, dict.fromkeys(STEPS, value or 9.0))]) for arm, _, value in facts]
    paths = write_report(build(arms, search={"metric": METRIC, "goal": "min", "trials": trials}))
    text = paths.markdown.read_text()
    rows = re.findall(r"^\| \d \| (t\d) \|.*$", text, flags=re.MULTILINE)
    assert rows == ["t1", "t0", "t2", "t3"]
    assert "| 1 | t1 | complete | 2.000 | 0.1235 |" in text
    assert "Best of 2 completed trials (4 in all): t1" in text.split("## ")[0]
    assert "takes 10 completed trials and two settings" in text
    assert "search.svg" in [path.name for path in paths.figures]


def test_the_summary_has_a_table_for_each_metric_the_compared_one_first(written: Report) -> None:
    lines = written.markdown.read_text().splitlines()
    named = [
        line.rstrip(":")
        for line in lines
        if line.rstrip(":") in (METRIC, "heldout/cka", "heldout/cosine", "heldout/gap")
    ]
    assert named == [METRIC, METRIC, "heldout/cka", "heldout/cosine", "heldout/gap"]  # summary, targets, the others


def test_settings_in_which_arms_differ_are_listed(written: Report) -> None:
    table = written.markdown.read_text().split("Settings in which arms differ:")[1]
    assert "| sit, aligned | sit | aligned | sit | repa |" in table


def test_writing_again_replaces_and_repeats_to_the_byte(build: Build) -> None:
    sweep = build([FakeArm("arm", constant_runs([1.0]))])
    first = [path.read_bytes() for path in write_report(sweep).all]
    for path in sweep.path.glob("figures/*"):
        path.unlink()
    assert [path.read_bytes() for path in write_report(sweep).all] == first


def test_only_figures_that_show_something_else_are_drawn_again(build: Build, root: RunsRoot) -> None:
    runs = [FakeRun(0, dict.fromkeys(STEPS, 1.0), cka=0.3, run_id="changing"), *constant_runs([1.0, 2.0], cka=0.3)[1:]]
    sweep = build([FakeArm("arm", runs)])
    first = {path.name: path.stat().st_ino for path in write_report(sweep).figures}
    assert {path.name: path.stat().st_ino for path in write_report(sweep).figures} == first
    with RunWriter(root.run("changing")) as writer:
        writer.row({"step": 600, "images": 38400, METRIC: 3.0})
    again = {path.name: path.stat().st_ino for path in write_report(sweep).figures}
    changed = {name for name, inode in again.items() if inode != first[name]}
    assert (
        changed
        == {"convergence.svg", "convergence_images.svg", "convergence_hours.svg"}
        == set(first) - {"alignment.svg"}
    )


def test_reading_and_a_report_without_news_load_no_heavy_library(build: Build, root: RunsRoot) -> None:
    write_report(build([FakeArm("arm", constant_runs([1.0, 2.0]))]))
    code = """
import sys
from repa_lab.cli import main
for words in (["status"], ["leaderboard"], ["report", "trial"]):
    sys.argv = ["repa-lab", *words, "--root", sys.argv[-1]]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
loaded = {"torch", "diffusers", "transformers", "timm", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""
    command = [sys.executable, "-c", code, str(root.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_labels_and_questions_are_text_in_markdown(build: Build) -> None:
    label = "*a*_b_ <img src=x> [l](http://x) $5$ `c` ~~d~~ |e| &copy; snake_case"
    sweep = build([FakeArm(label, constant_runs([1.0])), FakeArm("# title", constant_runs([2.0]))])
    text = write_report(sweep).markdown.read_text()
    escaped = r"\*a\*\_b\_ \<img src=x> [l\](http://x) \$5\$ \`c\` \~\~d\~\~ \|e\| \&copy; snake_case"
    assert f"- {escaped}: {METRIC} at step 600 is 1.000" in text
    assert f"| {escaped} | 600 |" in text
    assert label not in text
    assert "- \\# title: " in text


def test_a_profile_that_cannot_be_read_costs_no_more_than_itself(build: Build, root: RunsRoot) -> None:
    sweep = build([FakeArm("arm", [FakeRun(0, {100: 1.0}, run_id="hurt")])])
    (root.run("hurt").path / "profile.json").write_text("{")
    assert "hurt" in write_report(sweep).markdown.read_text()


def test_a_figure_that_cannot_be_drawn_is_named_and_costs_nothing_else(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ValueError("no font\nat all")

    sweep = build(
        [FakeArm("base", constant_runs([2.0, 3.0])), FakeArm("_arm", constant_runs([1.0, 1.0], cka=0.3), "base")]
    )
    monkeypatch.setattr(curves, "draw_convergence", fail)
    paths = write_report(sweep)
    assert [path.name for path in paths.figures] == ["alignment.svg"]
    text = paths.markdown.read_text()
    for title in ("optimizer steps", "images seen", "device hours of training"):
        line = f"- The figure 'convergence: {title}' could not be drawn (ValueError: no font)."
        assert line in text.splitlines()
    assert "figures/convergence" not in text
    assert r"| \_arm | 600 | 2 |" in text


def test_a_sweep_that_was_never_recorded(root: RunsRoot) -> None:
    with pytest.raises(ResultsError, match="no results at"):
        write_report(root.sweep("nothing"))


def test_the_latex_document_is_balanced(written: Report) -> None:
    text = written.latex.read_text()
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended)
    assert (
        text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == begun.count("tabular") >= 6
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed (Debian: texlive-latex-extra)")
def test_the_latex_document_compiles_whatever_the_names_hold(troubled: Report, tmp_path: Path) -> None:
    document = troubled.latex
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={tmp_path}", document.name]
    done = subprocess.run(command, cwd=document.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
