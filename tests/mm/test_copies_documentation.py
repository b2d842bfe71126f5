"""kvmmm/mm/copies.md: its examples run, and its table is true."""

from __future__ import annotations

import doctest
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import READ_WRITE
from tests.mm.copy_table import (
    CONDITIONS,
    FILL,
    NEW,
    OPERATIONS,
    PAGE,
    PAGE_PATH,
    READS,
    UNTOUCHED,
    Ground,
    Row,
    rows,
)
from tests.mm.family import MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.mm.conftest import Setup

TEXT = PAGE_PATH.read_text(encoding="utf-8")
ROWS = list(rows(TEXT))
PUBLIC = (
    "copy_in", "copy_out", "read", "write", "zero_out", "copy_in_vec", "copy_out_vec",
    "copy_in_many", "copy_out_many", "copy_in_to", "copy_out_from", "swap_uint32",
    "compare_and_swap_uint32", "load_uint32", "read_string", "read_int", "write_int",
    "read_struct", "write_struct", "open", "pin", "pin_frames", "ensure_pmas_exist",
)  # fmt: skip


def test_its_examples(make: Callable[..., Setup]):
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    test = parser.get_doctest(TEXT, {"mm": make().mm}, PAGE_PATH.name, str(PAGE_PATH), 0)
    assert len(test.examples) > 50
    report: list[str] = []
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_operation_has_an_example(name: str):
    assert f"mm.{name}(" in TEXT


def test_the_table_uses_all_its_words():
    assert {row.condition for row in ROWS} == set(CONDITIONS)
    assert {row.operation for row in ROWS} == set(OPERATIONS)
    facts = [(row.condition, row.operation) for row in ROWS]
    assert len(facts) == len(set(facts))


@pytest.fixture
def ground(row: Row, tmp_path: Path) -> Iterator[Ground]:
    ground = Ground(tmp_path)
    CONDITIONS[row.condition](ground)
    yield ground
    ground.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.operation}-{row.condition}")
def test_row(ground: Ground, row: Row):
    before = ground.content()
    # What a faulting or a wrong buffer holds is its condition's business.
    is_read = row.operation in READS
    usual = bytearray([UNTOUCHED]) * ground.n_bytes if is_read else bytearray(NEW[: ground.n_bytes])
    buffer = memoryview(usual) if ground.buffer is None else ground.buffer
    names = {"n": ground.n_bytes, "k": ground.before, "addr": ground.addr, "max_addr": MAX}
    n_moved = eval(row.moved, names)  # noqa: S307  # our own page
    result: Any = None
    error: BaseException | None = None
    try:
        result = OPERATIONS[row.operation](ground, buffer)
    except Exception as e:  # noqa: BLE001  # the row says which
        error = e
    assert row.error == ("-" if error is None else type(error).__name__), error
    for name in ("addr", "done"):
        cell = getattr(row, name)
        assert hasattr(error, name) == (cell != "-")
        if cell != "-":
            assert getattr(error, name) == eval(cell, names)  # noqa: S307
    at = ground.addr % PAGE
    there = b"".join(before[page] for page in sorted(before) if page >= ground.addr - at)[at:]
    if is_read:
        if error is None:
            assert bytes(result) == there[:n_moved]
        if buffer.obj is usual and any(value != UNTOUCHED for value in usual):
            assert usual == there[:n_moved] + bytes([UNTOUCHED]) * (ground.n_bytes - n_moved)
        if row.operation == "read_string" and row.error in {"GuestFaultError", "GuestBusError"}:
            assert getattr(error, "prefix", None) == there[:n_moved]
        n_moved = 0
    elif error is None:
        assert result == n_moved
    new = bytes(n_moved) if row.operation == "zero_out" else bytes(NEW[:n_moved])
    check_memory(before, ground, new)


def check_memory(before: dict[int, bytes], ground: Ground, new: bytes) -> None:
    """Nothing has changed but at `addr`, where `new` is now."""
    after = ground.content()
    for page, content in before.items():
        expected = bytearray(content)
        for i, byte in enumerate(new):
            if page <= ground.addr + i < page + PAGE:
                expected[ground.addr + i - page] = byte
        assert after[page] == expected, hex(page)


def test_many_pairs(make: Callable[..., Setup]):
    """What the page says below its table."""
    mm = make().mm
    end = mm.mmap(PAGE, READ_WRITE).end
    for second, moved in ((end - 4, b"seco"), (MAX - 4, b"")):
        mm.zero_out(end - 20, 20)
        with pytest.raises(GuestFaultError) as caught:
            mm.copy_out_many([(end - 20, b"first"), (second, b"second"), (end - 9, b"third")])
        error: Any = caught.value
        assert (error.item, error.done) == (1, 5 + len(moved))
        assert error.addr == (end if moved else MAX)
        assert mm.read(end - 20, 20) == b"first" + bytes(11) + (moved or bytes(4))
    with pytest.raises(GuestFaultError) as caught:
        mm.copy_in_many([(end - 20, 5), (end - 4, 4), (end - 3, 4)])
    error = caught.value
    assert (error.item, error.addr, error.done) == (2, end, 12)


def test_new_bytes_are_not_what_was_there():
    assert all(old != new for old, new in zip(FILL[PAGE - 24 :], NEW, strict=False))
