from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench.crossover.report import figures, words, write_report
from kvmmm.bench.crossover.report.parts import parts_of

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("numpy", reason="numpy is not installed")


@pytest.fixture(scope="module")
def swept():
    from kvmmm.bench.crossover.statistics import analyse
    from tests.bench.crossover.drawn import SCRIPT_IN_HOST, drawn_results

    results = drawn_results(cpu=SCRIPT_IN_HOST)
    return results, analyse(results, seed=1, replicates=300)


@pytest.fixture(scope="module")
def page(swept: Any):
    from kvmmm.bench.crossover.report.page import report_page

    return report_page(*swept, ["the answer <is> here"])


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any):
        self.tags.append((tag, dict(attrs)))


def data_of(page: str):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    return json.loads(text)


def test_page_names_nothing_outside_of_itself(page: str):
    for tag, attrs in Elements(page).tags:
        for name in ("src", "href", "action", "srcset", "data"):
            url = attrs.get(name) or ""
            assert url.startswith(("#", "data:")) or not url, (tag, name, url)
    scripts = re.sub(r'"http://www\.w3\.org/2000/svg"', "", page)  # a name, never fetched
    assert "http://" not in scripts
    assert "https://" not in scripts
    assert "@import" not in page
    assert "url(" not in page


def test_policy_allows_this_style_and_this_script_alone(page: str):
    elements = Elements(page)
    policy = next(a["content"] for t, a in elements.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for kind, tag in (("style-src", "<style>"), ("script-src", "<script>")):
        text = page.split(tag)[1].split(f"</{tag[1:]}", maxsplit=1)[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_host_facts_are_text_whatever_they_hold(page: str):
    from tests.bench.crossover.drawn import SCRIPT_IN_HOST

    assert SCRIPT_IN_HOST not in page
    assert page.count("<script") == 2
    assert "&lt;/script&gt;" in page
    assert "@DATA@" in page  # the host's, not a placeholder that was left
    assert "the answer &lt;is&gt; here" in page
    assert data_of(page)["cells"]
    assert "not known" in page  # thp is None


def test_data_hold_every_cell_with_its_interval(page: str, swept: Any):
    results, analysis = swept
    data = data_of(page)
    assert len(data["cells"]) == len(results.cells)
    by_place = {(*cell["d"], cell["b"]): cell for cell in data["cells"]}
    assert len(by_place) == len(results.cells)
    for verdict in analysis.cells:
        names = words.dims_of(verdict.cell)
        place = [dim["keys"].index(v) for dim, v in zip(data["dims"], names, strict=True)]
        ratio, low, high, winner, floor = by_place[*place, verdict.cell.bytes]["v"][verdict.pair[0]]
        assert ratio == pytest.approx(verdict.ratio, rel=1e-3)
        assert (low, high) == pytest.approx((verdict.low, verdict.high), rel=1e-3)
        assert winner == verdict.winner
        assert floor == pytest.approx(verdict.floor, rel=1e-3)
    assert len(data["curves"]) == len(analysis.curves)
    assert data["pairs"] == ["mirror", "walk", "process_vm", "file_io"]
    assert data["mechanisms"] == ["mirror", "walk"]
    assert [mark["bytes"] for mark in data["marks"]] == [512, 32768]
    residencies = next(dim for dim in data["dims"] if dim["key"] == "residency")
    assert residencies["keys"] == ["warm", "mirror-cold", "linear-cold", "cold", "absent"]


def test_page_says_what_is_unknown_and_judges_both_thresholds(page: str, swept: Any):
    _, analysis = swept
    assert analysis.thresholds
    for text in ("EPT", "NPT", "Intel", "NUMA", "gVisor's 32 KiB and 512 B", "crosses at"):
        assert text in page
    table = page.split('id="h-thresholds"')[1].split("</section>", maxsplit=1)[0]
    assert table.count("<tr>") == 1 + len(analysis.thresholds)


def test_without_an_aa_pair_the_page_says_that_nothing_is_claimed():
    from kvmmm.bench.crossover.report.page import report_page
    from kvmmm.bench.crossover.statistics import analyse
    from tests.bench.crossover.drawn import drawn_results, few_cells

    results = drawn_results(processes=1, cells=few_cells())
    samples = [
        one._replace(ns={k: v for k, v in one.ns.items() if k != "internal2"})
        for one in results.samples
    ]
    alone = results._replace(samples=samples, footer=None)
    page = report_page(alone, analyse(alone, replicates=50), [])
    assert "so nothing is claimed" in page
    assert "not complete" in page
    assert all(v[3] is None for cell in data_of(page)["cells"] for v in cell["v"].values())


def test_an_empty_run_makes_a_page():
    from kvmmm.bench.crossover.record import Header, Results
    from kvmmm.bench.crossover.report.page import report_page
    from kvmmm.bench.crossover.statistics import analyse

    header = Header("0.1.0", None, "2026-01-01T00:00:00+00:00", "quick", 1, {})
    empty = Results(header, {}, [], [], None, [])
    page = report_page(empty, analyse(empty), ["nothing yet"])
    assert data_of(page)["cells"] == []


PARTS = {
    "warm": 100.0,
    "linear-cold": 350.0,
    "mirror-cold": 900.0,
    "cold": 1000.0,
    "absent": 1600.0,
}


@pytest.mark.parametrize(
    ("state", "is_mirror", "parts"),
    [
        ("warm", False, [("copy", 100)]),
        ("linear-cold", False, [("copy", 100), ("linear", 250)]),
        ("cold", False, [("copy", 100), ("linear", 250)]),
        ("mirror-cold", True, [("copy", 100), ("mirror", 800)]),
        ("cold", True, [("copy", 100), ("linear", 250), ("mirror", 650)]),
        ("absent", True, [("copy", 100), ("linear", 250), ("mirror", 650), ("absent", 600)]),
    ],
)
def test_parts_of_a_cold_operation(state: str, is_mirror: bool, parts: list[tuple[str, float]]):
    assert parts_of(PARTS, state, mirror=is_mirror) == parts


@pytest.mark.parametrize("state", list(PARTS))
@pytest.mark.parametrize("lost", [set(), {"warm"}, {"linear-cold"}, {"cold"}])
def test_parts_of_the_mirror_add_up_to_what_was_measured(state: str, lost: set[str]):
    measured = {k: v for k, v in PARTS.items() if k not in lost or k == state}
    parts = parts_of(measured, state, mirror=True)
    assert sum(ns for _, ns in parts) == pytest.approx(PARTS[state])


def test_what_is_missing_for_figures_is_said_in_one_line(
    swept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figures, "have_matplotlib", lambda: False)
    lines = write_report(tmp_path, *swept, ["answer"])
    assert (tmp_path / "report.html").is_file()
    assert lines[-1] == figures.MISSING
    assert "kvmmm[crossover]" in figures.MISSING


def test_figures_and_the_readme_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from kvmmm.bench.crossover.report import readme_picture
    from kvmmm.bench.crossover.statistics import analyse
    from tests.bench.crossover.drawn import drawn_results, few_cells, write_results

    results = drawn_results(cells=few_cells())
    folder = write_results(tmp_path, results)
    analysis = analyse(results, replicates=50)
    written = figures.write_figures(folder / "figures", results, analysis)
    assert {path.name for path in written} == {
        f"{kind}-copy_in-hot.{suffix}"
        for kind in ("ratio", "winner", "cold") for suffix in ("svg", "png")
    }  # fmt: skip
    for path in written:
        content = path.read_bytes()
        whole = content.startswith(b"\x89PNG") or content.rstrip().endswith(b"</svg>")
        assert whole, path
    readme_picture(folder, tmp_path / "one.svg")
    first = (tmp_path / "one.svg").read_text()
    for text in ("gVisor 512 B", "gVisor 32 KiB", "AMD EPYC Milan", "mirror cold"):
        assert text in first
    assert "<dc:date>" not in first  # drawn again, it is the same file
