"""A memory manager and its forks, over one arena: checked together, closed together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from kvmmm.hostarch.access import READ_WRITE
from kvmmm.mm import MemoryManager
from kvmmm.mm.debug import check_invariants
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from types import TracebackType

    from kvmmm.arena import Arena

HUGE = 2 << 20
PAGE = 4096
MAX = 256 << 20


class Process:
    """One memory manager, and a CPU on its address space."""

    def __init__(self, mm: MemoryManager, space: FakeAddressSpace) -> None:
        self.mm = mm
        self.space = space
        space.on_fault = mm.handle_user_fault

    def load(self, addr: int, length_bytes: int) -> bytes:
        return self.space.load(addr, length_bytes)

    def store(self, addr: int, data: bytes) -> None:
        self.space.store(addr, data)

    def map(self, start: int, end: int, perms: int = READ_WRITE, **more: Any) -> None:
        self.mm.mmap(end - start, perms, addr=start, fixed=True, replace=True, **more)

    def pmas(self) -> list[tuple[int, int, bool]]:
        """(start, end, need_cow)."""
        return [(start, end, pma.need_cow) for start, end, pma in self.mm.pmas]

    def offset(self, addr: int) -> int:
        """Where the page of `addr` lies in its file."""
        found = self.mm.pmas.find(addr)
        assert found is not None
        return addr + found[2].delta


class Family:
    """`first` and whatever was forked from it; a context manager that checks what is left."""

    def __init__(self, arena: Arena, *, walks_frames: bool = False, **options: Any) -> None:
        self.arena = arena
        self.walks_frames = walks_frames
        self.members: list[Process] = []
        space = FakeAddressSpace(MAX, walks_frames=walks_frames)
        self.first = self._join(MemoryManager(arena, space, **options), space)

    def _join(self, mm: MemoryManager, space: FakeAddressSpace) -> Process:
        self.members.append(Process(mm, space))
        return self.members[-1]

    def fork(self, parent: Process) -> Process:
        space = FakeAddressSpace(MAX, walks_frames=self.walks_frames)
        return self._join(parent.mm.fork(space), space)

    def end(self, one: Process) -> None:
        self.members.remove(one)
        one.space.release()
        one.mm.close()

    def check(self) -> None:
        """Check every member, references exactly, and that no CPU reaches a frame that is free."""
        first, *others = [one.mm for one in self.members]
        check_invariants(first, relatives=others)
        if not others:
            first.check_invariants()
        for one in self.members:
            for page, (file, offset, perms) in one.space.pages.items():
                found = one.mm.pmas.find(page)
                assert found is not None, hex(page)
                assert found[2].file is file
                assert page + found[2].delta == offset
                assert not perms & ~found[2].effective_perms

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        if error is None:
            self.check()
        for one in list(self.members):
            self.end(one)
        used_bytes = self.arena.statistics().used_bytes
        self.arena.close()
        assert error is not None or used_bytes == 0
