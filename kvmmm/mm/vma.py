"""vmas: which ranges exist, what each allows, and what lies behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import ANY_ACCESS, WRITE, access_str, effective
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.memmap.file import Mappable
    from kvmmm.mm.manager import MemoryManager

LOCK_NONE, LOCK_EAGER, LOCK_LAZY = 0, 1, 2
"""How a vma is mlocked: not, resident at once, or as pages are touched (MLOCK_ONFAULT)."""


class Vma:
    """What holds for every address of one mapping.

    Immutable and without addresses, so that halves of a split vma share it.

    Attributes:
        perms: Access bits as asked for (gVisor realPerms).
        effective_perms: The same as x86 grants them.
        max_perms: What mprotect may ever give, and a debugger may use.
        effective_max_perms: The same as x86 grants them.
        private: Writes stay here (MAP_PRIVATE).
        mappable: What lies behind; None for private anonymous memory.
        delta: Offset in the mappable minus address; 0 without one.
        grows_down: A guard below it is kept free (MAP_GROWSDOWN).
        is_stack: MAP_STACK, or the stack itself.
        lock_mode: LOCK_NONE, LOCK_EAGER or LOCK_LAZY.
        dontfork: A child does not get it (MADV_DONTFORK).
        pure_data: No CPU walks or pushes to it, says whoever mapped it: a fork of a guest kernel
            may share it copy-on-write.
        name: Shown in maps: `[heap]`, `[image]`.
    """

    __slots__ = (
        "delta", "dontfork", "effective_max_perms", "effective_perms",
        "grows_down", "is_stack", "key", "lock_mode",
        "mappable", "max_perms", "name", "perms", "private", "pure_data",
    )  # fmt: skip

    def __init__(
        self, perms: int, name: str = "", *, max_perms: int = ANY_ACCESS, private: bool = True,
        mappable: Mappable | None = None, delta: int = 0, grows_down: bool = False,
        is_stack: bool = False, lock_mode: int = LOCK_NONE, dontfork: bool = False,
        pure_data: bool = False,
    ) -> None:  # fmt: skip
        self.perms = perms
        self.effective_perms = effective(perms)
        self.max_perms = max_perms
        self.effective_max_perms = effective(max_perms)
        self.private = private
        self.mappable = mappable
        self.delta = delta
        self.grows_down = grows_down
        self.is_stack = is_stack
        self.lock_mode = lock_mode
        self.dontfork = dontfork
        self.pure_data = pure_data
        self.name = name
        # What neighbours must have in common to become one.
        self.key = (
            perms, max_perms, private, id(mappable), delta, grows_down, is_stack, lock_mode,
            dontfork, pure_data, name,
        )  # fmt: skip

    def replaced(self, **changes: Any) -> Vma:  # noqa: ANN401 - the constructor's keywords
        """Return this vma with some attributes changed."""
        old: dict[str, Any] = {
            "perms": self.perms, "name": self.name, "max_perms": self.max_perms,
            "private": self.private, "mappable": self.mappable, "delta": self.delta,
            "grows_down": self.grows_down, "is_stack": self.is_stack, "lock_mode": self.lock_mode,
            "dontfork": self.dontfork, "pure_data": self.pure_data,
        }  # fmt: skip
        return Vma(**{**old, **changes})

    @property
    def is_private_data(self) -> bool:
        """Whether it counts as data: private, writable, no stack (gVisor isPrivateDataLocked)."""
        return bool(self.private and self.perms & WRITE and not self.grows_down)

    @property
    def may_write_back(self) -> bool:
        """Whether the mappable may be written through it: the `writable` of add_mapping."""
        return bool(not self.private and self.max_perms & WRITE)

    def __repr__(self) -> str:
        kind = "p" if self.private else "s"
        return f"<vma {access_str(self.perms)}{kind} {self.name!r}>"


def _merge(_start: int, _end: int, left: Vma, right: Vma) -> Vma | None:
    return left if left is right or left.key == right.key else None


def new_vma_set() -> SegmentSet[Vma]:
    """Return an empty set of vmas, by guest address."""
    return SegmentSet(merge=_merge)


def insert_locked(mm: MemoryManager, start: int, end: int, vma: Vma) -> None:
    """Add a vma where none is, merged with neighbours that are alike, and account for it.

    Preconditions:
        - mapping_lock is held; [start, end) is page aligned and has no vma.
    """
    mm.vmas.insert(start, end, vma)
    _account(mm, vma, end - start)
    mm.generation += 1


def remove_locked(mm: MemoryManager, start: int, end: int) -> list[tuple[int, int, Vma]]:
    """Take the vmas out of [start, end) and account for it; returns what went, in order.

    Preconditions:
        - mapping_lock is held; the pmas are gone already.
    """
    pieces = mm.vmas.remove(start, end)
    for piece_start, piece_end, vma in pieces:
        _account(mm, vma, piece_start - piece_end)
    if pieces:
        mm.generation += 1
    return pieces


def change_locked(mm: MemoryManager, start: int, end: int, **changes: Any) -> None:  # noqa: ANN401 - the constructor's keywords
    """Change attributes of all vmas in [start, end), split and merged as that needs.

    Preconditions:
        - mapping_lock is held.
    """
    has_changed = False

    def change(piece_start: int, piece_end: int, old: Vma) -> Vma:
        nonlocal has_changed
        new = old.replaced(**changes)
        if new.key == old.key:
            return old
        has_changed = True
        _account(mm, old, piece_start - piece_end)
        _account(mm, new, piece_end - piece_start)
        return new

    mm.vmas.mutate(start, end, change)
    if has_changed:
        mm.generation += 1


def _account(mm: MemoryManager, vma: Vma, n_bytes: int) -> None:
    # n_bytes more of such a vma; fewer when negative.
    if vma.is_private_data:
        mm.data_bytes += n_bytes
    if vma.lock_mode != LOCK_NONE:
        mm.locked_bytes += n_bytes


def span_locked(mm: MemoryManager, start: int, end: int) -> int:
    """Return how many bytes of [start, end) are mapped.

    Preconditions:
        - mapping_lock is held.
    """
    return sum(min(e, end) - max(s, start) for s, e, _ in mm.vmas.segments(start, end))


def locked_span_locked(mm: MemoryManager, start: int, end: int) -> int:
    """Return how many bytes of [start, end) are mlocked.

    Preconditions:
        - mapping_lock is held.
    """
    return sum(
        min(e, end) - max(s, start)
        for s, e, vma in mm.vmas.segments(start, end)
        if vma.lock_mode != LOCK_NONE
    )


def check_access_locked(mm: MemoryManager, addr: int, access: int) -> tuple[int, int, Vma]:
    """Return (start, end, vma) of the vma at `addr`, if it allows `access`.

    Preconditions:
        - mapping_lock is held.

    Raises:
        GuestFaultError: No vma (`.mapped` false), or it forbids the access (true).
    """
    found = mm.vmas.find(addr)
    if found is None:
        raise GuestFaultError(addr, access, mapped=False)
    if access & ~found[2].effective_perms:
        raise GuestFaultError(addr, access, mapped=True)
    return found


def usable_end_locked(
    mm: MemoryManager, start: int, end: int, access: int, *, ignore_permissions: bool = False
) -> tuple[int, GuestFaultError | None]:
    """Return how far from `start` the vmas allow `access` without a break, and what ends that.

    Args:
        mm: The address space.
        start: Guest address.
        end: Where to stop; then the error is None.
        access: What is wanted of every address.
        ignore_permissions: Ask what could ever be allowed (`max_perms`), as a debugger does.

    Preconditions:
        - mapping_lock is held.

    Source:
        gVisor mm.getVMAsLocked.
    """
    addr = start
    while addr < end:
        found = mm.vmas.find(addr)
        if found is None:
            return addr, GuestFaultError(addr, access, mapped=False, done=addr - start)
        vma = found[2]
        allowed = effective(vma.max_perms) if ignore_permissions else vma.effective_perms
        if access & ~allowed:
            return addr, GuestFaultError(addr, access, mapped=True, done=addr - start)
        addr = found[1]
    return end, None
