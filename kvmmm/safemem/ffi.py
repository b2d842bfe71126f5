"""The boundary to C: the only module that imports `kvmmm._core`.

Here C's answers become Python's: -errno becomes `OSError`, a pointer becomes an int or a
memoryview. What C offers is declared, with its documentation, in `kvmmm/_core.pyi` and
`_native/core.h`.
"""

from __future__ import annotations

import os

from kvmmm._core import (
    CopyCore,
    GuardedLock,
    HostMapping,
    IoExit,
    IOOpts,
    MirrorWindow,
    MmioExit,
    PageMapper,
    PageWalk,
    PauseGate,
    PinnedWindow,
    Registers,
    SegmentSet,
    VcpuCore,
    adopt,
    ffi,
    lib,
    own_faults,
    safe_compare_and_swap_uint32,
    safe_copy,
    safe_load_uint32,
    safe_swap_uint32,
    safe_zero,
    tune_copies,
)

__all__ = [
    "CopyCore",
    "GuardedLock",
    "HostMapping",
    "IOOpts",
    "IoExit",
    "MirrorWindow",
    "MmioExit",
    "PageMapper",
    "PageWalk",
    "PauseGate",
    "PinnedWindow",
    "Registers",
    "SegmentSet",
    "VcpuCore",
    "address_of",
    "adopt",
    "drop_pages",
    "ffi",
    "fill",
    "ioctl",
    "lib",
    "own_faults",
    "punch_hole",
    "safe_compare_and_swap_uint32",
    "safe_copy",
    "safe_load_uint32",
    "safe_swap_uint32",
    "safe_zero",
    "tune_copies",
]


def ioctl(fd: int, request: int, argument: int = 0) -> int:
    """Make an ioctl call with the GIL released.

    Args:
        fd: File descriptor.
        request: Its number.
        argument: A number, or the host address of a struct.

    Returns:
        What the kernel returned; -errno when it failed (no exception: the caller knows the names
        that make a good message).
    """
    return lib.kvmmm_ioctl(fd, request, argument)


def address_of(cdata: object) -> int:
    """Return the host address that a cffi pointer or array holds, for an ioctl's argument."""
    return int(ffi.cast("uintptr_t", cdata))


def punch_hole(fd: int, offset: int, length_bytes: int) -> None:
    """Free the pages of a memfd in [offset, offset + length_bytes); they read as zero afterwards.

    Raises:
        OSError: fallocate(2) refused.
    """
    rc = lib.kvmmm_punch_hole(fd, offset, length_bytes)
    if rc:
        raise OSError(
            -rc, f"fallocate(PUNCH_HOLE, {offset:#x}, {length_bytes:#x}): {os.strerror(-rc)}"
        )


def drop_pages(hva: int, length_bytes: int) -> None:
    """Drop every translation of a shared mapping's pages, KVM's as well; the file keeps its bytes.

    Whoever touches them next faults them in again, 1 to 4 us a page.

    Raises:
        OSError: madvise(2) refused: no mapping is there, or it is locked and Linux older than 5.18.
    """
    rc = lib.kvmmm_drop_pages(hva, length_bytes)
    if rc:
        raise OSError(-rc, f"madvise(MADV_DONTNEED, {length_bytes:#x}): {os.strerror(-rc)}")


def fill(hva: int, byte: int, length_bytes: int) -> None:
    """Fill host memory with one byte value; the caller knows that it is mapped."""
    lib.memset(ffi.cast("void *", hva), byte, length_bytes)
