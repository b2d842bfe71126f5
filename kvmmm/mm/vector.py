"""Vectored copies: from a Reader to ranges of guest memory, from ranges to a Writer.

    copy_out_from    ranges ──► internal mappings ──► reader.read_to_blocks
    copy_in_to                                        writer.write_from_blocks
                     ranges, a mechanism forced, few bytes ──► a buffer ──► mm.copy_out, mm.copy_in
                     ranges and a buffer of the caller's ──► mm.copy_out_vec, mm.copy_in_vec

A Reader or Writer is called once at most. So a copy that may fault and be tried again cannot have
one in its middle: through the address space the bytes go by way of a buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestBusError, GuestFaultError, HostBufferError, NoProgressError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm.internal import with_internal_mappings, with_vec_internal_mappings
from kvmmm.safemem.block import BlockSeq
from kvmmm.safemem.stream import as_reader, as_writer, checked_count, is_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.mm.manager import MemoryManager
    from kvmmm.safemem.ffi import IOOpts
    from kvmmm.safemem.stream import Destination, Reader, Source, Writer

__all__ = [
    "check_io_vec", "copy_in_to", "copy_out_from", "with_internal_mappings",
    "with_vec_internal_mappings",
]  # fmt: skip


def check_io_vec(
    mm: MemoryManager, ars: AddrRangeSeq | AddrRange, access: int = READ
) -> AddrRangeSeq:
    """Return `ars`, if every range can be an application's, those without bytes included.

    Args:
        mm: The address space.
        ars: Guest addresses.
        access: What for; the error tells it.

    Raises:
        GuestFaultError: A range ends beyond `max_addr`: `.addr` is its first byte that does.

    Source: gVisor mm.checkIOVec; Linux access_ok.
    """
    for ar in (ars,) if isinstance(ars, AddrRange) else ars:
        if ar.end > mm.max_addr:
            raise GuestFaultError(max(ar.start, mm.max_addr), access, mapped=False)
    return AddrRangeSeq((ars,)) if isinstance(ars, AddrRange) else ars


def copy_out_from(
    mm: MemoryManager, ars: AddrRangeSeq | AddrRange, src: Source, *,
    opts: IOOpts | None = None, ignore_permissions: bool = False,
) -> int:  # fmt: skip
    """Copy from a reader to guest memory (host -> guest), filling one range after the other.

    Args:
        mm: The address space.
        ars: Guest addresses.
        src: A `Reader`, a buffer, a text (UTF-8), a binary file, or a socket. It is asked once at
            most, and not at all if there is nothing to fill.
        opts: How to copy.
        ignore_permissions: Access whatever could ever be allowed (`max_perms`), as a debugger does.

    Returns:
        Bytes copied: all that the ranges hold, or fewer if `src` has no more now.

    Raises:
        GuestFaultError: `.addr` cannot be written; the `.done` bytes before it have been.
            `GuestBusError`: because its file ends. If `src` was read through a buffer (a mechanism
            was forced), what it has given beyond that is lost.
        HostBufferError: The buffer `src` itself faults.
        ArenaExhaustedError: No memory is left to back it.
        StateError: `src` has called an operation of `mm`, or kept memory that it was lent.
        TypeError: `src` is nothing that can be read.
        OSError: What a mappable says.
        Exception: Whatever `src` raises, as it is.

    Source: gVisor mm.CopyOutFrom.
    """
    if isinstance(src, str):
        src = src.encode()
    if is_buffer(src):
        with memoryview(src) as data:
            return _copy_buffer(
                mm, ars, data, WRITE, mm.copy_out_vec, opts=opts,
                ignore_permissions=ignore_permissions,
            )  # fmt: skip
    reader = as_reader(src)
    ars = check_io_vec(mm, ars, WRITE)
    if not ars.n_bytes:
        return 0
    if opts is not None:
        if _goes_through_buffer(mm, ars, opts, ignore_permissions=ignore_permissions):
            return _copy_out_from_buffer(mm, ars, reader, opts)
        ignore_permissions = ignore_permissions or opts.ignore_permissions
    return with_vec_internal_mappings(
        mm, ars, WRITE, reader.read_to_blocks, ignore_permissions=ignore_permissions
    )


def copy_in_to(
    mm: MemoryManager, ars: AddrRangeSeq | AddrRange, dst: Destination, *,
    opts: IOOpts | None = None, ignore_permissions: bool = False,
) -> int:  # fmt: skip
    """Copy guest memory to a writer (guest -> host), one range after the other.

    Args:
        mm: The address space.
        ars: Guest addresses.
        dst: A `Writer`, a writable buffer, a binary file, or a socket. It is called once at most,
            and not at all if nothing can be read.
        opts: How to copy.
        ignore_permissions: Access whatever could ever be allowed (`max_perms`), as a debugger does.

    Returns:
        Bytes that `dst` took: all that the ranges hold, or fewer if it takes no more now.

    Raises:
        GuestFaultError: `.addr` cannot be read; `dst` has taken the `.done` bytes before it.
            `GuestBusError`: because its file ends.
        Exception: Everything else as in `copy_out_from`.

    Source: gVisor mm.CopyInTo.
    """
    if is_buffer(dst):
        with memoryview(dst) as data:
            if data.readonly:
                raise TypeError(f"{type(dst).__name__} cannot be written")
            return _copy_buffer(
                mm, ars, data, READ, mm.copy_in_vec, opts=opts,
                ignore_permissions=ignore_permissions,
            )  # fmt: skip
    writer = as_writer(dst)
    ars = check_io_vec(mm, ars, READ)
    if not ars.n_bytes:
        return 0
    if opts is not None:
        if _goes_through_buffer(mm, ars, opts, ignore_permissions=ignore_permissions):
            return _copy_in_to_buffer(mm, ars, writer, opts)
        ignore_permissions = ignore_permissions or opts.ignore_permissions
    return with_vec_internal_mappings(
        mm, ars, READ, writer.write_from_blocks, ignore_permissions=ignore_permissions
    )


def _copy_buffer(
    mm: MemoryManager, ars: AddrRangeSeq | AddrRange, data: memoryview, access: int,
    copy: Callable[..., int], *, opts: IOOpts | None, ignore_permissions: bool,
) -> int:  # fmt: skip
    # Bytes from buffer to buffer are C's, by any mechanism. It checks all ranges that it is given.
    n_bytes = data.nbytes
    if isinstance(ars, AddrRange) or not (n_bytes and ars.n_bytes) or n_bytes < ars.n_bytes:
        ars = check_io_vec(mm, ars, access)
        n_bytes = min(n_bytes, ars.n_bytes)
    else:
        n_bytes = ars.n_bytes
    if n_bytes:
        first = ars.take_first(n_bytes) if n_bytes < ars.n_bytes else ars
        with data.cast("B") as whole, whole[:n_bytes] as part:
            copy(first, part, opts=opts, ignore_permissions=ignore_permissions)
    if n_bytes < ars.n_bytes:
        ignores = ignore_permissions or (opts is not None and opts.ignore_permissions)
        _check_next(mm, ars, n_bytes, access, ignore_permissions=ignores)
    return n_bytes


def _goes_through_buffer(
    mm: MemoryManager, ars: AddrRangeSeq, opts: IOOpts, *, ignore_permissions: bool
) -> bool:
    # Only where somebody insists on the address space: internal mappings need no buffer.
    if opts.mechanism not in {"walk", "mirror"} or not opts.address_space_active:
        return False
    if ignore_permissions or opts.ignore_permissions:
        return False
    return ars.n_bytes < mm.policy.bounce_max_bytes


def _copy_out_from_buffer(
    mm: MemoryManager, ars: AddrRangeSeq, reader: Reader, opts: IOOpts
) -> int:
    buffer = bytearray(ars.n_bytes)
    src_fault = None
    with BlockSeq.of_buffer(buffer, writable=True) as blocks:
        try:
            n_bytes = checked_count(reader.read_to_blocks(blocks), ars.n_bytes, reader)
        except HostBufferError as e:
            # What comes before it is there, and is copied as by any other way.
            src_fault, n_bytes = e, e.done
    with memoryview(buffer)[:n_bytes] as data:
        error = _by_pages(ars, data, lambda addr, part: mm.copy_out(addr, part, opts=opts))[1]
    error = error or src_fault
    if error is not None:
        raise error
    if n_bytes < ars.n_bytes:
        _check_next(mm, ars, n_bytes, WRITE, ignore_permissions=False)
    return n_bytes


def _check_next(
    mm: MemoryManager, ars: AddrRangeSeq, done: int, access: int, *, ignore_permissions: bool
) -> None:
    # Internal mappings refuse when all bytes before one that cannot be accessed are done, whether
    # the other side has more or not: they cannot know. So it is everywhere.
    rest = ars.drop_first(done)
    while not rest.head:
        rest = rest.tail
    start = rest.head.start
    try:
        with_internal_mappings(
            mm, AddrRange(start, start + 1), access, lambda _: 0,
            ignore_permissions=ignore_permissions,
        )  # fmt: skip
    except GuestFaultError as error:
        raise _with_done(error, done) from None


def _copy_in_to_buffer(mm: MemoryManager, ars: AddrRangeSeq, writer: Writer, opts: IOOpts) -> int:
    buffer = bytearray(ars.n_bytes)
    with memoryview(buffer) as data:
        done, error = _by_pages(ars, data, lambda addr, part: mm.copy_in(addr, part, opts=opts))
    taken = 0
    if done:
        with BlockSeq.of_buffer(buffer) as blocks:
            srcs = blocks.take_first(done)
            taken = checked_count(writer.write_from_blocks(srcs), done, writer)
    if error is not None and taken == done:
        raise error
    return taken


def _by_pages(
    ars: AddrRangeSeq, data: memoryview, copy: Callable[[int, memoryview], int]
) -> tuple[int, OSError | None]:
    # Copy the ranges from or to `data`: how much, and the error that ended it, telling the whole.
    # No copy crosses a page, so that one which fails without telling a count has done nothing.
    done = 0
    for addr, n_bytes in _pieces(ars, len(data)):
        try:
            with data[done : done + n_bytes] as part:
                copy(addr, part)
        except GuestFaultError as error:
            done += error.done
            return done, _with_done(error, done)
        except OSError as error:
            return done, error
        done += n_bytes
    return done, None


def _pieces(ars: AddrRangeSeq, left: int) -> Iterator[tuple[int, int]]:
    for ar in ars:
        addr = ar.start
        while addr < ar.end and left:
            n_bytes = min(ar.end - addr, left, page_down(addr) + PAGE_BYTES - addr)
            yield addr, n_bytes
            addr += n_bytes
            left -= n_bytes


def _with_done(error: GuestFaultError, done: int) -> GuestFaultError:
    if isinstance(error, GuestBusError):
        return GuestBusError(error.addr, error.access, done=done)
    if isinstance(error, NoProgressError):
        return NoProgressError(error.addr, error.access, error.n_tries, done=done)
    return GuestFaultError(error.addr, error.access, mapped=error.mapped, done=done)
