"""The model's operations: each as one reads it in a manual, page by page."""

from __future__ import annotations

import errno

from kvmmm.errors import GuestBusError
from kvmmm.hostarch.access import ANY_ACCESS, READ, READ_WRITE, effective
from kvmmm.mm import advice
from tests.model.memory import PAGE, Backing, Cell, Store, pages_of
from tests.model.model import LIMIT, Fault, Kind, Refusal, Space, alignment, refuse_if

HEAP = Kind(READ_WRITE, name="[heap]")
NO_EFFECT = {0, 1, 2, 3, 12, 13, 14, 15, 16, 17}
ADVICE_ERRORS = {advice.MADV_REMOVE: errno.ENOSYS, advice.MADV_HWPOISON: errno.EPERM}
MAX_STACK_BYTES = 128 << 20


class ModelMm(Space):
    """A `MemoryManager` without memory."""

    # ---- mmap and munmap ----

    def mmap(
        self, length_bytes: int, perms: int = READ_WRITE, *, addr: int = 0, fixed: bool = False,
        replace: bool = False, no_replace: bool = False, low_32bit: bool = False,
        private: bool = True, backing: Backing | None = None, offset: int = 0,
        max_perms: int = ANY_ACCESS, grows_down: bool = False, stack: bool = False,
        require_populate: bool = False, lock_mode: int | None = None, pure_data: bool = False,
        name: str = "",
    ) -> tuple[int, int]:  # fmt: skip
        """Return (start, end)."""
        refuse_if(length_bytes <= 0 or (perms | max_perms) & ~7, errno.EINVAL)
        n = pages_of(length_bytes)
        refuse_if(n * PAGE >= LIMIT, errno.ENOMEM)
        if backing is not None:
            refuse_if(offset % PAGE or offset < 0, errno.EINVAL)
            refuse_if(offset + n * PAGE >= LIMIT, errno.EOVERFLOW)
        refuse_if(addr % PAGE and fixed, errno.EINVAL)
        max_perms = effective(max_perms)
        if backing is not None and not private:
            max_perms &= backing.max_shared_perms
        refuse_if(perms & ~max_perms, errno.EACCES)
        refuse_if(replace and not fixed, errno.EINVAL)
        refuse_if(no_replace and (replace or not fixed), errno.EINVAL)
        refuse_if(grows_down and (backing is not None or not private), errno.EINVAL)
        if not private and backing is None:
            backing, offset = self.memory.anonymous(n * PAGE), 0
        kind = Kind(
            perms, max_perms, private, backing, 0, grows_down, stack, lock_mode or 0,
            dontfork=False, pure_data=pure_data,
            name=name or (backing.name if backing is not None else ""),
        )  # fmt: skip
        start = self.create(
            n, kind, offset // PAGE, page=addr // PAGE, fixed=fixed, replace=replace,
            no_replace=no_replace, low_32bit=low_32bit,
        )  # fmt: skip
        if require_populate:
            fault = self.first_unpopulated(start, start + n)
            if fault is not None:
                self.unmap(start, start + n)
                raise Refusal(errno.EFAULT, fault.kind)
        return start * PAGE, (start + n) * PAGE

    def map_stack(self) -> tuple[int, int]:
        n = min(pages_of(self.limits.stack_bytes), MAX_STACK_BYTES // PAGE)
        refuse_if(not 0 < n <= self.n_pages, errno.ENOMEM)
        kind = Kind(READ_WRITE, grows_down=True, is_stack=True, name="[stack]")
        start = self.create(n, kind, page=self.n_pages - n)
        return start * PAGE, (start + n) * PAGE

    def first_unpopulated(self, start: int, end: int) -> Fault | None:
        """Where populating must stop: a hole, what nobody may touch, the end of a file."""
        return self.reach(start * PAGE, (end - start) * PAGE, READ)

    def munmap(self, addr: int, length_bytes: int) -> None:
        refuse_if(addr % PAGE or not 0 <= addr < LIMIT or length_bytes <= 0, errno.EINVAL)
        end = addr // PAGE + pages_of(length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.EINVAL)
        self.unmap(addr // PAGE, end)

    def populate(self, addr: int, length_bytes: int) -> None:
        end = addr // PAGE + pages_of(length_bytes)
        refuse_if(addr % PAGE or end > self.n_pages, errno.EINVAL)
        fault = self.first_unpopulated(addr // PAGE, end)
        if fault is not None:
            raise fault

    # ---- mprotect ----

    def mprotect(
        self, addr: int, length_bytes: int, perms: int, *, grows_down: bool = False
    ) -> None:
        refuse_if(addr % PAGE or perms & ~7, errno.EINVAL)
        if length_bytes == 0:
            return
        start, end = addr // PAGE, addr // PAGE + pages_of(length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.ENOMEM)
        first = self.vma_at(start)
        if grows_down:
            refuse_if(first is None, errno.ENOMEM)
            assert first is not None
            refuse_if(not first[2].grows_down, errno.EINVAL)
            refuse_if(end <= first[0], errno.ENOMEM)
            start = first[0]
        done: list[int] = []
        err = 0
        for page in range(start, min(end, self.n_pages + 1)):
            kind = self.kinds.get(page)
            if kind is None or effective(perms) & ~kind.max_perms:
                err = errno.ENOMEM if kind is None else errno.EACCES
                break
            done.append(page)
        self.change(done, perms=perms)
        refuse_if(err, err)

    # ---- mremap ----

    def mremap(
        self, old_addr: int, old_bytes: int, new_bytes: int, *, may_move: bool = False,
        new_addr: int | None = None,
    ) -> int:  # fmt: skip
        first, n_old, n_new = old_addr // PAGE, pages_of(old_bytes), pages_of(new_bytes)
        refuse_if(old_addr % PAGE or not 0 < n_new * PAGE < LIMIT, errno.EINVAL)
        refuse_if(not 0 <= n_old * PAGE < LIMIT - old_addr, errno.EINVAL)
        kind = self.kinds.get(first)
        if kind is None:
            raise Refusal(errno.EFAULT)
        if n_new > n_old and kind.lock_mode and not self.limits.may_lock_all:
            locked = self.locked_bytes() + (n_new - n_old) * PAGE
            refuse_if(locked > self.limits.locked_bytes, errno.EAGAIN)
        if new_addr is not None:
            target = new_addr // PAGE
            refuse_if(new_addr % PAGE or new_addr + n_new * PAGE >= LIMIT, errno.EINVAL)
            overlaps = target < first + max(n_old, 1) and first < target + n_new
            refuse_if(overlaps, errno.EINVAL)
            self.place(n_new, page=target, fixed=True, replace=True)
            self.unmap(target, target + n_new)
            self.unmap(first + n_new, max(first + n_old, first + n_new))
            n_old = min(n_old, n_new)
        elif n_new <= n_old:
            self.unmap(first + n_new, first + n_old)
            return old_addr
        else:
            self._one_vma(first, n_old)
            try:
                self._grow(first + n_old, n_new - n_old, kind)
            except Refusal:
                if not may_move:
                    raise
            else:
                return old_addr
            target = self.place(n_new, align=alignment(n_new, kind))
        self._move(first, n_old, target, n_new)
        return target * PAGE

    def _one_vma(self, first: int, n: int) -> Kind:
        found = self.vma_at(first)
        if found is None or first < found[0] or found[1] < first + n:
            raise Refusal(errno.EFAULT)
        return found[2]

    def _grow(self, end: int, n: int, kind: Kind) -> None:
        self.create(n, kind, end + kind.delta, page=end, fixed=True)

    def _move(self, first: int, n_old: int, target: int, n_new: int) -> None:
        kind = self._one_vma(first, n_old)
        used = self.usage_bytes() + (n_new - n_old) * PAGE
        refuse_if(used > self.limits.address_space_bytes, errno.ENOMEM)
        if kind.backing is not None:
            kind = kind._replace(delta=kind.delta + first - target)
        # What is shared must stay mapped meanwhile.
        self.insert(target, n_new, kind)
        for cells in (self.own, self.olds):
            for i in range(n_old):
                if first + i in cells:
                    cells[target + i] = cells.pop(first + i)  # type: ignore[index, assignment]
        self.unmap(first, first + n_old)

    # ---- brk ----

    def set_brk(self, start: int) -> None:
        refuse_if(not 0 <= start <= self.n_pages * PAGE, errno.EINVAL)
        self.unmap(pages_of(self.brk_start), pages_of(self.brk_end))
        self.brk_start = self.brk_end = start

    def brk(self, addr: int) -> int:
        old, new = pages_of(self.brk_end), pages_of(addr)
        if not self.brk_start <= addr <= self.brk_start + self.limits.data_bytes:
            return self.brk_end
        if old < new:
            if not self.brk_start:
                return self.brk_end
            try:
                self.create(new - old, HEAP, page=old, fixed=True)
            except Refusal:
                return self.brk_end
        else:
            self.unmap(new, old)
        self.brk_end = addr
        return addr

    # ---- advice, locks, names ----

    def madvise(self, addr: int, length_bytes: int, value: int) -> None:
        refuse_if(addr % PAGE, errno.EINVAL)
        if length_bytes == 0:
            return
        start, end = addr // PAGE, addr // PAGE + pages_of(length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.EINVAL)
        pages = self.within(start, end)
        if value == advice.MADV_DONTNEED:
            for page in pages:
                refuse_if(self.kinds[page].lock_mode, errno.EINVAL)
                self.forget_page(page)
        elif value in (advice.MADV_DONTFORK, advice.MADV_DOFORK):
            self.change(pages, dontfork=value == advice.MADV_DONTFORK)
        elif value in NO_EFFECT:
            return
        else:
            raise Refusal(ADVICE_ERRORS.get(value, errno.EINVAL))
        refuse_if(len(pages) < end - start, errno.ENOMEM)

    def mincore(self, addr: int, length_bytes: int) -> bytes:
        refuse_if(addr % PAGE, errno.EINVAL)
        start, end = addr // PAGE, addr // PAGE + pages_of(length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.ENOMEM)
        refuse_if(len(self.within(start, end)) < end - start, errno.ENOMEM)
        return b"\1" * (end - start)

    def mlock(self, addr: int, length_bytes: int, mode: int) -> None:
        start, end = addr // PAGE, pages_of(addr + length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.EINVAL)
        if mode:
            more = (end - start) * PAGE - self.locked_bytes(start, end)
            self._check_lock_limit(self.locked_bytes() + more)
        pages = self.within(start, end)
        whole = [page for n, page in enumerate(pages) if page == start + n]
        self.change(whole, lock_mode=mode)
        refuse_if(len(whole) < end - start, errno.ENOMEM)
        if mode == 1:
            refuse_if(self.first_unpopulated(start, end) is not None, errno.ENOMEM)

    def mlockall(self, *, current: bool, future: bool, mode: int) -> None:
        refuse_if(not current and not future, errno.EINVAL)
        if current:
            if mode:
                self._check_lock_limit(self.usage_bytes())
            self.change(list(self.kinds), lock_mode=mode)
        if future:
            self.lock_mode = mode

    def _check_lock_limit(self, locked_bytes: int) -> None:
        if not self.limits.may_lock_all:
            refuse_if(not self.limits.locked_bytes, errno.EPERM)
            refuse_if(locked_bytes > self.limits.locked_bytes, errno.ENOMEM)

    def msync(
        self, addr: int, length_bytes: int, *, sync: bool, async_: bool, invalidate: bool
    ) -> None:
        refuse_if((sync and async_) or addr % PAGE, errno.EINVAL)
        if length_bytes == 0:
            return
        start, end = addr // PAGE, addr // PAGE + pages_of(length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.ENOMEM)
        pages = self.within(start, end)
        is_locked = any(self.kinds[page].lock_mode for page in pages)
        refuse_if(invalidate and is_locked, errno.EBUSY)
        refuse_if(len(pages) < end - start, errno.ENOMEM)

    def set_anon_name(self, addr: int, length_bytes: int, name: str | None) -> None:
        bad = name is not None and (len(name) > 79 or any(c in "\\`$[]\n" for c in name))
        refuse_if(bad or addr % PAGE, errno.EINVAL)
        start, end = addr // PAGE, addr // PAGE + pages_of(length_bytes)
        refuse_if(end * PAGE >= LIMIT, errno.EINVAL)
        pages = self.within(start, end)
        for page in pages:
            kind = self.kinds[page]
            is_shm = kind.backing is not None
            refuse_if(kind.backing is not None and not kind.backing.store.is_memory, errno.EBADF)
            prefix = "[anon_shmem:" if is_shm else "[anon:"
            if name is not None:
                self.change([page], name=f"{prefix}{name}]")
            elif kind.name.startswith(prefix):
                self.change([page], name=kind.backing.name if kind.backing is not None else "")
        refuse_if(len(pages) < end - start, errno.ENOMEM)

    # ---- fork and the end ----

    def fork(self) -> ModelMm:
        child = ModelMm(self.memory, self.n_pages, top_down=self.top_down)
        child.limits = self.limits.copy()
        child.brk_start, child.brk_end = self.brk_start, self.brk_end
        for start, end, kind in self.vmas():
            if not kind.dontfork:
                child.insert(start, end - start, kind._replace(lock_mode=0))
        child.own = {page: c.copy() for page, c in self.own.items() if page in child.kinds}
        child.olds = {page: list(o) for page, o in self.olds.items() if page in child.kinds}
        return child

    def close(self) -> None:
        self.unmap(0, self.n_pages)
        self.memory.spaces.remove(self)

    # ---- pins ----

    def pinned(
        self, addr: int, length_bytes: int, access: int
    ) -> tuple[list[tuple[Cell | None, Store | None, int]], bool]:
        """Keep pages: (cell, store, page of it) of each, and whether it is all that was asked for.

        Of a file's page there is no cell to keep: it is the file's.

        Raises:
            Fault: Not even the first can be used so.
        """
        start, end = addr // PAGE, pages_of(addr + length_bytes)
        fault = self.reach(start * PAGE, (end - start) * PAGE, access)
        if fault is not None:
            end = fault.addr // PAGE
            if start == end:
                raise Fault(addr, 0, mapped=fault.mapped, is_bus=fault.kind is GuestBusError)
        kept: list[tuple[Cell | None, Store | None, int]] = []
        for page in range(start, end):
            kind = self.kinds[page]
            if kind.private or kind.backing is None:
                kept.append((self.own_cell(page), None, 0))
            else:
                store, index = kind.backing.store, page + kind.delta
                kept.append((self.own_cell(page) if store.is_memory else None, store, index))
        return kept, fault is None
