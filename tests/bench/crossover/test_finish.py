"""What follows a sweep: lines are told as they come, and missing parts of the package are borne."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench.crossover import extras, finish
from kvmmm.bench.crossover.extras import MissingExtraError
from kvmmm.bench.crossover.record import Footer, Header, Writer

if TYPE_CHECKING:
    from pathlib import Path


class Parts:
    """Stands for statistics, answer and report."""

    def __init__(self, told: list[str]) -> None:
        self.told = told
        self.figures: list[bool] = []
        self.missing: set[str] = set()

    def module_of(self, name: str) -> Any:
        return None if name in self.missing else self

    def analyse(self, results: Any, *, seed: int) -> str:
        return f"{results.header.mode} {seed}"

    def answer_of(self, _results: Any, analysis: str) -> list[str]:
        return [f"answer to {analysis}"]

    def write_report(self, *_args: Any, figures: bool) -> list[str]:
        # By then the answer has been told.
        assert self.told
        self.figures.append(figures)
        return ["report: there"]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def parts(told: list[str], monkeypatch: pytest.MonkeyPatch) -> Parts:
    found = Parts(told)
    monkeypatch.setattr(finish, "module_of", found.module_of)
    monkeypatch.setattr(extras, "find_spec", lambda _name: True)
    return found


def write(folder: Path, mode: str) -> None:
    with Writer(folder / "results.jsonl") as writer:
        writer.write(Header("1", None, "2026-01-01", mode, 7, {}))
        writer.write(Footer(complete=True, seconds=1.0))


@pytest.mark.parametrize(("mode", "figures"), [("quick", False), ("default", True)])
def test_the_answer_comes_first(
    tmp_path: Path, parts: Parts, told: list[str], mode: str, figures: bool
):
    write(tmp_path, mode)
    lines = finish.conclude(tmp_path, told.append)
    assert lines == told == [f"answer to {mode} 7", "report: there"]
    assert parts.figures == [figures]
    assert (tmp_path / "answer.txt").read_text() == f"answer to {mode} 7\n"


def test_parts_that_are_not_there(tmp_path: Path, parts: Parts, told: list[str]):
    write(tmp_path, "quick")
    parts.missing = {"report"}
    assert finish.conclude(tmp_path, told.append) == told == ["answer to quick 7"]
    parts.missing = {"answer", "report"}
    assert finish.conclude(tmp_path) == []
    assert finish.module_of("answer") is None


def test_without_numpy_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "quick")
    monkeypatch.setattr(extras, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match="kvmmm\\[crossover\\]"):
        finish.conclude(tmp_path)


def test_modules_by_name():
    assert finish.module_of("plan") is not None
    assert finish.module_of("nothing") is None
