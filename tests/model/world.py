"""Several memory managers and the model of each, over one backend, with what they share."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, MmError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm import MemoryManager
from kvmmm.mm.layout import Layout, Limits
from tests.model import checks
from tests.model.memory import PAGE, Backing, Cell, Memory, Store
from tests.model.model import Fault, Refusal
from tests.model.operations import ModelMm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.memmap.file import File
    from kvmmm.mm.pin import Pin
    from tests.model.backends import Backend

FILE_PAGES, SHARED_PAGES = 12, 40
MAX_MEMBERS = 4


class Member:
    """A memory manager and its model."""

    def __init__(self, mm: MemoryManager, model: ModelMm) -> None:
        self.mm = mm
        self.model = model


class Pinned:
    """A pin, and what its pages must hold: see `ModelMm.pinned`."""

    def __init__(
        self, pin: Pin, kept: list[tuple[Cell | None, Store | None, int]], access: int
    ) -> None:
        self.pin = pin
        self.kept = kept
        self.access = access
        self.frames: list[tuple[File, int]] = [
            (file, fo) for _, file, fr in pin.ranges for fo in range(fr.start, fr.end, PAGE)
        ]


class World:
    """All of it. `check` and `compare` are to be called between steps, `close` at the end.

    Args:
        backend: Address spaces and CPUs; closed by `close`.
        top_down: Mappings go to high addresses by themselves.
        eager_pages: Anonymous mappings up to that length are backed at once.
    """

    def __init__(self, backend: Backend, *, top_down: bool = False, eager_pages: int = 0) -> None:
        self.backend = backend
        self.arena = backend.arena
        self._top_down = top_down
        self._eager_pages = eager_pages
        self.memory = Memory(FILE_PAGES * PAGE, SHARED_PAGES * PAGE)
        self.fd = os.memfd_create("model", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, FILE_PAGES * PAGE)
        self.file = HostFile(self.fd, name="/file")
        self.read_only = HostFile.open(f"/proc/self/fd/{self.fd}")
        self.read_only.name = "/read-only"
        self.shared = SharedMemory(self.arena, SHARED_PAGES * PAGE, "/shared")
        for backing, real in (
            (self.memory.file, self.file), (self.memory.read_only, self.read_only),
            (self.memory.shared, self.shared),
        ):  # fmt: skip
            backing.real = real
        self.members: list[Member] = []
        self.pins: list[Pinned] = []
        self.start()

    # ---- members ----

    def start(self) -> None:
        """Add a member that is nobody's child."""
        backend = self.backend
        layout = Layout(0, backend.max_addr, top_down=self._top_down)
        limits = Limits()
        model = ModelMm(self.memory, backend.max_addr // PAGE, top_down=self._top_down)
        limits.stack_bytes = model.limits.stack_bytes
        mm = MemoryManager(
            self.arena, backend.new_space(), backend.reservation(), layout=layout, limits=limits,
            eager_bytes=self._eager_pages * PAGE,
        )  # fmt: skip
        backend.attach(mm)
        member = Member(mm, model)
        self.members.append(member)
        hoods = self.backend.hoods
        for page, n, backing, private in (
            (hoods[1], 600, None, True), (hoods[4], 12, None, False),
            (hoods[3], FILE_PAGES, self.memory.file, True),
            (hoods[0], 8, self.memory.file, False),
        ):  # fmt: skip
            self.map(
                member, n * PAGE, READ_WRITE, {"populate": False}, backing=backing,
                private=private, addr=page * PAGE,
            )  # fmt: skip

    def map(
        self, member: Member, n_bytes: int, perms: int, more: dict[str, bool], *,
        backing: Backing | None, **options: Any,
    ) -> None:  # fmt: skip
        """Have a member map something; `more` is of no interest to its model."""
        real = None if backing is None else backing.real
        made = self.agree(
            lambda: member.mm.mmap(n_bytes, perms, mappable=real, **options, **more),
            lambda: member.model.mmap(n_bytes, perms, backing=backing, **options),
        )
        if made:
            mapped = member.model.kinds[made[0] // PAGE].backing
            if mapped is not None and mapped.real is None:
                vma = member.mm.vmas.find_value(made[0])
                assert vma is not None
                mapped.real = vma.mappable

    def fork(self, parent: Member) -> bool:
        """Fork; False where there was no memory for it, and nothing happened."""
        try:
            space = self.backend.new_space()
        except ArenaExhaustedError:
            return False
        try:
            mm = parent.mm.fork(space)
        except ArenaExhaustedError:
            space.release()
            return False
        self.backend.attach(mm)
        self.members.append(Member(mm, parent.model.fork()))
        return True

    def end(self, member: Member) -> None:
        self.members.remove(member)
        self.backend.detach(member.mm)
        member.mm.close()
        member.mm.address_space.release()
        member.model.close()

    def member(self, who: int) -> Member:
        return self.members[who % len(self.members)]

    def page(self, member: Member, at: int) -> int:
        """A page number: in a neighbourhood (below 96), or by one of the member's mappings."""
        if at < 96 or not member.model.kinds:
            hoods = self.backend.hoods
            page = hoods[at // 16 % len(hoods)] + at % 16
        else:
            vmas = member.model.vmas()
            start, end, _ = vmas[(at - 96) // 8 % len(vmas)]
            middle = (start + end) // 2
            page = (start, middle, end - 1, start + 1, end - 2, start, start - 1, end)[at % 8]
        return min(max(page, 0), member.model.n_pages - 1)

    # ---- doing the same twice ----

    def agree(self, real: Callable[[], Any], model: Callable[[], Any]) -> Any:
        """Do it in both: the same answer, or the same refusal.

        Returns:
            The answer; None if it was refused.
        """
        want: Any = None
        refusal: Refusal | Fault | None = None
        try:
            want = model()
        except (Refusal, Fault) as e:
            refusal = e
        got: Any = None
        error: OSError | None = None
        try:
            got = real()
        except (MmError, GuestFaultError) as e:
            error = e
        if isinstance(refusal, Fault):
            self.same_fault(error, refusal, exact=True)
        elif refusal is not None:
            assert error is not None, f"it must fail, {refusal}; it was {got!r}"
            assert (type(error), error.errno) == (refusal.kind, refusal.errno), (
                f"{error!r} instead of {refusal}"
            )
        else:
            assert error is None, f"it fails, {error!r}, and the model says {want!r}"
            if isinstance(got, AddrRange):
                got = got.start, got.end
            assert got == want, f"{got!r} instead of {want!r}"
        return got

    def attempt(self, access: Callable[[], Any]) -> tuple[Any, GuestFaultError | None]:
        """What an access came to."""
        try:
            return access(), None
        except GuestFaultError as e:
            return None, e

    def same_fault(
        self, error: OSError | None, fault: Fault | None, *, exact: bool = False
    ) -> None:
        """Compare what an access was refused with."""
        if fault is None:
            assert error is None, f"{error!r}"
            return
        assert isinstance(error, GuestFaultError), f"{error!r} instead of {fault}"
        assert (type(error), error.mapped) == (fault.kind, fault.mapped), f"{error!r}, {fault}"
        if exact or self.backend.has_exact_faults:
            assert error.addr == fault.addr, f"{error!r} instead of {fault}"
        else:
            assert error.addr // PAGE == fault.addr // PAGE, f"{error!r} instead of {fault}"
        assert not exact or error.done == fault.done, f"{error.done} done instead of {fault}"

    @contextmanager
    def hoarding(self, n_left: int) -> Iterator[None]:
        """Leave only so many pages in the arena."""
        held = []
        try:
            while (free := self.arena.statistics().largest_free_bytes) > n_left * PAGE:
                held.append(self.arena.allocate(free - n_left * PAGE))
                if n_left:
                    break
            yield
        finally:
            for fr in held:
                self.arena.dec_ref(fr)

    # ---- what must hold ----

    def check(self, member: Member | None = None) -> None:
        """Invariants of all; vmas, accounts and translations of one, or of all."""
        if self.members:
            first, *others = [m.mm for m in self.members]
            first.check_invariants(others)
            if not others:
                first.check_invariants()
        for one in self.members if member is None else [member]:
            if one in self.members:
                checks.check_vmas(one.mm, one.model)
                self.backend.check(one.mm)
        checks.check_frames(self)
        for pinned in self.pins:
            self.check_pin(pinned)

    def check_pin(self, pinned: Pinned) -> None:
        page = bytearray(PAGE)
        for (file, fo), (cell, store, index) in zip(pinned.frames, pinned.kept, strict=True):
            if store is not None and not store.is_memory:
                if index >= store.n_pages:
                    continue  # cut off
                cell = store.cell(index)  # noqa: PLW2901
            assert cell is not None
            assert file.read_into(fo, memoryview(page)) == PAGE
            assert cell.sees(0, page), f"a pinned frame at {fo:#x} of {file!r}"

    def compare(self) -> None:
        """Compare all bytes of all members; ask their mappables who maps them."""
        for member in self.members:
            checks.compare_contents(member.mm, member.model, self.arena)
        checks.check_mappings(self)

    def compare_by_cpu(self, member: Member) -> None:
        """Have the CPU read everything that was written."""
        model = member.model
        for page in [*model.own]:
            if model.reach(page * PAGE, PAGE, READ) is None:
                data = self.backend.load(member.mm, page * PAGE, PAGE)
                assert model.sees(page * PAGE, data), f"{page * PAGE:#x}"

    # ---- the end ----

    def close(self) -> None:
        """End everybody, oldest first; nothing may be left in the arena."""
        while self.members:
            self.end(self.members[0])
        while self.pins:
            self.pins.pop().pin.release()
        self.dispose()

    def dispose(self) -> None:
        """Close the files and the backend."""
        used = self.arena.statistics()
        own_bytes = self.backend.own_bytes()
        for file in (self.file, self.read_only, self.shared):
            file.close()
        os.close(self.fd)
        self.backend.close()
        assert used.used_bytes == own_bytes, f"{used.used_bytes - own_bytes:#x} bytes are left"
