"""Errors of copies: whoever catches one has let go of everything, without the collector."""

from __future__ import annotations

import contextlib
import errno
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import (
    ArenaExhaustedError,
    GuestAlignmentError,
    GuestBusError,
    GuestFaultError,
    HostBufferError,
)
from kvmmm.hostarch.addr import page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.vector import copy_in_to, copy_out_from
from tests.fakes import FakeFile, FakeMappable
from tests.mm.copying import MECHANISMS, N_BYTES, PAGE, START, CutFile, Ground, through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AT = START + (64 << 20)
FULL = START + (128 << 20)
SAID = START + (256 << 20)


class Full(FakeMappable):
    """Says so, each time anew, of what is behind its end."""

    code = errno.ENOSPC

    @property
    def error(self) -> OSError:
        return OSError(self.code, "the disk is full")

    @error.setter
    def error(self, _error: OSError) -> None:
        pass


class Short(Full):
    code = errno.EIO


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """A file of one page at AT, more memory than there is at FULL, a mappable's error at SAID."""
    with Ground(arena_bytes=8 << 20, max_addr=1 << 30) as made:
        made.mm.ensure_pmas_exist(START, N_BYTES)
        made.map(AT, 2 * PAGE, mappable=Short(FakeFile(PAGE)), private=True)
        made.map(SAID, 2 * PAGE, mappable=Full(FakeFile(PAGE)), private=True)
        for addr in (AT, SAID):
            made.mm.ensure_pmas_exist(addr, PAGE)
        made.map(FULL, 64 << 20)
        with contextlib.suppress(ArenaExhaustedError):
            made.mm.ensure_pmas_exist(FULL, 64 << 20)
        yield made
        for addr, n_bytes in ((AT, 2 * PAGE), (FULL, 64 << 20), (SAID, 2 * PAGE)):
            made.mm.munmap(addr, n_bytes)


FAULTS: dict[str, tuple[int, type[OSError]]] = {
    "a hole": (START + N_BYTES - 8, GuestFaultError),
    "a file ends": (AT + PAGE - 8, GuestBusError),
    "no memory": (FULL + (63 << 20), ArenaExhaustedError),
    "a mappable": (SAID + PAGE - 8, OSError),
    "beyond all addresses": ((1 << 30) - 8, GuestFaultError),
}
COPIES: dict[str, Callable[[Any, int, dict[str, Any]], object]] = {
    "copy_in": lambda mm, addr, how: mm.copy_in(addr, bytearray(64), **how),
    "copy_out": lambda mm, addr, how: mm.copy_out(addr, bytes(64), **how),
    "read": lambda mm, addr, how: mm.read(addr, 64, **how),
    "swap": lambda mm, addr, how: mm.swap_uint32(page_up(addr), 1, **how),
    "many": lambda mm, addr, how: mm.copy_out_many([(addr, bytes(64))], **how),
    "reader": lambda mm, addr, how: copy_out_from(mm, AddrRange(addr, addr + 64), bytes(64), **how),
    "writer": lambda mm, addr, how: copy_in_to(
        mm, AddrRange(addr, addr + 64), bytearray(64), **how
    ),
}


def is_let_go(call: Callable[[], object], kind: type[OSError]) -> bool:
    """Whether the caller's frame is gone once the error is."""

    class Thing:
        pass

    refs = []

    def act() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        call()

    def catch() -> None:
        try:
            act()
        except kind:
            return
        raise AssertionError("nothing was raised")

    gc.collect()
    gc.disable()
    try:
        catch()
        return refs[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("copy", COPIES)
def test_nothing_is_kept(ground: Ground, copy: str, fault: str, mechanism: str):
    addr, kind = FAULTS[fault]
    assert is_let_go(lambda: COPIES[copy](ground.mm, addr, through(mechanism)), kind)


def test_nothing_is_kept_by_others(ground: Ground):
    with CutFile(4, 1) as cut:
        out = is_let_go(lambda: ground.mm.copy_out(START, cut.map), HostBufferError)
    assert out
    assert is_let_go(lambda: ground.mm.swap_uint32(START + 1, 1), GuestAlignmentError)
    assert is_let_go(lambda: ground.mm.ensure_pmas_exist(FULL, 64 << 20), ArenaExhaustedError)
    assert is_let_go(lambda: ground.mm.ensure_pmas_exist(AT, 2 * PAGE), GuestBusError)
