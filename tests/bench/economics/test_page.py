"""The page, its data and the figures for papers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.economics.page import report_page
from tests.bench.crossover.drawn import SCRIPT_IN_HOST
from tests.bench.economics.simulated import simulated

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from kvmmm.bench.crossover.record import Results

pytest.importorskip("numpy", reason="numpy is not installed")


def page_of(results: Results, answer: list[str] | None = None) -> str:
    from kvmmm.bench.economics.analysis import analyse

    return report_page(results, analyse(results, replicates=60), answer or ["an answer"])


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(simulated(cpu=SCRIPT_IN_HOST), ["the answer <is> here"])


def data_of(page: str) -> Any:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    return json.loads(text)


def test_page_names_nothing_outside_of_itself(page: str):
    text = re.sub(r'"http://www\.w3\.org/2000/svg"', "", page)  # a name, never fetched
    for words in ("http://", "https://", "@import", "url("):
        assert words not in text
    assert 'content="default-src &#x27;none&#x27;' in page or "default-src 'none'" in page
    assert "unsafe" not in page


def test_host_facts_and_answer_are_text_whatever_they_hold(page: str):
    assert SCRIPT_IN_HOST not in page
    assert page.count("<script") == 2
    assert "the answer &lt;is&gt; here" in page
    assert "@DATA@" in page  # the host's, not a placeholder that was left
    assert "not known" in page


def test_data_hold_every_figure_and_comparison(page: str):
    data = data_of(page)

    assert {one["part"] for one in data["figures"]} == {"faults", "memslots", "exits"}
    assert {one["name"] for one in data["figures"]} == set(data["figure_names"])
    for one in data["figures"]:
        ns, low, high = one["v"]
        assert low <= ns <= high
        assert one["floor"] > 0
        assert data["names"][one["part"]][one["of"]]
    for one in data["comparisons"]:
        assert one["told"] in {-1, 0, 1}
    assert len({json.dumps(one) for one in data["comparisons"]}) == len(data["comparisons"])


def test_what_is_told_stands_in_a_table_without_scripts(page: str):
    table = page.split('id="h-told"')[1].split("</section>", maxsplit=1)[0]

    assert table.count("<tr>") == 1 + len(data_of(page)["comparisons"])
    for words in ("told: above 1", "told: below 2", "not told apart from 1", "SYSCALL"):
        assert words in table


def test_a_sweep_of_exits_has_its_own_title():
    page = page_of(simulated(subject="exits"))

    assert "<title>What does an exit cost on this host?</title>" in page
    assert {one["part"] for one in data_of(page)["figures"]} == {"exits"}


@pytest.mark.parametrize("processes", [0, 1])
def test_a_page_of_nearly_nothing_says_that_nothing_is_told(processes: int):
    page = page_of(simulated(processes=processes))

    assert "Nothing is told: " in page
    assert len(data_of(page)["figures"]) == (157 if processes else 0)


def test_figures_are_drawn_and_whole(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from kvmmm.bench.economics.analysis import analyse
    from kvmmm.bench.economics.figures import write_figures

    results = simulated()
    written = write_figures(tmp_path, results, analyse(results, replicates=30))

    names = ("windows-write", "windows-read", "memslots", "exits")
    assert {path.name for path in written} == {
        f"{name}.{suffix}" for name in names for suffix in ("svg", "png")
    }
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") or content.rstrip().endswith(b"</svg>"), path
    assert "AMD EPYC Milan" in (tmp_path / "exits.svg").read_text(encoding="utf-8")
