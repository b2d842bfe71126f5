"""A memory manager over an arena and a fake address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import MmError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm import MemoryManager
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.memmap.file import MappingSpace

HUGE = 2 << 20


class Setup:
    """One of each; `space.on_fault` is the memory manager."""

    def __init__(self, arena_bytes: int, max_addr: int, *, home: bool, **options: Any) -> None:
        self.arena = Arena(arena_bytes)
        self.space = FakeAddressSpace(max_addr)
        reservation = self.arena.reserve(max_addr, align_bytes=HUGE) if home else None
        self.mm = MemoryManager(self.arena, self.space, reservation, **options)
        self.space.on_fault = self.mm.handle_user_fault

    def map(
        self, start: int, end: int, perms: int = READ_WRITE, name: str = "", **more: Any
    ) -> None:
        """Map [start, end), over whatever is there."""
        ar = self.mm.mmap(
            end - start, perms, addr=start, fixed=True, replace=True, name=name, **more
        )
        assert (ar.start, ar.end) == (start, end)

    def vmas(self) -> list[tuple[int, int]]:
        """Where vmas are."""
        return [(start, end) for start, end, _ in self.mm.vmas]

    def snapshot(self) -> dict[str, Any]:
        """All that an operation can change, bytes included."""
        mm = self.mm
        pmas = []
        for start, end, pma in mm.pmas:
            with pma.file.view_of(pma.file_range(start, end)) as view:
                content = hash(bytes(view))
            rules = pma.effective_perms, pma.max_perms, pma.need_cow, pma.private
            pmas.append((start, end, pma.file, pma.delta, rules, content))
        return {
            "vmas": [(start, end, vma.key) for start, end, vma in mm.vmas],
            "pmas": pmas,
            "space": dict(self.space.pages),
            "accounts": (mm.usage_bytes, mm.rss_bytes, mm.data_bytes, mm.locked_bytes),
            "heap": (mm.brk_start, mm.brk_end),
            "modes": (mm.lock_mode, mm.generation),
        }

    def refuses(self, call: Callable[[], object], err: int, operation: str = "") -> MmError:
        """Have an operation be refused with an errno, and nothing be changed by it."""
        before = self.snapshot()
        with pytest.raises(MmError) as caught:
            call()
        assert caught.value.errno == err, caught.value
        assert operation in ("", caught.value.operation)
        assert self.snapshot() == before
        self.check()
        return caught.value

    def check(self) -> None:
        """Check what always holds."""
        mm = self.mm
        mm.check_invariants()
        for counted, real in (
            (mm.usage_bytes, sum(e - s for s, e, _ in mm.vmas)),
            (mm.rss_bytes, sum(e - s for s, e, _ in mm.pmas)),
            (mm.data_bytes, sum(e - s for s, e, v in mm.vmas if v.is_private_data)),
            (mm.locked_bytes, sum(e - s for s, e, v in mm.vmas if v.lock_mode)),
        ):
            assert counted == real

    def close(self) -> None:
        """Close; every frame must be free afterwards."""
        self.mm.close()
        facts = self.arena.statistics()
        self.arena.close()
        assert (facts.used_bytes, facts.reserved_bytes) == (0, 0)


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    """Make memory managers, checked and closed at the end."""
    made: list[Setup] = []

    def build(
        arena_bytes: int = 64 << 20, max_addr: int = 256 << 20, *, home: bool = False,
        **options: Any,
    ) -> Setup:  # fmt: skip
        made.append(Setup(arena_bytes, max_addr, home=home, **options))
        return made[-1]

    yield build
    for one in made:
        one.check()
        one.close()


class Recorder(SharedMemory):
    """A mappable that writes down who maps what of it.

    Attributes:
        calls: (what, start, end, offset, writable), in order; msync with offsets only.
        refuse: Raised by the next call that maps.
    """

    max_shared_perms = 7

    def __init__(self, arena: Arena, length_bytes: int, name: str = "recorder") -> None:
        super().__init__(arena, length_bytes, name)
        self.calls: list[tuple[Any, ...]] = []
        self.refuse: OSError | None = None
        self.before: Callable[[str], object] = lambda _what: None

    def _note(self, what: str, ar: AddrRange, offset: int, *, writable: bool) -> None:
        self.before(what)
        self.calls.append((what, ar.start, ar.end, offset, writable))

    def add_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        self._refuse()
        self._note("add", ar, offset, writable=writable)
        super().add_mapping(space, ar, offset, writable=writable)

    def remove_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        self._note("remove", ar, offset, writable=writable)
        super().remove_mapping(space, ar, offset, writable=writable)

    def copy_mapping(
        self, space: MappingSpace, src: AddrRange, dst: AddrRange, offset: int, *, writable: bool
    ) -> None:
        del src
        self._refuse()
        self._note("copy", dst, offset, writable=writable)
        super().add_mapping(space, dst, offset, writable=writable)

    def msync(self, start: int, end: int) -> None:
        self.before("msync")
        self.calls.append(("msync", start, end))

    def _refuse(self) -> None:
        if self.refuse is not None:
            error, self.refuse = self.refuse, None
            raise error
