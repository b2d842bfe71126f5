"""What an address space is, in the plainest words: a dict of pages.

Every operation answers as `MemoryManager` must, or raises `Refusal` with its errno. Source: mmap(2)
and its neighbours; what they leave open is as in gVisor's pkg/sentry/mm.
"""

from __future__ import annotations

import bisect
import errno
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.errors import GuestBusError, GuestFaultError, MmError
from kvmmm.hostarch.access import WRITE, effective
from tests.model.memory import PAGE, ZEROS, Backing, Cell, Memory, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

GUARD, HUGE, LOWEST = 256, 512, 16
LOW_32BIT = (1 << 18, 1 << 19)
LIMIT = 1 << 64
UNLIMITED = 1 << 64


class Refusal(Exception):  # noqa: N818 - an answer, not an error
    """An operation must fail with this errno, and this kind of error."""

    def __init__(self, err: int, kind: type[OSError] = MmError) -> None:
        self.errno = err
        self.kind = kind
        super().__init__(f"{kind.__name__} {errno.errorcode[err]}")


class Fault(Exception):  # noqa: N818
    """An access must stop at `addr`, after `done` bytes."""

    def __init__(self, addr: int, done: int, *, mapped: bool, is_bus: bool = False) -> None:
        self.addr = addr
        self.done = done
        self.mapped = mapped
        self.kind = GuestBusError if is_bus else GuestFaultError
        super().__init__(f"{self.kind.__name__} at {addr:#x} after {done}")


class Kind(NamedTuple):
    """What is said of a page, as in `Vma`; `delta`: page of the backing minus page, or 0."""

    perms: int
    max_perms: int = 7
    private: bool = True
    backing: Backing | None = None
    delta: int = 0
    grows_down: bool = False
    is_stack: bool = False
    lock_mode: int = 0
    dontfork: bool = False
    pure_data: bool = False
    name: str = ""


class Limits:
    """As `kvmmm.mm.layout.Limits`."""

    def __init__(self) -> None:
        self.address_space_bytes = self.data_bytes = self.locked_bytes = UNLIMITED
        self.stack_bytes = 40 * PAGE
        self.may_lock_all = False

    def copy(self) -> Limits:
        made = Limits()
        made.__dict__.update(self.__dict__)
        return made


def refuse_if(condition: object, err: int) -> None:
    if condition:
        raise Refusal(err)


