"""The pages in a real browser: Debian's chromium, driven by selenium, with nothing to resolve."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from kvmmm.bench.crossover.record import Cell

pytest.importorskip("numpy", reason="numpy is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(DRIVER is None, reason="chromedriver (chromium-driver) is not installed"),
    pytest.mark.timeout(300),
]

_ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--window-size=1200,1600", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory):
    from kvmmm.bench.crossover.compare import main
    from kvmmm.bench.crossover.report.page import report_page
    from kvmmm.bench.crossover.statistics import analyse
    from tests.bench.crossover.drawn import (
        SCRIPT_IN_HOST,
        drawn_ns,
        drawn_results,
        few_cells,
        write_results,
    )

    def slower(cell: Cell, variant: str) -> float:
        return drawn_ns(cell, variant) * (1.5 if variant == "mirror" and cell.bytes < 600 else 1)

    top = tmp_path_factory.mktemp("pages")
    results = drawn_results(cpu=SCRIPT_IN_HOST)
    page = report_page(results, analyse(results, replicates=300), ["an answer"])
    (top / "report.html").write_text(page, encoding="utf-8")
    one = write_results(top / "one", drawn_results(cells=few_cells()))
    two = write_results(top / "two", drawn_results(cells=few_cells(), ns=slower, seed=5))
    main([one, two], top)
    return top


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(30)
        yield driver
    finally:
        driver.quit()


class Page:
    def __init__(self, browser: Any, path: Path) -> None:
        self.browser = browser
        self.url = path.as_uri()
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")  # what was before
        browser.get(self.url)
        until = time.monotonic() + 30
        while self.js("return document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < until, browser.get_log("browser")
            time.sleep(0.05)

    def js(self, script: str, *arguments: Any):
        return self.browser.execute_script(script, *arguments)

    def text(self, selector: str):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def count(self, selector: str):
        return self.js("return document.querySelectorAll(arguments[0]).length", selector)

    def choose(self, id_: str, name: str):
        """Choose an option of a select by its text, as a reader does."""
        from selenium.webdriver.support.ui import Select

        select = Select(self.browser.find_element("id", id_))
        option = next(one for one in select.options if one.text.startswith(name))
        select.select_by_index(select.options.index(option))

    def click(self, selector: str):
        element = self.browser.find_element("css selector", selector)
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def check_quiet(self):
        """No message in the console, and no request but the page's own file."""
        assert self.browser.get_log("browser") == []
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                assert url.split("#")[0] in (self.url, "about:blank", "data:,"), url
        assert self.js("return performance.getEntriesByType('resource').length") == 0


@pytest.fixture
def report(browser: Any, pages: Path):
    page = Page(browser, pages / "report.html")
    yield page
    page.check_quiet()


@pytest.fixture
def comparison(browser: Any, pages: Path):
    page = Page(browser, pages / "compare.html")
    yield page
    page.check_quiet()


def test_report_renders(report: Page):
    assert report.browser.title.startswith("Where does ASIO")  # no host's name changed it
    assert report.count("#ratio-chart svg .line") == 2
    assert report.count("#ratio-chart .point") == 20
    assert report.count("#ratio-chart .bar") == 20
    marks = report.js("return [...document.querySelectorAll('.mark-name')].map(e => e.textContent)")
    assert marks == ["gVisor 512 B", "gVisor 32 KiB"]
    assert report.count("#ratio-chart .parity") == 1
    assert report.count("#heat-chart button") == 10  # 2 layouts, 5 states
    assert report.count("#cold-chart rect.part") > 10
    assert report.count("#cells tbody tr") == 20
    assert "crosses at" in report.text("#ratio-verdict")
    assert report.js("return document.body.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize(
    ("filter_", "name"),
    [
        ("operation", "copy_out"), ("layout", "1,000 segments"), ("locality", "spread"),
        ("residency", "both cold"), ("caller", "Python"), ("page_bytes", "4 KiB"),
    ],
)  # fmt: skip
def test_each_filter_works_without_reload(report: Page, filter_: str, name: str):
    report.js("window.sameDocument = true")
    chart = report.js("return document.querySelector('#ratio-chart').innerHTML")
    report.choose(f"filter-{filter_}", name)
    assert name in report.text("#ratio-caption")
    assert report.js("return window.sameDocument") is True
    assert report.count("#cells tbody tr") == 2 * report.js(
        "return DATA.cells.filter((cell) => cell.d.join() === state.d.join()).length"
    )
    after = report.js("return document.querySelector('#ratio-chart').innerHTML")
    assert (after != chart) == (filter_ != "page_bytes")  # there is one page size
    assert report.count("#ratio-chart .point") > 0


def test_a_combination_that_was_not_measured_moves_the_fewest_others(report: Page):
    report.choose("filter-residency", "both cold")
    report.choose("filter-caller", "Python")
    assert "Residency set to warm" in report.text("#filter-status")
    assert "residency warm" in report.text("#ratio-caption")
    assert report.count("#ratio-chart .point") == 10


