"""`Draw`: arguments for one case, near-valid most of the time, from a generator of its own."""
# ruff: noqa: ANN401 - arguments are of any type

from __future__ import annotations

import array
import gc
import mmap
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmmm.errors import KvmmmError
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.safemem import ffi

from .disturb import REGIONS, disturb
from .hostile import Exporter, HostileError, Index, LyingList, Truth
from .world import BIG, BIG_BYTES, MARGIN_BYTES, MAX_ADDR, N_PAGES, PLAIN

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from kvmmm.mm import MemoryManager

    from .world import World

_EDGES = (
    0, 1, 4095, 4096, MAX_ADDR - 1, MAX_ADDR, MAX_ADDR + 1, 1 << 31, 1 << 32, 1 << 47, 1 << 57,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, 1 << 64, (1 << 64) + PLAIN, 1 << 65,
    -1, -4096, -(1 << 63), -(1 << 64), 10**40, sys.maxsize,
)  # fmt: skip
_LENGTHS = (
    0, 1, 2, 3, 4, 7, 8, 63, 64, 65, 511, 512, 4095, 4096, 4097, 8192, 32767, 32768, 65535, 65536,
    100_000,
)  # fmt: skip
_FORMATS = "bBhHiIqQfd?"


class Draw:
    """Everything random about one case.

    Args:
        world: Where things are.
        rng: Of this case alone.
        is_alone: No other thread makes cases: then buffers may be resized, and threads be left out.

    Attributes:
        temporary: Buffers that were made for this case: their references are counted afterwards.
        was_blank: Its manager, or its ranges, have never been made.
    """

    def __init__(self, world: World, rng: random.Random, *, is_alone: bool) -> None:
        self.world = world
        self.rng = rng
        self.is_alone = is_alone
        self.temporary: list[object] = []
        self.was_blank = False

    def __repr__(self) -> str:
        return "draw"

    def mm(self) -> MemoryManager:
        """Return a manager; rarely one that was never made."""
        if self.rng.random() < 0.004:
            self.was_blank = True
            return self.world.blank
        return self.rng.choice(self.world.mms)

    # ---- numbers ----

    def addr(self) -> Any:
        """Return a guest address; rarely something else."""
        kind = self.rng.random()
        if kind < 0.06:
            return self.rng.choice(_EDGES) - self.rng.choice((0, 0, 0, 1, 3, 4, 8, 100))
        if kind < 0.12:
            return self.not_a_number(self.near())
        return self.near()

    def near(self) -> int:
        """Return an address in or at the edge of what is mapped."""
        rng = self.rng
        if rng.random() < 0.25:
            return BIG + rng.randrange(-64, BIG_BYTES + 64)
        page = rng.choice(REGIONS) + rng.randrange(N_PAGES + 1) * PAGE_BYTES
        return page + rng.choice((0, 0, 0, 1, 4, 100, 2048, 4092, 4095, -1, -4, -64))

    def word_addr(self) -> Any:
        """Return the address of a word, mostly aligned."""
        addr = self.addr()
        return addr & ~3 if type(addr) is int and self.rng.random() < 0.8 else addr

    def length(self) -> Any:
        """Return a length; rarely an impossible one, or something else."""
        kind = self.rng.random()
        if kind < 0.05:
            return self.rng.choice(_EDGES)
        if kind < 0.1:
            return self.not_a_number(self.rng.choice(_LENGTHS))
        return self.rng.choice(_LENGTHS) + self.rng.choice((0, 0, 1, 5))

    def uint32(self) -> Any:
        """Return a value for a word."""
        if self.rng.random() < 0.1:
            return self.not_a_number(7)
        return self.rng.choice((0, 1, 7, 0xFFFF_FFFF, 0x8000_0000, 1 << 32, -1, 1 << 64))

    def not_a_number(self, value: int) -> Any:
        """Return something in place of a number; some of these stand for `value`."""
        rng = self.rng
        pick = rng.randrange(9)
        if pick < 3:
            return Index(value, *self.act())
        if pick == 3:
            return Index(rng.choice((None, 1.5, "4", True, 1 << 70)), _nothing, "strange")
        return (None, 1.5, "16", True, b"\x01")[pick - 4]

    def act(self) -> tuple[Callable[[], object], str]:
        """Return something to be done in the middle of a call, and its name."""
        choice = self.rng.choice
        acts: list[tuple[Callable[[], object], str]] = [
            (_nothing, "quiet"), (_raise_hostile, "raises"), (_interrupt, "interrupts"),
            (gc.collect, "collects"), (self._disturb, "disturbs"), (self._copy, "copies"),
        ]  # fmt: skip
        if self.is_alone:
            acts += [(self._shrink, "shrinks"), (self._release, "releases")]
        return choice(acts)

    def _disturb(self) -> None:
        disturb(self.world, self.rng)

    def _copy(self) -> None:
        with suppress(KvmmmError):
            self.rng.choice(self.world.mms).read(PLAIN, 100)

    def _shrink(self) -> None:
        for thing in self.temporary:
            if isinstance(thing, bytearray):
                del thing[len(thing) // 2 :]

    def _release(self) -> None:
        for thing in self.temporary:
            if isinstance(thing, memoryview):
                thing.release()

    # ---- buffers ----

    def target(self) -> Any:
        """Return something to copy to."""
        return self._buffer(writable=True)

    def source(self) -> Any:
        """Return something to copy from."""
        if self.rng.random() < 0.1:
            return self.rng.choice(("", "text", "\u20ac" * 40, "\ud800", "x" * 70_000))
        return self._buffer(writable=False)

    def _buffer(self, *, writable: bool) -> Any:
        kind = self.rng.random()
        if kind < 0.55:
            made = self._slice()
        elif kind < 0.7:
            made = self._plain(writable=writable)
        elif kind < 0.78:
            made = self._typed()
        elif kind < 0.86:
            made = self._file()
        elif kind < 0.9:
            made = self._guests()
        else:
            made = self._no_buffer()
        if isinstance(made, (bytes, bytearray, memoryview, array.array, mmap.mmap)):
            self.temporary.append(made)
        return made

    def _slice(self) -> memoryview:
        # Of a buffer with canaries around it: what is written beyond it shows.
        buffer = self.rng.choice(self.world.buffers)
        room = len(buffer) - 2 * MARGIN_BYTES
        n_bytes = min(self.rng.choice(_LENGTHS), room)
        start = MARGIN_BYTES + min(self.rng.choice((0, 0, 1, 7, 4095, room)), room - n_bytes)
        return memoryview(buffer)[start : start + n_bytes]

    def _plain(self, *, writable: bool) -> Any:
        n_bytes = self.rng.choice(_LENGTHS)
        return bytearray(n_bytes) if writable or self.rng.random() < 0.5 else bytes(n_bytes)

    def _typed(self) -> Any:
        rng = self.rng
        code: Any = rng.choice(_FORMATS)
        n_items = rng.choice((0, 1, 6, 24, 1200))
        if rng.random() < 0.3 and code != "?":
            return array.array(code, bytes(n_items * 8))
        view: memoryview[Any] = memoryview(bytearray(n_items * 8)).cast(code)
        if n_items == 24 and rng.random() < 0.7:
            raw = view.cast("B")
            return raw.cast(code, [2, 3, len(raw) // 6 // view.itemsize])
        return view

    def _file(self) -> Any:
        # A mapping that may be cut short: whole, or a piece of it.
        whole = self.world.host_map
        if self.rng.random() < 0.3:
            return whole
        start = self.rng.choice((0, 1, 100, 4095, 4096, 12_289))
        return memoryview(whole)[start : start + self.rng.choice((0, 8, 4096, 9000, 1 << 20))]

    def _guests(self) -> memoryview:
        # The guest's own memory: source and target may overlap.
        pins = list(self.world.pins)  # another thread may take one
        if pins and self.rng.random() < 0.7:
            whole = self.rng.choice(pins)
            start = self.rng.randrange(len(whole))
            return whole[start : start + self.rng.choice(_LENGTHS)]
        view = self.world.arena.view
        start = self.rng.randrange(len(view))
        return view[start : start + self.rng.choice(_LENGTHS)].toreadonly()

    def _no_buffer(self) -> Any:
        rng = self.rng
        released = memoryview(b"released")
        released.release()
        closed = mmap.mmap(-1, PAGE_BYTES)
        closed.close()
        strided = memoryview(bytearray(64))[:: rng.choice((2, -1))]
        return rng.choice((
            None, 5, [], [1, 2], {}, object(), released, closed, strided, strided.toreadonly(),
            memoryview(b"constant"), Exporter(HostileError("a buffer")), Exporter(5),
            memoryview(bytearray(8)).cast("B", [2, 4]), type, Index(8, _nothing, "quiet"),
        ))  # fmt: skip

    # ---- the rest ----

    def options(self) -> dict[str, Any]:
        """Return keywords of a copy: mostly none."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.5:
            return {}
        if kind < 0.6:
            return {"ignore_permissions": rng.choice((True, False, 1, None, "x", Truth()))}
        if kind < 0.97:
            mechanism = rng.choice((None, "internal", "walk", "mirror"))
            opts = ffi.IOOpts(
                ignore_permissions=rng.random() < 0.2, address_space_active=rng.random() < 0.8,
                mechanism=mechanism,
            )  # fmt: skip
            return {"opts": opts}
        return rng.choice((
            {"opts": "walk"}, {"opts": None}, {"opts": 5, "ignore_permissions": True},
            {"nonsense": 1}, {"opts": Truth()},
        ))  # fmt: skip

    def pieces(self, *, with_data: bool) -> Any:
        """Return what a batch is made of: [(addr, n)] or [(addr, data)], or something like it."""
        rng = self.rng
        made: list[Any] = []

        def item() -> Any:
            return self.source() if with_data else self.length()

        made += [(self.addr(), item()) for _ in range(rng.choice((0, 1, 2, 3, 10, 70)))]
        kind = rng.random()
        if kind < 0.7:
            return made
        if kind < 0.75:
            made.insert(rng.randrange(len(made) + 1), (Index(PLAIN, made.clear, "clears"), item()))
            return made
        if kind < 0.8:
            made.insert(0, (PLAIN, Index(8, made.clear, "clears")))
            return made
        wrong = rng.choice(((), (1,), (1, 2, 3), None, 5, [PLAIN, 8], "ab", b"ab"))
        return rng.choice((
            tuple(made), iter(made), (pair for pair in made), dict.fromkeys((1, 2)),
            LyingList(made), None, 5, "pieces", [*made, wrong], [wrong, *made], [(PLAIN, [])],
            range(3),
        ))  # fmt: skip


def _nothing() -> None:
    pass


def _raise_hostile() -> None:
    raise HostileError("an index")


def _interrupt() -> None:
    raise KeyboardInterrupt
