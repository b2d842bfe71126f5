"""The results file: what is written is read back, and what is not right is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench.crossover.record import (
    Canary,
    Cell,
    Footer,
    Header,
    ResultsError,
    Sample,
    Writer,
    conditions_of,
    read_results,
)

if TYPE_CHECKING:
    from pathlib import Path

HEADER = Header("0.1.0", None, "2026-01-01T00:00:00+00:00", "quick", 7, {"cpu": "some"})
CELL = Cell("c0", "copy_in", 64, "1", "contiguous", "hot", "warm", 4096, "c")
SAMPLE = Sample("c0", 0, 3, {"internal": 10.5, "internal2": 10.25, "mirror": 9.0})


def written(path: Path, *records: Any) -> Path:
    file = path / "results.jsonl"
    with Writer(file) as writer:
        for record in records:
            writer.write(record)
    return file


def line_of(path: Path, change: dict[str, Any], at: int) -> Path:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[at] = {**lines[at], **change}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written(tmp_path, HEADER, CELL, SAMPLE, Canary(0, 3, 3.25, 0), Footer(True, 1.5))

    results = read_results(tmp_path)

    assert results.header == HEADER
    assert results.cells == {"c0": CELL}
    assert results.samples == [SAMPLE]
    assert results.canaries == [Canary(0, 3, 3.25, 0)]
    assert results.footer == Footer(True, 1.5)
    assert (results.others, results.torn_bytes) == ([], 0)


def test_each_record_is_a_line_with_a_kind(tmp_path: Path) -> None:
    lines = written(tmp_path, HEADER, CELL, SAMPLE).read_text(encoding="utf-8").splitlines()

    assert [json.loads(line)["kind"] for line in lines] == ["header", "cell", "sample"]
    assert json.loads(lines[0])["schema"] == 1


def test_other_kinds_are_kept(tmp_path: Path) -> None:
    with Writer(tmp_path / "results.jsonl") as writer:
        writer.write(HEADER)
        writer.write_other("process", number=3, errors=["none"])

    assert read_results(tmp_path).others == [{"kind": "process", "number": 3, "errors": ["none"]}]


def test_a_line_cut_off_is_passed_over_and_removed_before_going_on(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER, CELL, SAMPLE)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "sample", "cell": "c0"')

    results = read_results(path)
    assert (len(results.samples), results.torn_bytes) == (1, 31)
    assert results.footer is None

    with Writer(path, append=True) as writer:
        writer.write(SAMPLE._replace(round=4))
    results = read_results(path)
    assert ([s.round for s in results.samples], results.torn_bytes) == ([3, 4], 0)


def test_a_new_writer_begins_anew_and_appending_to_nothing_does_too(tmp_path: Path) -> None:
    written(tmp_path, HEADER, CELL)
    path = written(tmp_path, HEADER)
    assert read_results(path).cells == {}

    other = tmp_path / "other.jsonl"
    with Writer(other, append=True) as writer:
        writer.write(HEADER)
    assert read_results(other).header == HEADER


def test_records_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    with Writer(tmp_path / "results.jsonl") as writer:
        writer.write(HEADER)
        assert read_results(tmp_path).header == HEADER


def test_a_line_that_does_not_fit_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # And whoever makes room may go on with the same writer.
    with Writer(tmp_path / "results.jsonl") as writer:
        writer.write(HEADER)
        writer.write(CELL)
        whole = (tmp_path / "results.jsonl").read_bytes()

        class Full:
            # The disk takes ten bytes, then none.
            def __init__(self, file: Any) -> None:
                self.file, self.left = file, 10

            def write(self, data: bytes) -> int:
                if not self.left:
                    raise OSError(28, "No space left on device")
                n, self.left = self.left, 0
                return int(self.file.write(data[:n]))

            def fileno(self) -> int:
                return int(self.file.fileno())

        usual = writer._file
        monkeypatch.setattr(Writer, "_file", Full(usual))
        with pytest.raises(OSError, match="No space"):
            writer.write(SAMPLE)
        monkeypatch.undo()
        assert (tmp_path / "results.jsonl").read_bytes() == whole
        writer.write(SAMPLE)
    assert read_results(tmp_path).samples == [SAMPLE]


def test_what_the_cpu_did_meanwhile_is_summed_up(tmp_path: Path) -> None:
    canaries = [Canary(0, r, 3.0 + r / 100, 2) for r in range(21)]
    results = read_results(written(tmp_path, HEADER, CELL, *canaries, Footer(True, 84.0)))
    found = conditions_of(results)
    assert found is not None
    assert (found.ghz_low, found.ghz, found.ghz_high) == (3.01, 3.1, 3.19)
    assert found.stolen == pytest.approx(0.42 / 84)
    text = "CPU at 3.10 GHz (3.01 to 3.19 in 9 rounds of 10), 0.5 % of its time taken by others"
    assert str(found) == text

    assert conditions_of(read_results(written(tmp_path, HEADER, CELL))) is None


@pytest.mark.parametrize(
    ("at", "change", "why"),
    [
        (0, {"schema": 2}, "schema 2"),
        (0, {"kind": "cell"}, "begins with a cell"),
        (0, {"seed": "1"}, "seed of a header"),
        (1, {"bytes": 0}, "0 bytes"),
        (1, {"bytes": True}, "bytes of a cell"),
        (1, {"layout": 1}, "layout of a cell"),
        (1, {"kind": "header"}, "in schema None"),
        (2, {"cell": "c9"}, "'c9'"),
        (2, {"ns": {"internal": "x"}}, "took 'x' ns"),
        (2, {"ns": {"internal": float("nan")}}, "took nan ns"),
        (2, {"round": None}, "round of a sample"),
    ],
)
def test_what_is_malformed_is_refused(
    tmp_path: Path, at: int, change: dict[str, Any], why: str
) -> None:
    path = line_of(written(tmp_path, HEADER, CELL, SAMPLE), change, at)

    with pytest.raises(ResultsError, match=why) as raised:
        read_results(path)

    assert raised.value.line == at + 1
    assert raised.value.path == str(path)


def test_what_is_missing_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER, CELL)
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = json.loads(lines[1])
    del fields["caller"]
    path.write_text(f"{lines[0]}\n{json.dumps(fields)}\n", encoding="utf-8")

    with pytest.raises(ResultsError, match="a cell without caller"):
        read_results(path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="was another one"):
        read_results(written(tmp_path, HEADER, CELL, CELL._replace(bytes=8)))
    with pytest.raises(ResultsError, match="second time"):
        read_results(written(tmp_path, HEADER, CELL, SAMPLE, SAMPLE))
    with pytest.raises(ResultsError, match="second header"):
        read_results(written(tmp_path, HEADER, HEADER))
    assert len(read_results(written(tmp_path, HEADER, CELL, CELL)).cells) == 1


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"7\n", b"{}\n", b"\xff\xfe\n", b"text"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)

    with pytest.raises(ResultsError):
        read_results(path)


def test_no_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "results.jsonl")
