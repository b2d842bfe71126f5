"""vmas: which ranges exist, and what each allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import access_str, effective
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager


class Vma:
    """What holds for every address of one mapping: private anonymous memory with permissions.

    Immutable and without addresses, so that halves of a split vma share it.

    Attributes:
        perms: Access bits as asked for.
        effective_perms: The same as x86 grants them.
        name: Shown in maps: `[memory]`, `guest.elf`.
    """

    __slots__ = ("effective_perms", "name", "perms")

    def __init__(self, perms: int, name: str = "") -> None:
        self.perms = perms
        self.effective_perms = effective(perms)
        self.name = name

    def with_perms(self, perms: int) -> Vma:
        """Return this vma with other permissions (mprotect)."""
        return Vma(perms, self.name)

    def __repr__(self) -> str:
        return f"<vma {access_str(self.perms)} {self.name!r}>"


def _merge(_start: int, _end: int, left: Vma, right: Vma) -> Vma | None:
    return left if left.perms == right.perms and left.name == right.name else None


def new_vma_set() -> SegmentSet[Vma]:
    """Return an empty set of vmas, by guest address."""
    return SegmentSet(merge=_merge)


def check_access_locked(mm: MemoryManager, addr: int, access: int) -> tuple[int, int, Vma]:
    """Return (start, end, vma) of the vma at `addr`, if it allows `access`.

    Preconditions:
        - mapping_lock is held.

    Raises:
        GuestFaultError: No vma (`.mapped` false), or it forbids the access (true).

    Source:
        gVisor mm.getVMAsLocked.
    """
    found = mm.vmas.find(addr)
    if found is None:
        raise GuestFaultError(addr, access, mapped=False)
    if access & ~found[2].effective_perms:
        raise GuestFaultError(addr, access, mapped=True)
    return found
