"""`World`: memory managers that live, the files behind them, and host buffers to copy with."""
# ruff: noqa: ANN401, S101 - who calls looks for AssertionError

from __future__ import annotations

import gc
import mmap
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, KvmmmError, MmError
from kvmmm.hostarch.access import EXECUTE, NO_ACCESS, READ, READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.memmap.host_file import HostFile
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm import MemoryManager
from kvmmm.mm.debug import check_invariants
from kvmmm.mm.pin import release_waiting
from kvmmm.mm.policy import Policy
from kvmmm.safemem import ffi

from .space import BareSpace, TableSpace, Windows

if TYPE_CHECKING:
    import random

MAX_ADDR = 1 << 30
ARENA_BYTES = 48 << 20
PLAIN, PATCHES, FILED, SHARED, BIG, LAST = (
    0x100_0000, 0x200_0000, 0x300_0000, 0x380_0000, 0x400_0000, MAX_ADDR - 4 * PAGE_BYTES,
)  # fmt: skip
"""Where things are mapped at first: a few pages each, `BIG` 4 MiB, `LAST` up to the very end."""
N_PAGES = 16
BIG_BYTES = 4 << 20
BUFFER_BYTES = (64, 4096, 3 * 4096 + 7, 80 << 10, 300 << 10)
SOLID_PAGES = 8
MARGIN_BYTES = 64
_CANARY = bytes([0xA5]) * MARGIN_BYTES
_FILE_PAGES = 8
_LOCK_SECONDS = 20.0
_PATCHES = (READ_WRITE, READ, NO_ACCESS, READ_WRITE, EXECUTE, None)
_MAX_FAMILY = 3


