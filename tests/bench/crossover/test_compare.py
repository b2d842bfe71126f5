from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench.crossover.compare import Comparison
from kvmmm.bench.crossover.crossing import Crossover, NoThreshold

if TYPE_CHECKING:
    from pathlib import Path

    from kvmmm.bench.crossover.record import Cell

pytest.importorskip("numpy", reason="numpy is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    from tests.bench.crossover.drawn import drawn_ns, drawn_results, few_cells, write_results

    def slower(cell: Cell, variant: str) -> float:
        hit = variant == "mirror" and cell.residency == "warm" and cell.bytes < 600
        return drawn_ns(cell, variant) * (1.5 if hit else 1)

    cells = few_cells()
    top = tmp_path_factory.mktemp("runs")
    return {
        "first": write_results(top / "first", drawn_results(cells=cells)),
        "again": write_results(top / "again", drawn_results(seed=3, kernel="6.19", cells=cells)),
        "slower": write_results(top / "slower", drawn_results(seed=4, ns=slower, cells=cells)),
    }


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path]):
    from kvmmm.bench.crossover.compare import read_runs

    return dict(zip(folders, read_runs(list(folders.values())), strict=True))


def test_two_runs_of_one_host_agree(runs: dict[str, Any]):
    from kvmmm.bench.crossover.compare import compare

    comparison = compare(runs["first"], runs["again"])
    assert comparison.n_common == len(runs["first"].cells)
    assert comparison.differing == []
    assert comparison.contradicting == []
    assert comparison.doubts == []


def test_what_was_made_slower_is_found_and_nothing_else(runs: dict[str, Any]):
    from kvmmm.bench.crossover.compare import compare

    comparison = compare(runs["first"], runs["slower"])
    changed = {
        key for key, one in runs["first"].cells.items()
        if one.pair[0] == "mirror" and one.cell.residency == "warm" and one.cell.bytes < 600
    }  # fmt: skip
    assert {one.key for one in comparison.differing} == changed
    assert all(one.factor == pytest.approx(1.5, rel=0.1) for one in comparison.differing)
    assert comparison.contradicting  # 0.8 became 1.2 at 128 B
    assert {one.key for one in comparison.contradicting} <= changed


def test_the_other_way_round_says_the_same(runs: dict[str, Any]):
    from kvmmm.bench.crossover.compare import compare

    there = compare(runs["first"], runs["slower"])
    back = compare(runs["slower"], runs["first"])
    assert {one.key for one in there.differing} == {one.key for one in back.differing}


def test_text_names_runs_facts_and_says_in_a_sentence_that_they_agree(folders: dict[str, Path]):
    from kvmmm.bench.crossover.compare import main

    text, agree = main([folders["first"], folders["again"]])
    assert agree
    assert "kernel: 6.18 | 6.19" in text
    assert "again beside first" in text
    [sentence] = re.findall(r"The two runs agree .*", text)
    assert "(not one host: kernel differ)" in sentence
    both, overlap = map(
        int, re.search(r"of (\d+) crossovers that both state.* of (\d+) overlap", sentence).groups()
    )
    assert both == overlap > 0
    assert "0 are won by different sides, each by more than 10%" in sentence


def test_a_crossover_that_went_is_said_with_what_the_other_says(runs: dict[str, Any]):
    from kvmmm.bench.crossover.agreement import agreement_of
    from kvmmm.bench.crossover.compare import compare
    from kvmmm.bench.crossover.report.compare_text import crossover_lines

    agreement = agreement_of(compare(runs["first"], runs["slower"]))
    lines = crossover_lines(agreement)
    assert len(lines) == len(agreement.alone) + len(agreement.apart)
    [line] = [one for one in lines if one.startswith("a crossover in one only: copy_in, 1 segment")]
    assert "crosses at" in line
    assert " | no threshold: " in line


def test_a_cell_won_by_different_sides_is_no_agreement(folders: dict[str, Path]):
    from kvmmm.bench.crossover.compare import main

    text, agree = main([folders["first"], folders["slower"]])
    assert not agree
    assert "The two runs do not agree: " in text
    assert "won by different sides, each by more than 10%:\n    copy_in, 1 segment" in text


