"""Vectored copies against a model in bytes, by internal mappings and through a buffer alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.arena import Arena
from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.mm.vector import copy_in_to, copy_out_from
from kvmmm.safemem.ffi import IOOpts
from tests.mm.family import Family
from tests.mm.vectors import Sink, Source, seq

if TYPE_CHECKING:
    from tests.mm.family import Process

PAGE = 4096
BASE = 1 << 21
N_PAGES = 6
KINDS = {None: 0, NO_ACCESS: 0, READ: READ, READ_WRITE: READ_WRITE}
"""How a page is mapped, and what that allows."""

LAYOUTS = st.lists(st.sampled_from(list(KINDS)), min_size=N_PAGES, max_size=N_PAGES)
RANGES = st.lists(
    st.tuples(
        st.integers(0, N_PAGES), st.integers(-20, 20), st.sampled_from([0, 1, 7, 30, 150]),
    ),
    max_size=4,
)  # fmt: skip


class World:
    """Pages of all kinds, with different bytes, some of them shared with a child since a fork."""

    def __init__(self, family: Family, layout: list[int | None], forked: bool) -> None:
        self.layout = layout
        self.one: Process = family.first
        self.one.map(BASE, BASE + N_PAGES * PAGE)
        data = b"".join(bytes([65 + i]) * PAGE for i in range(N_PAGES // 2))
        self.one.mm.copy_out(BASE, data)  # the others are not backed yet
        self.bytes = bytearray(data + bytes((N_PAGES - N_PAGES // 2) * PAGE))
        self.child = family.fork(self.one) if forked else None
        self.child_bytes = bytes(self.bytes)
        for i, kind in enumerate(layout):
            if kind is None:
                self.one.mm.munmap(BASE + i * PAGE, PAGE)
            else:
                self.one.mm.mprotect(BASE + i * PAGE, PAGE, kind)

    def usable(self, addrs: list[int], access: int) -> int:
        """How many of the bytes at these places come before the first that forbids it."""
        for n_bytes, at in enumerate(addrs):
            page = at // PAGE
            if not 0 <= page < N_PAGES or access & ~KINDS[self.layout[page]]:
                return n_bytes
        return len(addrs)

    def check(self) -> None:
        for i, kind in enumerate(self.layout):
            if kind is not None:
                at = i * PAGE
                found = self.one.mm.read(BASE + at, PAGE, ignore_permissions=True)
                assert found == self.bytes[at : at + PAGE]
        if self.child is not None:
            assert self.child.mm.read(BASE, N_PAGES * PAGE) == self.child_bytes


@pytest.mark.parametrize("opts", [None, IOOpts(mechanism="walk")], ids=["internal", "buffer"])
@pytest.mark.parametrize("by_buffer", [False, True], ids=["stream", "bytes"])
@settings(max_examples=100, deadline=None)
@given(
    layout=LAYOUTS,
    forked=st.booleans(),
    copies=st.lists(st.tuples(RANGES, st.integers(0, 400), st.booleans()), max_size=4),
)
def test_model(
    opts: IOOpts | None, by_buffer: bool, layout: list[int | None], forked: bool,
    copies: list[tuple[list[tuple[int, int, int]], int, bool]],
):  # fmt: skip
    with Family(Arena(64 << 20)) as family:
        world = World(family, layout, forked)
        for number, (ranges, n_there, is_out) in enumerate(copies):
            pairs = [
                (max(page * PAGE + offset, 0), length_bytes)
                for page, offset, length_bytes in ranges
            ]
            ars = seq(*((BASE + at, BASE + at + n) for at, n in pairs))
            addrs = [at + i for at, n in pairs for i in range(n)]
            usable = world.usable(addrs, WRITE if is_out else READ)
            done = min(usable, n_there)
            fails = usable < len(addrs) and done == usable
            error = None
            if is_out:
                data = bytes((number * 50 + i) & 0xFF for i in range(n_there))
                src = data if by_buffer else Source(data)
                try:
                    n_bytes = copy_out_from(world.one.mm, ars, src, opts=opts)
                except GuestFaultError as e:
                    error, n_bytes = e, e.done
                for at, byte in zip(addrs[:done], data, strict=False):
                    world.bytes[at] = byte
            else:
                sink = Sink(n_there)
                dst = bytearray(n_there)
                try:
                    n_bytes = copy_in_to(world.one.mm, ars, dst if by_buffer else sink, opts=opts)
                except GuestFaultError as e:
                    error, n_bytes = e, e.done
                found = bytes(dst[:done]) if by_buffer else sink.data
                assert found == bytes(world.bytes[at] for at in addrs[:done])
            assert n_bytes == done
            assert (error is not None) == fails
            if error is not None:
                assert error.addr == BASE + addrs[usable]
                page = addrs[usable] // PAGE
                assert error.mapped == (page < N_PAGES and layout[page] is not None)
            world.check()