def test_one_operation_of_one_size_is_drawn(report: Page):
    report.choose("filter-operation", "swap")
    assert report.count("#ratio-chart .point") == 2


def test_lines_are_chosen_and_laid_beside_each_other(report: Page):
    report.click("#pair-process_vm")
    assert report.count("#ratio-chart .line") == 3
    for pair in ("mirror", "walk", "process_vm"):
        report.click(f"#pair-{pair}")
    assert "Nothing was measured" in report.text("#ratio-chart")
    report.click("#pair-mirror")
    report.choose("overlay", "every residency")
    assert report.count("#ratio-chart .line") == 5


def test_size_by_keyboard_and_a_field_of_the_map(report: Page):
    from selenium.webdriver.common.keys import Keys

    before = report.text("#heat-chart"), report.text("#cold-chart")
    report.browser.find_element("id", "size").send_keys(Keys.END)
    assert report.text("#size-text") == "2 MiB"
    assert (report.text("#heat-chart"), report.text("#cold-chart")) != before
    report.click("#heat-chart button[aria-label^='1,000 segments, scattered, mirror cold']")
    assert "residency mirror cold" in report.text("#ratio-caption")
    assert report.count("#heat-chart button[aria-pressed=true]") == 1
    focused = report.js("return document.activeElement.getAttribute('aria-pressed')")
    assert focused == "true"


def test_chart_is_read_by_keyboard(report: Page):
    from selenium.webdriver.common.keys import Keys

    chart = report.browser.find_element("css selector", "#ratio-chart svg")
    chart.send_keys(Keys.HOME)
    assert report.text("#ratio-readout").startswith("8 B")
    chart.send_keys(Keys.ARROW_RIGHT)
    assert report.text("#ratio-readout").startswith("32 B")
    assert "ASIO, walk" in report.text("#ratio-readout")


def test_what_the_filters_say_is_no_column(report: Page):
    columns = report.count("#cells thead th")
    report.click("#all-cells")
    assert report.count("#cells thead th") == columns + 6


def test_long_tables_begin_with_crossovers_and_show_the_rest_on_demand(report: Page):
    shown = "return [...document.querySelectorAll(arguments[0])].filter((e) => !e.hidden).length"
    rows = "section[aria-labelledby=h-curves] tbody tr"
    assert report.js(shown, rows) == 30
    assert "crosses at" in report.text(f"{rows} td:last-child")
    report.click("section[aria-labelledby=h-curves] button")
    assert report.js(shown, rows) == report.js("return DATA.curves.length") > 30
    assert report.count("section[aria-labelledby=h-curves] button") == 0


def test_table_sorts_and_shows_everything(report: Page):
    report.click("#all-cells")
    assert report.count("#cells tbody tr") == 200
    report.click("#cells > button")
    assert report.count("#cells tbody tr") == report.js("return DATA.cells.length * 2")
    report.click("#cells thead th:nth-child(9) button")
    rows = "document.querySelectorAll('#cells tbody tr')"
    ratios = report.js(f"return [...{rows}].map((row) => Number(row.children[8].textContent))")
    assert ratios == sorted(ratios)
    assert report.count("#cells th[aria-sort=ascending]") == 1


def test_dark_and_light(report: Page):
    colour = "return getComputedStyle(document.body).backgroundColor"
    report.choose("theme", "dark")
    dark = report.js(colour)
    report.choose("theme", "light")
    assert dark != report.js(colour)
    assert report.js(colour) == "rgb(255, 255, 255)"


def test_print_drops_controls_and_keeps_pictures(report: Page):
    report.choose("theme", "dark")
    report.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = "return getComputedStyle(document.querySelector(arguments[0])).display"
        assert report.js(shown, ".controls") == "none"
        assert report.js(shown, "#ratio-chart svg") != "none"
        assert report.js("return getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
    finally:
        report.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_chosen_filters_survive_a_reload(report: Page):
    report.choose("filter-residency", "both cold")
    report.browser.refresh()
    assert "residency both cold" in report.text("#ratio-caption")


def test_a_request_would_be_seen_and_is_refused(browser: Any, pages: Path):
    page = Page(browser, pages / "report.html")
    page.js("document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/x'}))")
    until = time.monotonic() + 10
    while not (log := browser.get_log("browser")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "Content Security Policy" in log[0]["message"]
    with pytest.raises(AssertionError, match=r"example\.invalid"):
        page.check_quiet()


def test_comparison_renders_and_filters(comparison: Page):
    assert comparison.count("#ratio-chart .line") == 2
    assert comparison.text("#ratio-legend") == "onetwo"
    comparison.choose("filter-residency", "mirror cold")
    assert "residency mirror cold" in comparison.text("#ratio-caption")
    comparison.click("#all-cells")
    everything = comparison.count("#cells tbody tr")
    comparison.click("#differing")
    assert 0 < comparison.count("#cells tbody tr") < everything
    comparison.choose("pair", "ASIO, walk")
    assert comparison.count("#ratio-chart .line") == 2
