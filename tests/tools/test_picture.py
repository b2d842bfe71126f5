"""tools/picture: README's picture and answer come from one complete run, and say which."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from kvmmm.bench.crossover.record import Footer
from tests.bench.crossover.drawn import drawn_results, few_cells, write_results
from tools.picture.__main__ import PICTURE, README, main
from tools.picture.section import BEGIN, END, SectionError, run_name, section_of, with_section

if TYPE_CHECKING:
    from pathlib import Path

    from kvmmm.bench.crossover.record import Results

RUN = re.compile(r"run of \S+, seed \d+, commit \w+")


@pytest.fixture(scope="module")
def results():
    return drawn_results(cells=few_cells())


def test_a_run_is_drawn_and_said(
    tmp_path: Path, results: Results, capsys: pytest.CaptureFixture[str]
):
    write_results(tmp_path / "run", results)
    readme, picture = tmp_path / "README.md", tmp_path / "picture.svg"
    readme.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    options = ["--readme", str(readme), "--picture", str(picture)]
    assert main([str(tmp_path / "run"), *options]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert RUN.findall(text) == RUN.findall(picture.read_text()) == [run_name(results)]
    answer = capsys.readouterr().out.split("\n\n", maxsplit=1)[0].splitlines()
    assert len(answer) <= 10
    assert text.count("\n- ") == len(answer)
    # Once more: the same.
    assert main([str(tmp_path / "run"), *options]) == 0
    assert readme.read_text() == text


def test_a_run_that_is_not_complete_is_not_shown(results: Results):
    for footer in (None, Footer(complete=False, seconds=1.0)):
        with pytest.raises(SectionError, match="not complete"):
            section_of(results._replace(footer=footer), ["answer"])


def test_what_a_host_calls_itself_is_no_markup(results: Results):
    header = results.header._replace(host={"cpu": "<b>A*B</b>_[x](y)"})
    section = section_of(results._replace(header=header), ["a *line*"])
    assert "<b>" not in section
    assert "- a \\*line\\*" in section


@pytest.mark.parametrize("readme", ["", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN} {END} {END}"])
def test_a_readme_without_a_place_is_left_alone(readme: str):
    with pytest.raises(SectionError):
        with_section(readme, "section")


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_readme_shows_the_run_that_the_picture_shows():
    assert RUN.findall(README.read_text()) == RUN.findall(PICTURE.read_text())
    assert len(RUN.findall(README.read_text())) == 1