class World:
    """All that the cases of one epoch share.

    Args:
        has_tables: Whether address spaces are page tables, or nothing.
        policy: Numbers for `Policy`.

    Attributes:
        mms: The first one and its forks; some may be closed.
        blank: A manager whose `__init__` has never run.
        buffers: Host buffers; in the margins at both ends nobody has any business.
        host_map: A mapping of a file that is cut short again and again.
        host_map_at: Its host address and length.
        solid_fd: A file that is not. Its pages are filled with 1, 2, and so on.
        window: A mirror of its pages alone.
        pins: Guest memory that is pinned: buffers for other cases.
    """

    def __init__(self, *, has_tables: bool, policy: dict[str, int]) -> None:
        self.arena = Arena(ARENA_BYTES)
        self._windows = Windows(self.arena) if has_tables else None
        windows = self._windows
        space = BareSpace(MAX_ADDR) if windows is None else TableSpace(MAX_ADDR, windows)
        self.policy = Policy(**policy)  # type: ignore[arg-type]
        self.mms = [MemoryManager(self.arena, space, policy=self.policy)]
        self._closed: list[MemoryManager] = []
        self.blank = MemoryManager.__new__(MemoryManager)
        self.buffers = [bytearray(_CANARY + bytes(n) + _CANARY) for n in BUFFER_BYTES]
        self.pins: list[memoryview] = []
        self._guest_fd = os.memfd_create("fuzz-guest")
        os.ftruncate(self._guest_fd, _FILE_PAGES * PAGE_BYTES)
        self.file = HostFile(self._guest_fd, name="guest-file")
        self._host_fd = os.memfd_create("fuzz-host")
        os.ftruncate(self._host_fd, _FILE_PAGES * PAGE_BYTES)
        self.host_map = mmap.mmap(self._host_fd, _FILE_PAGES * PAGE_BYTES)
        self.solid_fd = os.memfd_create("fuzz-solid")
        os.ftruncate(self.solid_fd, SOLID_PAGES * PAGE_BYTES)
        for n in range(SOLID_PAGES):
            os.pwrite(self.solid_fd, bytes([n + 1]) * PAGE_BYTES, n * PAGE_BYTES)
        self.window = ffi.MirrorWindow(3 << 30)
        at = ffi.address_of(ffi.ffi.from_buffer(self.host_map))
        self.host_map_at = (at, _FILE_PAGES * PAGE_BYTES)
        self.shared = SharedMemory(self.arena, N_PAGES * PAGE_BYTES)
        self.map_all(self.mms[0])

    def __repr__(self) -> str:
        return "world"

    def map_all(self, mm: MemoryManager) -> None:
        """Map everything as it is at the beginning, over whatever is there."""
        size = N_PAGES * PAGE_BYTES
        self._map(mm, PLAIN, size)
        self._map(mm, BIG, BIG_BYTES)
        self._map(mm, LAST, MAX_ADDR - LAST)
        self._map(mm, FILED, _FILE_PAGES * PAGE_BYTES, mappable=self.file, private=False)
        self._map(mm, FILED + size, _FILE_PAGES * PAGE_BYTES, mappable=self.file)
        self._map(mm, SHARED, size, mappable=self.shared, private=False)
        for n in range(N_PAGES):
            perms = _PATCHES[n % len(_PATCHES)]
            if perms is not None:
                self._map(mm, PATCHES + n * PAGE_BYTES, PAGE_BYTES, perms)

    @staticmethod
    def _map(
        mm: MemoryManager, addr: int, length_bytes: int, perms: int = READ_WRITE, **more: Any
    ) -> None:
        mm.mmap(length_bytes, perms, addr=addr, fixed=True, replace=True, **more)

    def fork(self, rng: random.Random) -> None:
        """Fork one, or close a child if there are enough."""
        if len(self.mms) >= _MAX_FAMILY:
            mm = self.mms[rng.randrange(1, len(self.mms))]
            self._close(mm)  # unless this thread is inside a Reader of its
            with suppress(ValueError):  # another thread was quicker
                self.mms.remove(mm)
            return
        parent = rng.choice(self.mms)
        space = parent.address_space
        assert isinstance(space, BareSpace)
        self.mms.append(parent.fork(space.new()))

    def cut(self, rng: random.Random, *, guests: bool) -> None:
        """Cut a file short somewhere, or give it its length back."""
        n_bytes = rng.choice((0, 1, PAGE_BYTES, 3 * PAGE_BYTES + 5, _FILE_PAGES * PAGE_BYTES))
        os.ftruncate(self._guest_fd if guests else self._host_fd, n_bytes)
        if guests and rng.random() < 0.5:
            self.file.revalidate()

    def restore(self) -> None:
        """Give both files their length."""
        for fd in (self._guest_fd, self._host_fd):
            os.ftruncate(fd, _FILE_PAGES * PAGE_BYTES)

    def check(self) -> None:
        """Check all managers: locks that are free, invariants, that removal and copies work.

        Raises:
            AssertionError: What does not hold.
        """
        for n, mm in enumerate(self.mms):
            for name in ("mapping_lock", "active_lock"):
                assert _is_free(getattr(mm, name)), f"mm{n}.{name} is held"
        assert not self.canaries_are_wrong(), self.canaries_are_wrong()
        # Pins may be those of a child that was closed, whom nobody counts.
        self.pins.clear()
        gc.collect()  # hostile arguments are full of cycles
        release_waiting()
        for buffer in self.buffers:
            buffer.append(0)  # BufferError: somebody has not let go of it
            buffer.pop()
        check_invariants(self.mms[0], relatives=self.mms[1:])
        self.restore()
        self.file.revalidate()
        mm = self.mms[0]
        try:
            self.map_all(mm)
            self._check_copies(mm)
        except KvmmmError as e:
            if isinstance(e, MmError | ArenaExhaustedError):
                return  # forks and pins may have taken it all
            raise

    @staticmethod
    def _check_copies(mm: MemoryManager) -> None:
        for addr, n_bytes in ((PLAIN + 1, 5000), (BIG + 4095, 70 << 10), (FILED + 10, 4096)):
            data = bytes(i * 31 & 0xFF for i in range(256)) * (n_bytes // 256)
            assert mm.copy_out(addr, data) == len(data), "a copy out ends early"
            out = bytearray(len(data))
            assert mm.copy_in(addr, out) == len(data), "a copy in ends early"
            assert out == data, f"other bytes at {addr:#x} than were copied there"
            assert mm.zero_out(addr, len(data)) == len(data), "zeroing ends early"
            assert mm.read(addr, len(data)) == bytes(len(data)), f"no zeros at {addr:#x}"

    def canaries_are_wrong(self) -> str:
        """Return which buffer was written beyond what was asked for; empty for none."""
        for buffer in self.buffers:
            if not (buffer.startswith(_CANARY) and buffer.endswith(_CANARY)):
                return f"the margin of the buffer of {len(buffer)} bytes was written"
        return ""

    def close(self) -> None:
        """Release everything.

        Raises:
            AssertionError: A frame is held by nobody.
        """
        self.pins.clear()
        self._close_managers()
        if self._windows is not None:
            self._windows.close()
        gc.collect()  # hostile arguments are full of cycles, and tables lie in the arena
        self.window.release()
        self.host_map.close()
        self.file.close()
        os.close(self._host_fd)
        os.close(self._guest_fd)
        os.close(self.solid_fd)
        facts = self.arena.statistics()
        self.arena.close()
        assert facts.used_bytes == 0, f"{facts.used_bytes} bytes of frames are held by nobody"

    def _close_managers(self) -> None:
        # Again, where another thread has mapped something after the first time.
        for mm in [*self._closed, *self.mms]:
            self._close(mm)
        self._closed.clear()
        self.mms.clear()

    def _close(self, mm: MemoryManager) -> None:
        mm.close()
        self._closed.append(mm)
        mm.address_space.release()


def _is_free(lock: Any) -> bool:
    # By asking again and again: not every lock knows a timeout.
    end = time.monotonic() + _LOCK_SECONDS
    while not lock.acquire(False):
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    lock.release()
    return True
