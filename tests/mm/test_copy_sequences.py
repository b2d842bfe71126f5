"""Sequences of ranges and batches of copies that no caller should give: a clear error."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError, RangeError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from tests.mm.copying import MAX, N_BYTES, PAGE, START, Ground

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Copy = Callable[..., Any]

END = MAX - PAGE
WORD = 1 << 64


@pytest.fixture
def ground() -> Iterator[Ground]:
    """Memory at both ends of the address space, and in the middle."""
    with Ground() as made:
        made.map(END, PAGE)
        made.map(0, PAGE)
        yield made


class Number:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


# ---- sequences ----


def ranges(*spans: tuple[int, int]) -> AddrRangeSeq:
    return AddrRangeSeq([AddrRange(start, start + n) for start, n in spans])


def test_every_range_is_checked_before_anything_is_done(ground: Ground):
    mm = ground.mm
    for bad, n in (
        (MAX + 1, 0),
        (MAX, 1),
        (MAX - 4, 8),
        (WORD - 8, 8),
        (WORD - 8, 0),
        (WORD - 1, 1),
    ):
        seq = ranges((START, 8), (bad, n))
        dst = bytearray(b"." * (8 + n))
        with pytest.raises(GuestFaultError) as caught:
            mm.copy_in_vec(seq, dst)
        assert (caught.value.addr, caught.value.done) == (max(bad, MAX), 0)
        with pytest.raises(GuestFaultError):
            mm.copy_out_vec(seq, b"\xee" * (8 + n))
        assert dst == b"." * (8 + n)
        assert mm.read(START, 8) == bytes(8)
    # Nothing is mapped at an empty one: that is no reason.
    assert mm.copy_out_vec(ranges((START - 8, 0), (START, 2), (MAX, 0)), b"ab") == 2


def test_what_is_no_sequence(ground: Ground):
    for wrong in (None, 5, "ab", b"ab", object(), AddrRange, Number(5)):
        for call in (ground.mm.copy_in_vec, ground.mm.copy_out_vec):
            with pytest.raises(TypeError):
                call(wrong, bytearray(8))


def test_a_buffer_of_another_length(ground: Ground):
    for n in (0, 7, 9, 1 << 20):
        for call in (ground.mm.copy_in_vec, ground.mm.copy_out_vec):
            with pytest.raises(ValueError, match="8 bytes"):
                call(ranges((START, 3), (START, 5)), bytearray(n))


class Liar(AddrRangeSeq):
    """Says that it has other ranges than it has."""

    packed: Any = b""  # type: ignore[misc]

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.answer = packed

    def __getattribute__(self, name: str) -> Any:
        if name != "packed":
            return super().__getattribute__(name)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_forged_sequences(ground: Ground):
    start, n = START.to_bytes(8, "little"), (8).to_bytes(8, "little")
    huge = b"\xff" * 16
    for packed in (
        b"x", start, start + n + b"x", huge, start + huge[:8], (start + n) * 2,
        bytearray(start + n), memoryview(start + n), "x" * 16, None, 5,
        ZeroDivisionError("mine"), [start + n], (start + (1 << 62).to_bytes(8, "little")) * 4,
    ):  # fmt: skip
        for call in (ground.mm.copy_in_vec, ground.mm.copy_out_vec):
            dst = bytearray(b"." * 8)
            with pytest.raises(
                (TypeError, ValueError, OverflowError, GuestFaultError, ZeroDivisionError)
            ):
                call(Liar(packed), dst)
            assert dst == b"." * 8
    assert ground.mm.copy_in_vec(Liar(start + n), bytearray(8)) == 8
    with contextlib.suppress(AttributeError, TypeError):
        ground.mm.copy_in_vec(AddrRangeSeq.__new__(AddrRangeSeq), bytearray(8))


def test_more_bytes_than_can_be_counted():
    with pytest.raises(RangeError):
        ranges((0, 1 << 62), (0, 1 << 62))


# ---- batches ----


def test_batches_are_lists_or_tuples_of_pairs(ground: Ground):
    mm = ground.mm
    right: list[Any] = [(START, 4), (START + 4, 4)]
    assert mm.copy_in_many(right) == mm.copy_in_many(tuple(right)) == [bytes(4)] * 2
    assert mm.copy_in_many([]) == []
    assert mm.copy_out_many(()) == 0
    for wrong in (
        iter(right),
        (pair for pair in right),
        {START: 4},
        {1, 2},
        None,
        5,
        "ab",
        range(3),
    ):
        for call in (mm.copy_in_many, mm.copy_out_many):
            with pytest.raises(TypeError):
                call(wrong)
    for pair in ((), (START,), (START, 4, 4), [START, 4], None, 5, "ab", b"ab", {START: 4}):
        for call in (mm.copy_in_many, mm.copy_out_many):
            with pytest.raises(TypeError):
                call([pair])


def test_a_batch_ends_at_its_first_error(ground: Ground):
    mm = ground.mm
    hole = START + N_BYTES
    with pytest.raises(GuestFaultError) as caught:
        mm.copy_out_many([(START, b"one"), (hole - 2, b"four"), (START + 8, b"never")])
    assert (caught.value.addr, caught.value.item) == (hole, 1)  # type: ignore[attr-defined]
    assert mm.read(START, 13) == b"one" + bytes(10)
    assert mm.read(hole - 2, 2) == b"fo"
    with pytest.raises(GuestFaultError) as caught:
        mm.copy_in_many([(START, 3), (hole - 2, 4)])
    assert (caught.value.addr, caught.value.item) == (hole, 1)  # type: ignore[attr-defined]


class Acts(Number):
    def __init__(self, value: int, act: Callable[[], object]) -> None:
        super().__init__(value)
        self.act = act

    def __index__(self) -> Any:
        self.act()
        return self.value


def test_a_batch_that_changes_under_the_copy(ground: Ground):
    """The list is another one after each item: what is there then is done, and nothing is lost."""
    mm = ground.mm
    for act_name in ("clear", "pop", "reverse", "sort"):
        for is_addr in (True, False):
            batch: list[Any] = [(START, 4)] * 3
            act = getattr(batch, act_name)
            evil = Acts(
                START if is_addr else 4, lambda act=act: contextlib.suppress(TypeError) and act()
            )
            batch.insert(1, (evil, 4) if is_addr else (START, evil))
            with contextlib.suppress(TypeError):  # sort: pairs with `evil` have no order
                assert all(found == bytes(4) for found in mm.copy_in_many(batch))
    batch = [(START, bytearray(b"abcd")) for _ in range(3)]
    batch.insert(0, (Acts(START, batch.clear), bytearray(b"efgh")))
    assert mm.copy_out_many(batch) == 4
    assert mm.read(START, 4) == b"efgh"
    grown: list[Any] = []
    n_left = 50

    def more() -> None:
        nonlocal n_left
        n_left -= 1
        if n_left > 0:
            grown.append((Acts(START, more), 4))

    grown.append((Acts(START, more), 4))
    assert len(mm.copy_in_many(grown)) == 50
