"""The equation of demand paging, and the tables below it."""

from __future__ import annotations

import pytest

from kvmmm.cli.summary import equation, show_statistics
from kvmmm.vmm.statistics import RunStatistics


def statistics(**counts: int) -> RunStatistics:
    stats = RunStatistics()
    for name in RunStatistics.__slots__:
        setattr(stats, name, counts.get(name, 0))
    stats.exits = {"mmio": stats.mmio_faults} if stats.mmio_faults else {}
    return stats


def test_nothing_happened():
    assert "0 EPT violations = 0 vma look-ups = 0 pma insertions + 0 pma hits" in equation(
        statistics()
    )


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (
            {"mmio_faults": 1, "writes": 1, "vma_lookups": 1, "pma_insertions": 1},
            "1 EPT violation = 1 vma look-up = 1 pma insertion + 0 pma hits",
        ),
        (
            {"mmio_faults": 2, "emulated_faults": 1, "page_faults": 1, "reads": 4, "vma_lookups": 4,
             "pma_insertions": 2, "pma_hits": 1, "refused": 1},
            "1 page fault = 4 vma look-ups = 2 pma insertions + 1 pma hit + 1 refusal",
        ),
    ],
)  # fmt: skip
def test_it_adds_up(counts: dict[str, int], text: str):
    stats = statistics(**counts)
    assert text in equation(stats)
    assert "it adds up" in equation(stats)


def test_it_says_when_it_does_not_add_up():
    stats = statistics(mmio_faults=3, reads=3, vma_lookups=2, pma_insertions=2)
    assert "it does not add up" in equation(stats)
    assert " = " not in equation(stats)


def test_tables_show_what_happened_and_leave_out_what_did_not(capsys: pytest.CaptureFixture[str]):
    show_statistics(
        statistics(mmio_faults=2, reads=2, vma_lookups=2, pma_hits=2, guest_ns=3_000_000,
                   handler_ns=1_000_000, console_bytes=2048, coalesced_bytes=1024)
    )  # fmt: skip
    captured = capsys.readouterr()
    assert not captured.out
    for text in ("pma hits", "3.0 ms", "25.0% of the run", "2 KiB", "1 KiB queued by KVM"):
        assert text in captured.err
    assert "to execute" not in captured.err
    assert all(line == line.rstrip() for line in captured.err.splitlines())


def test_times_are_left_out_when_nothing_was_timed(capsys: pytest.CaptureFixture[str]):
    show_statistics(statistics())
    assert "in the guest" not in capsys.readouterr().err