class Space:
    """The pages themselves, places for them, and the limits. `operations` has what a guest calls.

    Attributes:
        kinds: Which pages are mapped, and how.
        own: What pages hold that are this space's own; a private page without is zero, or the
            file's.
        olds: What else a private page of a file may still hold: see `Memory.will_change`.
    """

    def __init__(self, memory: Memory, n_pages: int, *, top_down: bool = False) -> None:
        self.memory = memory
        self.n_pages = n_pages
        self.top_down = top_down
        self.limits = Limits()
        self.kinds: dict[int, Kind] = {}
        self.own: dict[int, Cell] = {}
        self.olds: dict[int, list[bytes]] = {}
        self.brk_start = self.brk_end = 0
        self.lock_mode = 0
        self._vmas: list[tuple[int, int, Kind]] | None = None
        memory.spaces.append(self)

    # ---- pages ----

    def vmas(self) -> list[tuple[int, int, Kind]]:
        """(start, end, kind) of everything, in pages, merged as far as can be."""
        if self._vmas is None:
            found: list[tuple[int, int, Kind]] = []
            start = end = 0
            kind: Kind | None = None
            for page in sorted(self.kinds):
                this = self.kinds[page]
                if page == end and kind is not None and (this is kind or this == kind):
                    end += 1
                    continue
                if kind is not None:
                    found.append((start, end, kind))
                start, end, kind = page, page + 1, this
            if kind is not None:
                found.append((start, end, kind))
            self._vmas = found
        return self._vmas

    def vma_at(self, page: int) -> tuple[int, int, Kind] | None:
        """The vma of a page, or the next one above."""
        vmas = self.vmas()
        n = bisect.bisect_right(vmas, page, key=lambda vma: vma[1])
        return vmas[n] if n < len(vmas) else None

    def within(self, start: int, end: int) -> list[int]:
        """Mapped pages of a range, ascending."""
        if end - start < len(self.kinds):
            return [page for page in range(start, end) if page in self.kinds]
        return sorted(page for page in self.kinds if start <= page < end)

    def private_pages_of(self, store: Store) -> Iterator[tuple[int, Kind]]:
        if store.n_mapped:
            for page, kind in self.kinds.items():
                if kind.private and kind.backing is not None and kind.backing.store is store:
                    yield page, kind

    def insert(self, start: int, n: int, kind: Kind) -> None:
        assert not self.within(start, start + n)
        self.kinds.update(dict.fromkeys(range(start, start + n), kind))
        if kind.backing is not None:
            kind.backing.store.n_mapped += n
        self._vmas = None

    def change(self, pages: list[int], **changes: object) -> None:
        known: dict[int, Kind] = {}
        for page in pages:
            kind = self.kinds[page]
            if id(kind) not in known:
                known[id(kind)] = kind._replace(**changes)  # type: ignore[arg-type]
            self.kinds[page] = known[id(kind)]
        self._vmas = None

    def unmap(self, start: int, end: int) -> None:
        for page in self.within(start, end):
            kind = self.kinds.pop(page)
            self.forget_page(page)
            if kind.backing is not None:
                kind.backing.store.unmapped(1)
        self._vmas = None

    def forget_page(self, page: int) -> None:
        self.own.pop(page, None)
        self.olds.pop(page, None)

    # ---- what is in them ----

    def is_behind(self, page: int) -> bool:
        """Whether a page is mapped where its file has no bytes."""
        kind = self.kinds[page]
        return kind.backing is not None and page + kind.delta >= kind.backing.store.n_pages

    def reach(self, addr: int, n_bytes: int, access: int, *, ignore: bool = False) -> Fault | None:
        """Where an access to [addr, addr + n_bytes) must stop, if it must."""
        for at, _ in cuts(addr, n_bytes):
            kind = self.kinds.get(at // PAGE)
            if kind is None:
                return Fault(at, at - addr, mapped=False)
            if access & ~effective(kind.max_perms if ignore else kind.perms):
                return Fault(at, at - addr, mapped=True)
            if self.is_behind(at // PAGE):
                return Fault(at, at - addr, mapped=True, is_bus=True)
        return None

    def own_cell(self, page: int) -> Cell:
        """The cell of a page that is written, or kept: a private page's becomes its own."""
        kind = self.kinds[page]
        if kind.backing is None:
            return self.own.setdefault(page, Cell(ZEROS))
        cell = kind.backing.store.cell(page + kind.delta)
        if not kind.private:
            return cell
        if page not in self.own:
            kind.backing.is_copied = True
            self.own[page] = Cell(*cell.options, *self.olds.pop(page, ()))
        return self.own[page]

    def write(self, addr: int, data: bytes) -> None:
        """Write what can be reached: `reach` was asked."""
        for at, stop in cuts(addr, len(data)):
            page = at // PAGE
            kind = self.kinds[page]
            if kind.backing is not None and not kind.private:
                self.memory.will_change(kind.backing.store, page + kind.delta)
            self.own_cell(page).write(at % PAGE, data[at - addr : stop - addr])

    def sees(self, addr: int, data: bytes) -> bool:
        """Whether these bytes can be there."""
        return all(
            self._sees(at // PAGE, at % PAGE, data[at - addr : stop - addr])
            for at, stop in cuts(addr, len(data))
        )

    def _sees(self, page: int, at: int, data: bytes) -> bool:
        kind = self.kinds[page]
        if page in self.own:
            return self.own[page].sees(at, data)
        if kind.backing is None:
            return data == ZEROS[: len(data)]
        cell = kind.backing.store.cell(page + kind.delta)
        olds = self.olds.get(page, [])
        still = [old for old in olds if old[at : at + len(data)] == data]
        if cell.copy().sees(at, data):
            if olds:
                self.olds[page] = still
            elif kind.private is False:
                cell.sees(at, data)
            return True
        if still:
            # It has been copied before the file changed.
            kind.backing.is_copied = True
            self.own[page] = Cell(*still)
            del self.olds[page]
        return bool(still)

    def tail_bytes(self, addr: int, n_bytes: int) -> int:
        """How many bytes there are before one that lies behind a file's end, in its last page.

        What is written there through a shared mapping may be lost.
        """
        for at, stop in cuts(addr, n_bytes):
            kind = self.kinds.get(at // PAGE)
            if kind is not None and kind.backing is not None and not kind.private:
                end = kind.backing.store.size_bytes - (at // PAGE + kind.delta) * PAGE
                if 0 < end < stop - at + at % PAGE:
                    return max(at - addr + end - at % PAGE, 0)
        return n_bytes

    # ---- places and limits ----

    def usage_bytes(self) -> int:
        return len(self.kinds) * PAGE

    def data_bytes(self) -> int:
        return PAGE * sum(
            end - start
            for start, end, kind in self.vmas()
            if kind.private and kind.perms & WRITE and not kind.grows_down
        )

    def locked_bytes(self, start: int = 0, end: int = LIMIT) -> int:
        return PAGE * sum(
            min(e, end) - max(s, start)
            for s, e, kind in self.vmas()
            if kind.lock_mode and s < end and start < e
        )

    def place(
        self, n: int, *, page: int = 0, fixed: bool = False, replace: bool = False,
        no_replace: bool = False, low_32bit: bool = False, align: int = 1,
    ) -> int:  # fmt: skip
        low, high = (0, self.n_pages) if fixed or not low_32bit else LOW_32BIT
        high = min(high, self.n_pages)
        if (page or fixed) and low <= page and page + n <= high:
            if replace or self._is_free(page, n):
                return page
            if no_replace:
                refuse_if(self.within(page, page + n), errno.EEXIST)
                return page
        refuse_if(fixed, errno.ENOMEM)
        top_down = self.top_down and not low_32bit
        found = self._search(n, max(low, LOWEST), high, align, top_down=top_down)
        if found is None:
            raise Refusal(errno.ENOMEM)
        return found

    def _gaps(self) -> list[tuple[int, int]]:
        gaps, at = [], 0
        for start, end, kind in self.vmas():
            gaps.append((at, start - GUARD if kind.grows_down else start))
            at = end
        return [*gaps, (at, self.n_pages)]

    def _is_free(self, page: int, n: int) -> bool:
        return any(start <= page and page + n <= end for start, end in self._gaps())

    def _search(self, n: int, low: int, high: int, align: int, *, top_down: bool) -> int | None:
        gaps = [(max(start, low), min(end, high)) for start, end in self._gaps()]
        for start, end in reversed(gaps) if top_down else gaps:
            at = (end - n) // align * align if top_down else -(-start // align) * align
            if start <= at and at + n <= end:
                return at
        return None

    def create(
        self, n: int, kind: Kind, index: int = 0, *, page: int = 0, fixed: bool = False,
        replace: bool = False, no_replace: bool = False, low_32bit: bool = False,
    ) -> int:  # fmt: skip
        """Find a place, ask the limits, and map there, beginning at page `index` of its backing."""
        start = self.place(
            n, page=page, fixed=fixed, replace=replace, no_replace=no_replace, low_32bit=low_32bit,
            align=alignment(n, kind),
        )  # fmt: skip
        replaced = self.within(start, start + n) if replace else []
        used = self.usage_bytes() + (n - len(replaced)) * PAGE
        refuse_if(used > self.limits.address_space_bytes, errno.ENOMEM)
        lock_mode = max(kind.lock_mode, self.lock_mode)
        if lock_mode and not self.limits.may_lock_all:
            refuse_if(not self.limits.locked_bytes, errno.EPERM)
            locked = self.locked_bytes() + n * PAGE
            locked -= self.locked_bytes(start, start + n) if replace else 0
            refuse_if(locked > self.limits.locked_bytes, errno.EAGAIN)
        if replace:
            self.unmap(start, start + n)
        delta = index - start if kind.backing is not None else 0
        self.insert(start, n, kind._replace(lock_mode=lock_mode, delta=delta))
        return start


def alignment(n: int, kind: Kind) -> int:
    is_huge = kind.private and not kind.is_stack and not kind.grows_down and n % HUGE == 0
    return HUGE if is_huge else 1


def cuts(addr: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    # (start, end) of the pieces of a range in each page.
    at, end = addr, addr + n_bytes
    while at < end:
        stop = min((at // PAGE + 1) * PAGE, end)
        yield at, stop
        at = stop