CROSSOVER = Crossover(1000.0, 900.0, 1100.0, 1.0, 0.5, "internal", "mirror")


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (CROSSOVER._replace(bytes=1150.0, low=1099.0, high=1300.0), "overlapping"),
        (CROSSOVER._replace(bytes=1250.0, low=1101.0, high=1400.0), "apart"),
        (CROSSOVER._replace(bytes=700.0, low=500.0, high=899.0), "apart"),
        (CROSSOVER._replace(below="mirror", above="internal"), "apart"),
        (NoThreshold("it is so"), "alone"),
    ],
)
def test_two_verdicts_on_one_curve(other: Any, kind: str):
    from kvmmm.bench.crossover.agreement import agreement_of, agreement_text

    def run(verdict: Any) -> Any:
        host = {"cpu": "x", "load": id(verdict)}
        return SimpleNamespace(
            curves={("copy_in", "mirror"): SimpleNamespace(verdict=verdict)},
            results=SimpleNamespace(header=SimpleNamespace(host=host)),
        )

    for verdicts in ((CROSSOVER, other), (other, CROSSOVER)):
        first, second = map(run, verdicts)
        found = agreement_of(Comparison(first, second, 7, [], [], []))
        kinds = {name: len(getattr(found, name)) for name in ("overlapping", "apart", "alone")}
        assert kinds == {"overlapping": 0, "apart": 0, "alone": 0} | {kind: 1}
        assert found.holds == (kind != "apart")
        verb = "do not agree" if kind == "apart" else "agree"
        assert agreement_text(found).startswith(f"The two runs {verb}: of ")


def test_page_holds_all_runs(folders: dict[str, Path], tmp_path: Path):
    from kvmmm.bench.crossover.compare import main

    text, agree = main(list(folders.values()), tmp_path / "out")
    assert not agree
    assert (tmp_path / "out" / "compare.txt").read_text() == text
    page = (tmp_path / "out" / "compare.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["runs"] == ["first", "again", "slower"]
    assert all(len(v) == 3 for cell in data["cells"] for v in cell["v"].values())
    assert any("mirror" in cell["differs"] for cell in data["cells"])
    assert not any("walk" in cell["differs"] for cell in data["cells"])


def test_a_run_that_is_not_to_be_trusted_claims_nothing(runs: dict[str, Any]):
    from kvmmm.bench.crossover.agreement import agreement_of, agreement_text
    from kvmmm.bench.crossover.compare import Run, compare

    slower = runs["slower"]
    noise = slower.analysis.noise._replace(trusted=False)
    doubtful = Run("x", slower.results, slower.analysis._replace(noise=noise))
    comparison = compare(runs["first"], doubtful)
    assert comparison.differing == []
    assert comparison.doubts == ["the A/A pair of x differs beyond noise"]
    agreement = agreement_of(comparison)
    assert not agreement.holds
    assert "cannot be told: the A/A pair of x" in agreement_text(agreement)


def test_one_process_claims_nothing(runs: dict[str, Any]):
    from kvmmm.bench.crossover.compare import Run, compare
    from kvmmm.bench.crossover.statistics import analyse

    results = runs["slower"].results
    alone = results._replace(samples=[one for one in results.samples if one.process == 0])
    one = Run("alone", alone, analyse(alone, replicates=50))
    comparison = compare(runs["first"], one)
    assert comparison.differing == []
    assert "alone has fewer than 3 processes" in comparison.doubts


def test_refusals(folders: dict[str, Path], tmp_path: Path):
    from kvmmm.bench.crossover.compare import CompareError, main
    from tests.bench.crossover.drawn import drawn_results, few_cells, write_results

    with pytest.raises(CompareError, match="two runs"):
        main([folders["first"]])
    swaps = [cell._replace(operation="swap") for cell in few_cells()]
    apart = write_results(tmp_path / "apart", drawn_results(cells=swaps))
    with pytest.raises(CompareError, match="no cell in common"):
        main([folders["first"], apart])


def test_folders_of_the_same_name_are_told_apart(folders: dict[str, Path], tmp_path: Path):
    from kvmmm.bench.crossover.compare import read_runs

    copy = tmp_path / "first"
    copy.symlink_to(folders["first"])
    (tmp_path / "b").mkdir()
    second = tmp_path / "b" / "first"
    second.mkdir()
    (second / "results.jsonl").write_bytes((folders["first"] / "results.jsonl").read_bytes())
    names = [run.name for run in read_runs([copy, second])]
    assert len(set(names)) == 2
