"""An address space as text, in the formats of /proc/<pid>/maps, smaps and status.

For tools that read those, and people who know them. What kvmmm does not know is left out rather
than said to be zero.

Source: gVisor mm/procfs.go; Linux fs/proc/task_mmu.c.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmmm.hostarch.access import EXECUTE, READ, WRITE, access_str
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.mm.sight import SHARED, SeenMapping, Sight, look
from kvmmm.mm.vma import LOCK_NONE

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma

_NAME_COLUMN = 73


def maps(mm: MemoryManager) -> str:
    """Return the mappings as /proc/<pid>/maps shows them; the guest may run.

    A file's device and inode are the host's; `smaps` also says what is resident.
    """
    with mm.mapping_lock:
        vmas = list(mm.vmas)
    return "".join(f"{maps_line(start, end, vma)}\n" for start, end, vma in vmas)


def smaps(mm: MemoryManager) -> str:
    """Return the mappings as /proc/<pid>/smaps shows them; the guest may run.

    Resident is what has a pma. Pss divides a page by the translations that have it. A page is dirty
    if the guest may have written it, and shared if somebody else has it, too, now.
    """
    return smaps_of(look(mm))


def status(mm: MemoryManager) -> str:
    """Return the sums as /proc/<pid>/status shows them; the guest may run."""
    return status_of(look(mm))


def maps_of(sight: Sight) -> str:
    """The same as `maps`, of what was seen."""
    return "".join(f"{maps_line(m.start, m.end, m.vma)}\n" for m in sight.mappings)


def smaps_of(sight: Sight) -> str:
    """The same as `smaps`, of what was seen."""
    return "".join(
        f"{maps_line(m.start, m.end, m.vma)}\n{_smaps_fields(m)}" for m in sight.mappings
    )


def status_of(sight: Sight) -> str:
    """The same as `status`, of what was seen."""
    stack = sum(m.size_bytes for m in sight.mappings if m.vma.is_stack or m.vma.grows_down)
    pieces = [piece for m in sight.mappings for piece in m.pieces]
    anon = sum(piece.end - piece.start for piece in pieces if piece.is_private)
    shmem = sum(piece.end - piece.start for piece in pieces if piece.kind == SHARED)
    fields = {
        "VmSize": sight.usage_bytes, "VmLck": sight.locked_bytes, "VmPin": sight.pinned_bytes,
        "VmHWM": sight.max_rss_bytes, "VmRSS": sight.rss_bytes, "RssAnon": anon,
        "RssFile": sum(piece.end - piece.start for piece in pieces) - anon - shmem,
        "RssShmem": shmem, "VmData": sight.data_bytes, "VmStk": stack,
    }  # fmt: skip
    return "".join(f"{name}:\t{n_bytes >> 10:8} kB\n" for name, n_bytes in fields.items())


def maps_line(start: int, end: int, vma: Vma) -> str:
    """Return one line of maps, without its end.

    Args:
        start: Guest address.
        end: One past the last.
        vma: What is there.
    """
    device, inode = getattr(vma.mappable, "identity", (0, 0))
    offset = start + vma.delta if vma.mappable is not None else 0
    perms = access_str(vma.perms) + ("p" if vma.private else "s")
    line = f"{start:08x}-{end:08x} {perms} {offset:08x} {_device(device)} {inode} "
    # Linux escapes nothing else: a line must stay one.
    return f"{line:{_NAME_COLUMN}}{vma.name}".replace("\n", "\\012") if vma.name else line


def _device(device: int) -> str:
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _smaps_fields(mapping: SeenMapping) -> str:
    clean, dirty = [0, 0], [0, 0]
    anonymous = 0
    for piece in mapping.pieces:
        n_bytes = piece.end - piece.start
        kept = dirty if mapping.is_dirty(piece) else clean
        kept[piece.n_holders > 1] += n_bytes
        anonymous += n_bytes * piece.is_private
    locked = mapping.vma.lock_mode != LOCK_NONE
    fields = {
        "Size": mapping.size_bytes, "KernelPageSize": PAGE_BYTES, "MMUPageSize": PAGE_BYTES,
        "Rss": mapping.rss_bytes, "Pss": mapping.pss_bytes, "Shared_Clean": clean[1],
        "Shared_Dirty": dirty[1], "Private_Clean": clean[0], "Private_Dirty": dirty[0],
        "Referenced": mapping.rss_bytes, "Anonymous": anonymous,
        "Locked": mapping.pss_bytes if locked else 0,
    }  # fmt: skip
    lines = [f"{name + ':':16}{n_bytes >> 10:8} kB\n" for name, n_bytes in fields.items()]
    return "".join([*lines, f"VmFlags: {' '.join(_flags(mapping.vma))}\n"])


def _flags(vma: Vma) -> list[str]:
    # Source: Linux Documentation/filesystems/proc.rst, VmFlags.
    perms, may = vma.perms, vma.max_perms
    return [
        flag
        for flag, is_set in (
            ("rd", perms & READ), ("wr", perms & WRITE), ("ex", perms & EXECUTE),
            ("sh", vma.may_write_back), ("mr", may & READ), ("mw", may & WRITE),
            ("me", may & EXECUTE), ("ms", not vma.private), ("gd", vma.grows_down),
            ("lo", vma.lock_mode != LOCK_NONE), ("dc", vma.dontfork),
            ("ac", vma.private and vma.effective_perms & WRITE),
        )
        if is_set
    ]  # fmt: skip
