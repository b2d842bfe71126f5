"""The page in a real browser, as the crossover's: it renders, filters work, no request is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from tests.bench.crossover.test_report_browser import Page, browser, pytestmark  # noqa: F401

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kvmmm.bench.economics.analysis import analyse
    from kvmmm.bench.economics.page import report_page
    from tests.bench.crossover.drawn import SCRIPT_IN_HOST
    from tests.bench.economics.simulated import simulated

    top = tmp_path_factory.mktemp("pages")
    for name, options in (
        ("report", {"cpu": SCRIPT_IN_HOST}), ("exits", {"subject": "exits"}),
        ("empty", {"processes": 0}), ("alone", {"processes": 1}),
    ):  # fmt: skip
        results = simulated(**options)
        page = report_page(results, analyse(results, replicates=100), ["an answer"])
        (top / f"{name}.html").write_text(page, encoding="utf-8")
    return top


@pytest.fixture
def opened(browser: Any, pages: Path):  # noqa: F811
    opened: list[Page] = []

    def open_(name: str) -> Page:
        opened.append(Page(browser, pages / f"{name}.html"))
        return opened[-1]

    yield open_
    opened[-1].check_quiet()


@pytest.fixture
def report(opened: Any) -> Page:
    return opened("report")


CHARTS = {"page": (6, 30), "fault": (3, 15), "even": (3, 12), "share": (3, 15), "slots": (4, 16)}
"""By chart: lines, points."""


def test_every_picture_is_drawn(report: Page):
    assert report.browser.title.startswith("What does a first touch cost")
    for chart, (n_lines, n_points) in CHARTS.items():
        assert report.count(f"#{chart}-chart .line") == n_lines, chart
        assert report.count(f"#{chart}-chart .point") == n_points, chart
        assert report.count(f"#{chart}-chart .bar") == n_points, chart  # intervals
        assert report.count(f"#{chart}-legend li") == n_lines, chart
        bands = report.count(f"#{chart}-chart .parity")
        assert bands == (chart in {"even", "share"}), chart
        # Labels of an axis are few enough to be read.
        assert 3 <= report.count(f"#{chart}-chart .tick") <= 20, chart
    assert report.count("#exits-chart svg.chart rect.part") == 10 * 2 + 1
    assert report.count("#exits-chart .whisker") == 11
    assert report.count("#cells tbody tr") == 157
    assert report.js("return document.body.scrollWidth <= document.documentElement.clientWidth")


def test_axes_of_costs_are_times_and_nobody_speaks_of_internal_mappings(report: Page):
    assert "µs" in report.text("#fault-chart")
    assert "%" in report.text("#share-chart")
    assert "so many touched pages pay it" in report.text("#even-chart")
    assert "internal mappings" not in report.js("return document.body.innerText")
    # Told apart or not: hollow, and in words.
    assert 0 < report.count("#even-chart .point.open") < report.count("#even-chart .point")


def test_access_and_ways_are_chosen_without_reload(report: Page):
    report.js("window.sameDocument = true")
    chart = report.js("return document.querySelector('#fault-chart').innerHTML")
    report.choose("access", "reads")
    assert report.text("#fault-caption").startswith("reads")
    assert report.js("return document.querySelector('#fault-chart').innerHTML") != chart
    report.click("#way-lazy")
    assert report.count("#page-chart .line") == 4
    assert report.count("#share-chart .line") == 2
    # The others keep their looks.
    assert report.count("#fault-chart .line.c2") == 1
    for way in ("slot", "pf"):
        report.click(f"#way-{way}")
    assert "Nothing was measured" in report.text("#page-chart")
    report.click("#way-pf")
    assert report.count("#even-chart .line") == 1
    assert report.js("return window.sameDocument") is True


def test_the_table_shows_one_figure_and_sorts(report: Page):
    report.choose("figure", "window mapped beforehand")
    assert report.count("#cells tbody tr") == 38
    report.click("#cells thead th:nth-child(5) button")
    costs = report.js("""return [...document.querySelectorAll("#cells tbody tr")].map((row) => {
      const [value, unit] = row.children[4].textContent.split(" ");
      return Number(value) * { ns: 1, "µs": 1e3, ms: 1e6 }[unit];
    })""")
    assert costs == sorted(costs)


def test_charts_are_read_by_keyboard(report: Page):
    from selenium.webdriver.common.keys import Keys

    def keys(chart: str, *pressed: str) -> str:
        svg = report.browser.find_element("css selector", f"#{chart}-chart svg")
        for key in pressed:
            svg.send_keys(key)
        return report.text(f"#{chart}-readout")

    assert keys("fault", Keys.HOME).startswith("4 KiB — EPT violation")
    assert "µs [" in keys("fault", Keys.ARROW_RIGHT)
    assert "not told apart from 1" in keys("even", Keys.HOME)
    assert "pages [" in keys("even", Keys.END)
    assert keys("slots", Keys.END).startswith("4,000 — one fault")
    assert "% [" in keys("share", Keys.END)


def test_filters_are_reached_by_keyboard(report: Page):
    from selenium.webdriver.common.keys import Keys

    box = report.browser.find_element("id", "way-slot")
    box.send_keys(Keys.SPACE)
    assert report.count("#fault-chart .line") == 2
    assert report.js("return document.querySelector('label[for=way-slot]').innerText.length > 5")


def test_a_sweep_of_exits_shows_exits_alone(opened: Any):
    page = opened("exits")
    assert page.count("#exits-chart svg.chart rect.part") == 21
    visible = "return document.getElementById(arguments[0]).offsetParent !== null"
    assert [page.js(visible, one) for one in ("windows", "slots", "exits")] == [False, False, True]
    assert page.count("#cells tbody tr") == 21


def test_an_empty_run_says_so(opened: Any):
    assert "holds no figures" in opened("empty").text("#pictures")


def test_one_process_is_drawn_without_intervals_that_it_cannot_have(opened: Any):
    page = opened("alone")
    assert page.count("#fault-chart .point") == 15
    assert "NaN" not in page.js("return document.querySelector('main').innerHTML")
    assert "Infinity" not in page.js("return document.querySelector('main').innerHTML")


def test_print_and_dark(report: Page):
    report.choose("theme", "dark")
    dark = report.js("return getComputedStyle(document.body).backgroundColor")
    report.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert report.js("return getComputedStyle(document.body).backgroundColor") != dark
        shown = "return getComputedStyle(document.querySelector(arguments[0])).display"
        assert report.js(shown, ".controls") == "none"
        assert report.js(shown, "#exits-chart svg") != "none"
    finally:
        report.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
