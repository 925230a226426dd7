"""The page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from repa_lab.report import write_report
from repa_lab.runs import RunsRoot

from . import chromium
from .conftest import build_quickstart, builder

PROGRAM = chromium.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
WIDTHS = pytest.mark.parametrize("width", [1280, 768, 390, 320])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_quickstart(builder(RunsRoot(tmp_path_factory.mktemp("browser") / "runs")))).html


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Chromium]:
    assert PROGRAM is not None
    with chromium.Chromium(PROGRAM) as found:
        yield found


@WIDTHS
def test_it_opens_without_network_and_without_complaints(browser: chromium.Chromium, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]
    assert browser.run("document.title") == "quickstart"


@WIDTHS
def test_nothing_is_wider_than_the_screen_but_in_a_box_that_scrolls(
    browser: chromium.Chromium, page: Path, width: int
) -> None:
    browser.open(page, width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll("main *")].filter((one) => !one.closest(".scroll, nav, svg, details:not([open])")
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.run(outside) == []


def test_charts_are_there_and_have_ink(browser: chromium.Chromium, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    boxes = browser.run(
        """[...document.querySelectorAll("svg")].filter((one) => one.checkVisibility())
        .map((one) => one.getBoundingClientRect()).map((box) => [box.x, box.y + scrollY, box.width, box.height])"""
    )
    assert len(boxes) == 1 + 2 + 6  # differences, the first tab of convergence, alignment
    shot = Image.open(browser.screenshot(tmp_path / "page.png")).convert("RGB")
    for x, y, width, height in boxes:
        assert width > 250
        assert height > 100
        chart = shot.crop((round(x), round(y), round(x + width), round(y + height)))
        assert len(set(chart.getdata())) > 50


def test_tabs_show_one_measure_of_progress_at_a_time(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    seen = """[...document.querySelectorAll(".tabs > figure")].map((one) => one.checkVisibility())"""
    assert browser.run(seen) == [True, False, False]
    browser.run("""document.querySelector("label[for=tab-convergence-3]").click()""")
    assert browser.run(seen) == [False, False, True]
    assert "device seconds of training" in browser.run(
        """[...document.querySelectorAll(".tabs > figure")][2].textContent"""
    )


def test_tables_sort_by_number_and_by_text_both_ways(browser: chromium.Chromium, page: Path) -> None:
    browser.open(page)
    browser.run("globalThis.first = document.querySelector('#summary ~ .scroll table')")
    column = "[...first.tBodies[0].rows].map((row) => row.cells[%d].textContent.trim())"
    click = "[...first.querySelectorAll('th button')].find((one) => one.textContent === %r).click()"

    def shown(header: str, place: int) -> list[str]:
        browser.run(click % header)
        return list(browser.run(column % place))

    up, down = shown("mean [95 % interval]", 3), shown("mean [95 % interval]", 3)
    numbers = [float(text.split()[0]) for text in up]
    assert numbers == sorted(numbers)
    assert down == up[::-1]
    assert browser.run("first.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
    arms = shown("arm", 0)
    assert arms == sorted(arms)
    for _ in range(2):  # what is not there stays last
        assert [text == "n/a" for text in shown("Holm's p", 8)] == [False, False, True, True]


def test_dark_is_dark_and_its_text_can_be_read(browser: chromium.Chromium, page: Path) -> None:
    for dark in (False, True):
        browser.open(page, dark=dark)
        paper, ink = browser.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        label = browser.run("getComputedStyle(document.querySelector('svg text')).fill")
        assert (brightness(paper) < 64) is dark
        for text in (ink, label):
            assert abs(brightness(text) - brightness(paper)) > 90


def brightness(color: str) -> float:
    return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]) / 3
