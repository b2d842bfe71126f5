"""The entry points of a `MemoryManager`: how each is called, and what its answer must say."""
# ruff: noqa: ANN401 - arguments are of any type

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError, HostBufferError, StateError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm.vector import copy_in_to, copy_out_from

from .disturb import disturb
from .hostile import show
from .world import MARGIN_BYTES, MAX_ADDR, PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm import MemoryManager
    from kvmmm.safemem.block import BlockSeq

    from .draw import Draw

_MAX_PINS = 3


class Call:
    """One call to be made.

    Args:
        function: What is called.
        args: With these,
        options: and these.
        addr: Where a copy of one piece begins; None for anything else.
        n_bytes: Its length, if that is known.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, addr: Any = None,
        n_bytes: int | None = None, options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.function = function
        self.args = args
        self.options = options or {}
        self.addr = addr
        self.n_bytes = n_bytes

    def __str__(self) -> str:
        words = [show(a) for a in self.args]
        words += [f"{name}={show(value)}" for name, value in self.options.items()]
        return f"({', '.join(words)})"

    def make(self) -> object:
        """Make it."""
        return self.function(*self.args, **self.options)

    def judge_error(self, error: BaseException) -> str:
        """Return what is wrong about an error that is of a kind that may be; empty for nothing."""
        if isinstance(error, HostBufferError):
            # In a batch the offset is within one buffer, and what came before it counts as done.
            most = error.offset if getattr(error, "item", 0) == 0 else error.done
            if error.offset < 0 or not 0 <= error.done <= most:
                return f"offset {error.offset} after {error.done} bytes"
        if type(self.addr) is not int or not isinstance(error, GuestFaultError):
            return ""
        is_inside = self.n_bytes is not None and 0 <= self.n_bytes <= MAX_ADDR - self.addr
        if self.n_bytes is None:
            # Of an unknown length: perhaps it ends beyond the end, perhaps not.
            is_inside = error.addr < MAX_ADDR
        if self.addr < 0 or not is_inside:
            right = error.done == 0 and (self.addr < 0 or error.addr >= MAX_ADDR)
        else:
            right = error.addr == self.addr + error.done
            right = right and (self.n_bytes is None or 0 <= error.done < self.n_bytes)
        return "" if right else f"wrong address {error.addr:#x} after {error.done} bytes"

    def judge_result(self, result: object) -> str:
        """Return what is wrong about a result; empty for nothing."""
        if self.n_bytes is None:
            return ""
        got = len(result) if isinstance(result, bytes) else result
        return "" if got == self.n_bytes else f"{got} bytes, and not {self.n_bytes}"


def _copy_in(d: Draw) -> Call:
    addr, dst = d.addr(), d.target()
    return Call(d.mm().copy_in, addr, dst, addr=addr, options=d.options())


def _copy_out(d: Draw) -> Call:
    addr, src = d.addr(), d.source()
    function = d.rng.choice((d.mm().copy_out, d.mm().write))
    return Call(function, addr, src, addr=addr, options=d.options())


def _read(d: Draw) -> Call:
    addr, n_bytes = d.addr(), d.length()
    known = n_bytes if type(n_bytes) is int else None
    return Call(d.mm().read, addr, n_bytes, addr=addr, n_bytes=known, options=d.options())


def _zero_out(d: Draw) -> Call:
    addr, n_bytes = d.addr(), d.length()
    known = n_bytes if type(n_bytes) is int else None
    return Call(d.mm().zero_out, addr, n_bytes, addr=addr, n_bytes=known, options=d.options())


def _plain_copies(d: Draw) -> Call:
    # What can only succeed, or fail at a known place: the sizes are checked, too.
    addr, buffer = d.near(), d.rng.choice(d.world.buffers)
    room = len(buffer) - 2 * MARGIN_BYTES
    n_bytes = min(d.rng.choice((1, 64, 4096, 9000, 80_000)), room)
    start = MARGIN_BYTES + (0 if d.rng.random() < 0.5 else room - n_bytes)
    view = memoryview(buffer)[start : start + n_bytes]
    d.temporary.append(view)
    function = d.mm().copy_in if d.rng.random() < 0.5 else d.mm().copy_out
    return Call(function, addr, view, addr=addr, n_bytes=n_bytes)


def _ranges(d: Draw) -> Any:
    rng = d.rng
    kind = rng.random()
    if kind < 0.06:
        return rng.choice((None, 5, [], [AddrRange(PLAIN, PLAIN + 8)], "ranges", object()))
    if kind < 0.1:
        d.was_blank = True
        return AddrRangeSeq.__new__(AddrRangeSeq)
    found = []
    for _ in range(rng.choice((0, 1, 2, 3, 16))):
        start = rng.choice((d.near(), d.near(), d.near(), MAX_ADDR, MAX_ADDR + 4096, (1 << 64) - 8))
        n_bytes = min(rng.choice((0, 0, 1, 8, 64, 4096, 70_000)), (1 << 64) - start)
        found.append(AddrRange(max(start, 0), max(start, 0) + n_bytes))
    ranges = AddrRangeSeq(found)
    if kind < 0.2 and ranges.n_ranges:
        ranges = ranges.drop_first(rng.randrange(10)).take_first(rng.choice((0, 5, 100)))
    elif kind < 0.26 and hasattr(ranges, "packed"):
        forged = (b"", b"x", bytes(16), b"\xff" * 32, ranges.packed[:-1], None, 5, bytearray(16))
        ranges.packed = rng.choice(forged)  # type: ignore[assignment]  # that is the point
    return ranges


def _vec(d: Draw) -> Call:
    ranges = _ranges(d)
    n_bytes = getattr(ranges, "n_bytes", 0)
    if d.rng.random() < 0.8 and isinstance(n_bytes, int) and n_bytes < 1 << 20:
        buffer: Any = bytearray(n_bytes)
        d.temporary.append(buffer)
    else:
        buffer = d.target()
    function = d.mm().copy_in_vec if d.rng.random() < 0.5 else d.mm().copy_out_vec
    return Call(function, ranges, buffer, options=d.options())


def _many(d: Draw) -> Call:
    with_data = d.rng.random() < 0.5
    function = d.mm().copy_out_many if with_data else d.mm().copy_in_many
    return Call(function, d.pieces(with_data=with_data), options=d.options())


def _swap(d: Draw) -> Call:
    return Call(d.mm().swap_uint32, d.word_addr(), d.uint32(), options=d.options())


def _cas(d: Draw) -> Call:
    function = d.mm().compare_and_swap_uint32
    return Call(function, d.word_addr(), d.uint32(), d.uint32(), options=d.options())


def _load(d: Draw) -> Call:
    return Call(d.mm().load_uint32, d.word_addr(), options=d.options())


def _pin(d: Draw) -> Call:
    return Call(_keep_pin, d, d.mm(), d.near(), d.rng.choice((1, 4096, 9000, 70_000)))


def _keep_pin(d: Draw, mm: MemoryManager, addr: int, n_bytes: int) -> None:
    # For later cases; the oldest goes.
    pins = d.world.pins
    pins.append(mm.pin(addr, n_bytes, writable=d.rng.random() < 0.8))
    if len(pins) > _MAX_PINS:
        pins.pop(0)


def _nothing() -> None:
    pass


class _Stream:
    # A Reader and a Writer that does something first, and tells more or fewer bytes than it moved.

    def __init__(self, d: Draw) -> None:
        self._act, self._label = d.act()
        if self._label == "disturbs" and not d.is_alone:
            # It may wait for a file's lock, and who has that for those who wait for Readers.
            self._act, self._label = _nothing, "quiet"
        self._tells = d.rng.choice((None, None, None, 0, 5, -1, 1 << 64, "x"))

    def read_to_blocks(self, dsts: BlockSeq, /) -> Any:
        with suppress(StateError):
            self._act()
        n_bytes = dsts.copy_from(b"stream" * 700)
        return n_bytes if self._tells is None else self._tells

    def write_from_blocks(self, srcs: BlockSeq, /) -> Any:
        with suppress(StateError):
            self._act()
        n_bytes = srcs.copy_to(bytearray(4200))
        return n_bytes if self._tells is None else self._tells

    def __repr__(self) -> str:
        return f"Stream({self._label}, tells {self._tells})"


def _stream(d: Draw) -> Call:
    function = d.rng.choice((copy_out_from, copy_in_to))
    ranges = _ranges(d)
    if d.rng.random() < 0.4:
        start = d.near()
        ranges = AddrRange(start, start + d.rng.choice((0, 1, 100, 5000)))
    d.was_blank = True  # these are Python, and typed: what is of no such type fails as it likes
    end = _Stream(d) if d.rng.random() < 0.7 else d.source()
    return Call(function, d.mm(), ranges, end, options=d.options())


def _wrong_count(d: Draw) -> Call:
    # Too few arguments, or too many; keywords where there are none.
    name = d.rng.choice(_NAMES)
    n = d.rng.choice((0, 1, 3, 4, 5))
    args = [d.rng.choice((d.addr, d.length, d.source))() for _ in range(n)]
    options = {"addr": 5} if d.rng.random() < 0.2 else d.options()
    return Call(getattr(d.mm(), name), *args, options=options)


def _disturb(d: Draw) -> Call:
    return Call(disturb, d.world, d.rng)


_NAMES = (
    "copy_in", "copy_out", "write", "read", "zero_out", "copy_in_vec", "copy_out_vec",
    "copy_in_many", "copy_out_many", "swap_uint32", "compare_and_swap_uint32", "load_uint32",
)  # fmt: skip

ENTRIES: dict[str, tuple[int, Callable[[Draw], Call]]] = {
    "copy_in": (12, _copy_in),
    "copy_out": (12, _copy_out),
    "read": (8, _read),
    "zero_out": (6, _zero_out),
    "plain copies": (12, _plain_copies),
    "vec": (8, _vec),
    "many": (8, _many),
    "swap_uint32": (3, _swap),
    "compare_and_swap_uint32": (3, _cas),
    "load_uint32": (3, _load),
    "wrong number of arguments": (2, _wrong_count),
    "pin": (2, _pin),
    "streams": (6, _stream),
    "disturb": (8, _disturb),
}
"""By name: how often, and what makes one."""
