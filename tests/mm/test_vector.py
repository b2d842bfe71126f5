"""Vectored copies: what they move, and where they end."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.vector import check_io_vec, copy_in_to, copy_out_from, with_internal_mappings
from kvmmm.safemem.ffi import IOOpts
from tests.mm.conftest import HUGE
from tests.mm.family import MAX, Family
from tests.mm.vectors import Sink, Source, seq

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.hostarch.ranges_seq import AddrRangeSeq
    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
A = 4 * HUGE
HOLE = A + PAGE
B = A + 2 * PAGE
RO = A + 3 * PAGE
END = A + 4 * PAGE

BOUNCED = IOOpts(mechanism="walk")
both_ways = pytest.mark.parametrize("opts", [None, BOUNCED], ids=["internal", "buffer"])


@pytest.fixture
def setup(make: Make) -> Setup:
    """Pages: [A) read-write, a hole, [B) read-write, [RO) read-only."""
    setup = make()
    setup.map(A, END)
    setup.mm.munmap(HOLE, PAGE)
    setup.mm.mprotect(RO, PAGE, READ)
    return setup


# Scenarios of gVisor's usermem_test.go.


@both_ways
def test_copy_out_from(setup: Setup, opts: IOOpts | None):
    setup.mm.copy_out(A, b"ABCDEFGH")
    assert copy_out_from(setup.mm, seq((A + 4, A + 7), (A + 1, A + 4)), "barfoo", opts=opts) == 6
    assert setup.mm.read(A, 8) == b"AfoobarH"


@both_ways
def test_copy_in_to(setup: Setup, opts: IOOpts | None):
    setup.mm.copy_out(A, b"AfoobarH")
    out = bytearray(9)
    assert copy_in_to(setup.mm, seq((A + 4, A + 7), (A + 1, A + 4)), out, opts=opts) == 6
    assert out == b"barfoo\0\0\0"


@both_ways
def test_the_end_of_memory(setup: Setup, opts: IOOpts | None):
    ars = seq((B - 5, B - 2), (HOLE - 4, HOLE - 1))
    for end in (HOLE, RO):
        setup.mm.copy_out(end - PAGE, b"x" * PAGE)
        ars = seq((end - 4, end - 1), (end - 1, end + 2))
        with pytest.raises(GuestFaultError) as caught:
            copy_out_from(setup.mm, ars, "foobar", opts=opts)
        assert (caught.value.addr, caught.value.done, caught.value.access) == (end, 4, WRITE)
        assert caught.value.mapped == (end == RO)
        assert setup.mm.read(end - 5, 5) == b"xfoob"
    out = io.BytesIO()
    with pytest.raises(GuestFaultError) as caught:
        copy_in_to(setup.mm, seq((HOLE - 4, HOLE - 1), (HOLE - 1, HOLE + 2)), out, opts=opts)
    assert (caught.value.addr, caught.value.done, caught.value.access) == (HOLE, 4, READ)
    assert out.getvalue() == b"foob"


# Order of errors.


@both_ways
def test_a_hole_in_the_middle(setup: Setup, opts: IOOpts | None):
    """[ok, unmapped, ok]: the count of the first, and nothing of the last."""
    setup.mm.copy_out(B, b"keep")
    ars = seq((A, A + 3), (HOLE + 8, HOLE + 11), (B, B + 3))
    for src in (b"abcdefghi", b"abc"):
        with pytest.raises(GuestFaultError) as caught:
            copy_out_from(setup.mm, ars, src, opts=opts)
        assert (caught.value.addr, caught.value.done, caught.value.mapped) == (HOLE + 8, 3, False)
    assert setup.mm.read(A, 4) == b"abc\0"
    assert setup.mm.read(B, 4) == b"keep"
    sink = Sink()
    with pytest.raises(GuestFaultError) as caught:
        copy_in_to(setup.mm, ars, sink, opts=opts)
    assert (caught.value.addr, caught.value.done) == (HOLE + 8, 3)
    assert (sink.data, sink.calls) == (b"abc", [3])


@both_ways
def test_empty_ranges_may_lie_anywhere(setup: Setup, opts: IOOpts | None):
    empty = (HOLE, HOLE)
    ars = seq(empty, (A, A + 2), empty, (B, B + 2), empty, (MAX, MAX))
    assert copy_out_from(setup.mm, ars, b"abcd", opts=opts) == 4
    sink = Sink()
    assert copy_in_to(setup.mm, ars, sink, opts=opts) == 4
    assert sink.data == b"abcd"


@both_ways
def test_who_ends_early_is_no_error(setup: Setup, opts: IOOpts | None):
    """The range cannot be used to its end, and nobody wants to."""
    ars = seq((HOLE - 100, HOLE + 100), (B, B + 1))
    setup.mm.copy_out(HOLE - 100, b"." * 100)
    assert copy_out_from(setup.mm, ars, b"ten bytes.", opts=opts) == 10
    assert copy_out_from(setup.mm, ars, b"", opts=opts) == 0
    sink = Sink(room=10)
    assert copy_in_to(setup.mm, ars, sink, opts=opts) == 10
    assert sink.data == b"ten bytes."
    assert copy_in_to(setup.mm, ars, sink, opts=opts) == 0
    assert sink.calls == [100, 100]


@both_ways
def test_the_writers_error_comes_before_the_copys(setup: Setup, opts: IOOpts | None):
    """It can only have ended earlier."""
    error = OSError("dust")
    sink = Sink(before=lambda: raised(error))
    with pytest.raises(OSError, match="dust") as caught:
        copy_in_to(setup.mm, seq((HOLE - 4, HOLE + 4)), sink, opts=opts)
    assert caught.value is error


def raised(error: Exception) -> None:
    raise error


@both_ways
def test_the_readers_error_is_its_own(setup: Setup, opts: IOOpts | None):
    error = KeyError("dust")
    src = Source(b"data", before=lambda: raised(error))
    with pytest.raises(KeyError) as caught:
        copy_out_from(setup.mm, seq((HOLE - 4, HOLE + 4)), src, opts=opts)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    setup.mm.munmap(A, PAGE)  # nothing waits for it


def test_the_readers_error_and_a_destination_that_is_no_good(setup: Setup):
    """Without a buffer the reader is not asked; with one, what it gave is lost."""
    src = Source(b"data")
    with pytest.raises(GuestFaultError) as caught:
        copy_out_from(setup.mm, seq((HOLE, HOLE + 4)), src)
    assert (caught.value.addr, caught.value.done) == (HOLE, 0)
    assert not src.calls
    with pytest.raises(GuestFaultError) as caught:
        copy_out_from(setup.mm, seq((HOLE, HOLE + 4)), src, opts=BOUNCED)
    assert (caught.value.addr, caught.value.done) == (HOLE, 0)
    assert (src.calls, src.data) == ([4], b"")


@both_ways
def test_a_writer_is_not_called_for_nothing(setup: Setup, opts: IOOpts | None):
    sink = Sink()
    with pytest.raises(GuestFaultError) as caught:
        copy_in_to(setup.mm, seq((HOLE, HOLE + 4), (A, A + 1)), sink, opts=opts)
    assert (caught.value.addr, caught.value.done) == (HOLE, 0)
    assert not sink.calls


@both_ways
@pytest.mark.parametrize("ars", [seq(), seq((HOLE, HOLE)), seq((A, A), (MAX, MAX))], ids=repr)
def test_nothing_asks_nobody(setup: Setup, ars: AddrRangeSeq, opts: IOOpts | None):
    src, sink = Source(b"data"), Sink()
    assert copy_out_from(setup.mm, ars, src, opts=opts) == 0
    assert copy_in_to(setup.mm, ars, sink, opts=opts) == 0
    assert not src.calls
    assert not sink.calls


@pytest.mark.parametrize(
    ("ars", "addr"),
    [
        (seq((A, A + 1), (MAX - 1, MAX + 1)), MAX),
        (seq((A, A + 1), (MAX + 1, MAX + 1)), MAX + 1),
        (seq((0, 0), ((1 << 64) - 1, 1 << 64)), (1 << 64) - 1),
        (AddrRange(0, 1 << 64), MAX),
        (AddrRange(MAX, MAX + 1), MAX),
    ],
    ids=repr,
)
def test_beyond_all_addresses(setup: Setup, ars: Any, addr: int):
    """Nothing at all is done; ranges without bytes count as well."""
    src, sink = Source(b"data"), Sink()
    for copy in (
        lambda: copy_out_from(setup.mm, ars, src), lambda: copy_in_to(setup.mm, ars, sink),
        lambda: check_io_vec(setup.mm, ars),
    ):  # fmt: skip
        with pytest.raises(GuestFaultError) as caught:
            copy()
        assert (caught.value.addr, caught.value.done, caught.value.mapped) == (addr, 0, False)
    assert not src.calls
    assert not sink.calls
    assert setup.mm.rss_bytes == 0


def test_the_last_address(make: Make):
    setup = make(max_addr=MAX)
    setup.map(MAX - PAGE, MAX)
    assert copy_out_from(setup.mm, AddrRange(MAX - 3, MAX), "end") == 3
    assert setup.mm.read(MAX - 3, 3) == b"end"


# Permissions, copies on write, files, exhaustion.


def test_a_debugger_ignores_permissions(setup: Setup):
    setup.mm.mprotect(A, PAGE, NO_ACCESS)
    ars = seq((RO, RO + 2), (A, A + 2))
    for how in ({"ignore_permissions": True}, {"opts": IOOpts(ignore_permissions=True)}):
        assert copy_out_from(setup.mm, ars, b"abcd", **how) == 4  # type: ignore[arg-type]
        sink = Sink()
        assert copy_in_to(setup.mm, ars, sink, **how) == 4  # type: ignore[arg-type]
        assert sink.data == b"abcd"
    for copy in (copy_out_from, copy_in_to):
        with pytest.raises(GuestFaultError) as caught:
            copy(setup.mm, ars.drop_first(2), bytearray(2))
        assert (caught.value.addr, caught.value.mapped) == (A, True)


@both_ways
def test_a_copy_on_write_is_broken_by_writing_only(opts: IOOpts | None):
    with Family(Arena(64 << 20)) as family:
        parent = family.first
        parent.map(A, A + 4 * PAGE)
        parent.mm.copy_out(A, b"before" * 1000)
        child = family.fork(parent)
        where = parent.offset(A)
        sink = Sink()
        copy_in_to(parent.mm, seq((A + 2, A + 4), (A + PAGE, A + PAGE + 2)), sink, opts=opts)
        assert parent.offset(A) == child.offset(A) == where
        assert copy_out_from(parent.mm, seq((A, A + 3), (A + PAGE, A + PAGE + 3)), "newnew",
                             opts=opts) == 6  # fmt: skip
        assert parent.mm.read(A, 6) == b"newore"
        assert child.mm.read(A, 6) == child.load(A, 6) == b"before"
        assert parent.offset(A) != where


def test_without_memory(make: Make):
    setup = make(HUGE)
    setup.map(A, A + 3 * HUGE)
    src = Source(b"x" * 2 * HUGE)
    with pytest.raises(ArenaExhaustedError) as caught:
        copy_out_from(
            setup.mm, seq((A + HUGE - 5, A + HUGE), (A + 2 * HUGE, A + 2 * HUGE + 9)), src
        )
    assert src.calls == [5]
    assert caught.value.__notes__ == [f"at guest address {A + 2 * HUGE:#x}, after 5 bytes"]
    with pytest.raises(ArenaExhaustedError):
        copy_out_from(setup.mm, AddrRange(A + HUGE, A + HUGE + 1), src)
    assert src.calls == [5]


def test_what_copies_have_backed_is_noted(make: Make):
    """For map_resident: no fault has mapped it."""
    setup = make()
    setup.map(A, A + 8 * HUGE)
    copy_out_from(setup.mm, seq((A + PAGE, A + PAGE + 1), (A + 3 * HUGE, A + 3 * HUGE + 1)), "ab")
    assert setup.mm.unmapped == [(A + PAGE, A + 2 * PAGE), (A + 3 * HUGE, A + 3 * HUGE + PAGE)]
    setup.mm.map_resident()
    assert setup.space.is_mapped(A + 3 * HUGE, READ_WRITE)
    assert not setup.mm.unmapped


def test_with_internal_mappings_calls_once(setup: Setup):
    """First the way by the vmas, then by the pmas alone."""
    calls = []
    for _ in range(2):
        done = with_internal_mappings(
            setup.mm, AddrRange(A + 5, A + 9), WRITE,
            lambda blocks: calls.append(list(blocks)) or blocks.n_bytes,
        )  # fmt: skip
        assert done == 4
    assert calls[0] == calls[1]
    (block,) = calls[0]
    assert block.length_bytes == 4
    arena = setup.arena
    assert arena.hva <= block.hva < arena.hva + arena.capacity_bytes
    assert with_internal_mappings(setup.mm, AddrRange(HOLE, HOLE), WRITE, lambda _: 1 / 0) == 0


def test_adjacent_pmas_of_one_range(make: Make):
    setup = make()
    setup.map(A, A + 3 * HUGE)
    data = bytes(i * 7 & 0xFF for i in range(2 * HUGE))
    assert copy_out_from(
        setup.mm, AddrRange(A + 100, A + 100 + len(data)), io.BytesIO(data)
    ) == len(data)
    assert setup.mm.read(A + 100, len(data)) == data
    out = io.BytesIO()
    assert copy_in_to(setup.mm, AddrRange(A + 100, A + 100 + len(data)), out) == len(data)
    assert out.getvalue() == data


@pytest.mark.parametrize("n_bytes", [511, 512])
def test_the_limit_of_the_buffer(setup: Setup, n_bytes: int):
    """From 512 bytes on the reader sees the destination itself."""
    assert setup.mm.policy.bounce_max_bytes == 512
    src = Source(b"x" * n_bytes)
    with pytest.raises(GuestFaultError) as caught:
        copy_out_from(setup.mm, AddrRange(HOLE, HOLE + n_bytes), src, opts=BOUNCED)
    assert caught.value.addr == HOLE
    assert src.calls == ([511] if n_bytes == 511 else [])


@pytest.mark.parametrize(
    "opts",
    [IOOpts(mechanism="internal"), IOOpts(mechanism="walk", address_space_active=False),
     IOOpts(mechanism="mirror", ignore_permissions=True), IOOpts()],
    ids=repr,
)  # fmt: skip
def test_who_does_not_use_a_buffer(setup: Setup, opts: IOOpts):
    src = Source(b"x")
    with pytest.raises(GuestFaultError):
        copy_out_from(setup.mm, AddrRange(HOLE, HOLE + 1), src, opts=opts)
    assert not src.calls
