"""A memory manager for hostile copies: all mechanisms, no KVM, and what must hold afterwards."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from typing import TYPE_CHECKING, Any, Self

from kvmmm.arena import Arena
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.mm import MemoryManager
from kvmmm.safemem.ffi import IOOpts
from tools.fuzz.space import TableSpace, Windows

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from kvmmm.mm.policy import Policy

PAGE = 4096
MAX = 1 << 30
START = 16 << 20
N_BYTES = 2 << 20
SPARE = 64 << 20
RELEASES_GIL = 256 << 10
"""A copy of so many bytes runs without the GIL."""
MECHANISMS = ("internal", "walk", "mirror")


def through(mechanism: str) -> dict[str, IOOpts]:
    """Keywords that force a mechanism."""
    return {"opts": IOOpts(mechanism=mechanism)}


class Ground:
    """[START, START + N_BYTES) is mapped read-write, in page tables that are walked in software.

    A context manager: at its end nothing may be held, and no frame be lost.
    """

    def __init__(
        self, arena_bytes: int = 32 << 20, max_addr: int = MAX, policy: Policy | None = None
    ) -> None:
        self.arena = Arena(arena_bytes)
        self._windows = Windows(self.arena)
        space = TableSpace(max_addr, self._windows)
        self.mm = MemoryManager(self.arena, space, policy=policy)
        self.map(START, N_BYTES)
        self._children: list[MemoryManager] = []

    def map(self, addr: int, n_bytes: int, perms: int = READ_WRITE, **more: Any) -> None:
        self.mm.mmap(n_bytes, perms, addr=addr, fixed=True, replace=True, **more)

    def fork(self) -> MemoryManager:
        space = self.mm.address_space
        assert isinstance(space, TableSpace)
        self._children.append(self.mm.fork(space.new()))
        return self._children[-1]

    def check_unharmed(self) -> None:
        """Locks are free, nobody is in the read section, copies and removals work."""
        mm = self.mm
        for lock in (mm.mapping_lock, mm.active_lock):
            assert lock.acquire(False), "a lock is held"
            lock.release()
        data = os.urandom(5000)
        for mechanism in MECHANISMS:
            self.map(SPARE, 4 * PAGE)
            assert mm.copy_out(SPARE + 10, data, **through(mechanism)) == len(data)
            assert mm.read(SPARE + 10, len(data), **through(mechanism)) == data
            # It waits for whoever is in the read section; so does the end of a translation.
            within(10, lambda: mm.munmap(SPARE, 4 * PAGE))
        mm.check_invariants()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        if error is None:
            self.check_unharmed()
        for mm in (*self._children, self.mm):
            mm.close()
            mm.address_space.release()
        self._children.clear()
        del mm, self.mm
        self._windows.close()
        gc.collect()
        used_bytes = self.arena.statistics().used_bytes
        self.arena.close()
        assert error is not None or used_bytes == 0


def within(seconds: float, call: Callable[[], object]) -> None:
    """Make a call that may wait for ever, and fail if it takes that long."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as e:  # noqa: BLE001 - told below
            failures.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it has waited for {seconds} seconds"
    if failures:
        raise failures[0]


class CutFile:
    """A mapping of a file of `n_pages` pages; `n_left` are left: touching others is SIGBUS.

    A context manager.
    """

    def __init__(self, n_pages: int, n_left: int) -> None:
        self.fd = os.memfd_create("cut")
        os.ftruncate(self.fd, n_pages * PAGE)
        self.map = mmap.mmap(self.fd, n_pages * PAGE)
        self.map[:] = bytes(range(256)) * (n_pages * 16)
        self.end = n_left * PAGE
        os.ftruncate(self.fd, self.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.map.close()
        os.close(self.fd)
