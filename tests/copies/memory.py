"""Guest memory to the byte: the model of memory managers, asked what a copy must come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmmm.hostarch.access import READ_EXECUTE
from tests.model.memory import PAGE, ZEROS, Backing, Memory, Store
from tests.model.model import Fault, Space, cuts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmmm.mm import MemoryManager

FILE_BYTES = 79 * PAGE + 1234
"""Above the largest copy; its last page is not full."""
SHARED_BYTES = 70 * PAGE


class CopyMemory(Memory):
    """With two more files, which are cut short without anybody being told.

    Attributes:
        cut: Mapped shared, by descriptors for reading and for writing.
        brief: Mapped privately, and cut once, as long as nobody has written to it: afterwards
            nothing says whether a page behind its end has been copied before.
    """

    def __init__(self) -> None:
        super().__init__(FILE_BYTES, SHARED_BYTES)
        self.cut = Backing(Store(FILE_BYTES, is_memory=False), "/cut")
        self.cut_read_only = Backing(self.cut.store, "/cut-read-only", READ_EXECUTE)
        self.brief = Backing(Store(FILE_BYTES, is_memory=False), "/brief")

    def backing(self, name: str) -> Backing | None:
        """What is called so; None for anonymous memory."""
        known = (
            self.file,
            self.read_only,
            self.shared,
            self.cut,
            self.cut_read_only,
            self.brief,
        )
        return next((one for one in known if one.name == name), None)

    def resize(self, backing: Backing, size_bytes: int) -> None:
        """`truncate` of any file."""
        kept, self.file = self.file, backing
        self.truncate(size_bytes)
        self.file = kept

    def will_change(self, store: Store, index: int) -> None:
        """The same by mappings instead of by pages: there are few, and this is called often."""
        for space in self.spaces:
            for start, end, kind in space.vmas():
                if not kind.private or kind.backing is None or kind.backing.store is not store:
                    continue
                page = index - kind.delta
                if start <= page < end and page not in space.own:
                    olds = space.olds.setdefault(page, [])
                    now = store.cell(index).options
                    olds += [bytes(option) for option in now if option not in olds]


class Outcome(NamedTuple):
    """What an operation came to; it must be the same whatever it went through.

    Attributes:
        value: What it returned.
        error: Its type's name, and its facts.
        buffer: The caller's buffer afterwards, with what stands before and behind it.
        consumed: What was taken out of a source: the one thing that may differ.
    """

    value: object = None
    error: tuple[object, ...] | None = None
    buffer: bytes = b""
    consumed: int | None = None


def facts_of(fault: Fault, access: int) -> tuple[object, ...]:
    """A fault as the error that it must be, in an `Outcome`."""
    return fault.kind.__name__, fault.addr, fault.done, fault.mapped, access


def outside(model: Space, ranges: Iterable[tuple[int, int]]) -> Fault | None:
    """What must be said of the first range that no address space can hold."""
    limit = model.n_pages * PAGE
    for addr, n in ranges:
        if addr + n > limit:
            return Fault(max(addr, limit), 0, mapped=False)
    return None


def reach(
    model: Space, ranges: Sequence[tuple[int, int]], access: int, *, ignore: bool
) -> Fault | None:
    """Where an access to these ranges, one after the other, must stop, if it must."""
    fault = outside(model, ranges)
    if fault is not None:
        return fault
    done = 0
    for addr, n in ranges:
        fault = model.reach(addr, n, access, ignore=ignore)
        if fault is not None:
            fault.done += done
            return fault
        done += n
    return None


def kept_bytes(model: Space, addr: int, n_bytes: int) -> int:
    """How much of a range may be written: behind a file's end, in its last page, it is lost."""
    fault = model.reach(addr, n_bytes, 0)
    there = n_bytes if fault is None else fault.done
    kept = model.tail_bytes(addr, there)
    return n_bytes if kept == there else kept


def first_bytes(ranges: Iterable[tuple[int, int]], n_bytes: int) -> Iterable[tuple[int, int, int]]:
    """(where in the buffer, addr, n) of the first bytes of some ranges."""
    at = 0
    for addr, n in ranges:
        taken = min(n, n_bytes - at)
        if taken <= 0 and at >= n_bytes:
            return
        yield at, addr, taken
        at += taken


def sees(model: Space, ranges: Iterable[tuple[int, int]], data: bytes) -> bool:
    """Whether these bytes can be at the beginning of these ranges."""
    pieces = first_bytes(ranges, len(data))
    return all(model.sees(addr, data[at : at + n]) for at, addr, n in pieces)


def write(model: Space, ranges: Iterable[tuple[int, int]], data: bytes) -> list[tuple[int, int]]:
    """Write to the beginning of ranges that can be reached; returns what was written."""
    written = []
    for at, addr, n in first_bytes(ranges, len(data)):
        model.write(addr, data[at : at + n])
        written.append((addr, n))
    return written


def known_bytes(model: Space, addr: int, n_bytes: int, *, until: bytes = b"") -> bytes | None:
    """What lies in a range that can be reached; None where it is not said which of several.

    Args:
        model: Whose memory it is.
        addr: Where it begins.
        n_bytes: So far.
        until: Or up to the page in which this byte is found first.
    """
    found = []
    for at, stop in cuts(addr, n_bytes):
        page = at // PAGE
        kind = model.kinds[page]
        cell = model.own.get(page)
        if cell is None and kind.backing is not None:
            if model.olds.get(page):
                return None
            cell = kind.backing.store.cell(page + kind.delta)
        if cell is not None and len(cell.options) > 1:
            return None
        content = ZEROS if cell is None else cell.options[0]
        found.append(content[at % PAGE : at % PAGE + stop - at])
        if until and until in found[-1]:
            break
    return b"".join(found)


def peek(mm: MemoryManager, addr: int, n_bytes: int) -> list[tuple[int, bytes]]:
    """What its frames hold, where there are any, without disturbing anything: (addr, bytes)."""
    found: list[tuple[int, bytes]] = []
    for start, end, pma in mm.pmas.segments(max(addr, 0), min(addr + n_bytes, mm.max_addr)):
        at = max(start, addr)
        part = bytearray(min(end, addr + n_bytes) - at)
        n_there = pma.file.read_into(at + pma.delta, memoryview(part))
        data = bytes(part[:n_there])
        if found and found[-1][0] + len(found[-1][1]) == at:
            found[-1] = found[-1][0], found[-1][1] + data
        else:
            found.append((at, data))
    return found
