"""Rules: what CPU, host and devices do to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from tests.model.backends import CODE
from tests.model.domains import Between, Either, OneOf
from tests.model.memory import PAGE
from tests.model.model import Fault
from tests.model.rule import AT, FEW, FLAG, LENGTH, OFFSET, PATTERN, SEED, WHO, rule
from tests.model.world import Pinned

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.world import Member, World


# ---- what a CPU does ----


@rule(7, who=WHO, at=AT, offset=OFFSET, length=LENGTH)
def cpu_loads(w: World, who: int, at: int, offset: int, length: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    fault = m.model.reach(addr, length, READ)
    data, error = w.attempt(lambda: w.backend.load(m.mm, addr, length))
    w.same_fault(error, fault)
    assert fault is not None or m.model.sees(addr, data), f"{data[:64].hex()} at {addr:#x}"


@rule(9, who=WHO, at=AT, offset=OFFSET, length=LENGTH, seed=SEED)
def cpu_stores(w: World, who: int, at: int, offset: int, length: int, seed: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    data = PATTERN[seed : seed + m.model.tail_bytes(addr, length)]
    if not data:
        return
    fault = m.model.reach(addr, len(data), WRITE)
    _, error = w.attempt(lambda: w.backend.store(m.mm, addr, data))
    w.same_fault(error, fault)
    done = len(data) if fault is None else fault.done
    is_plain = len(data) in {1, 2, 4, 8}
    if fault is None or not (is_plain and w.backend.is_atomic):
        m.model.write(addr, data[:done])
    if fault is not None and is_plain and not done and w.backend.is_torn:
        _may_be_torn(m, addr, data)


def _may_be_torn(m: Member, addr: int, data: bytes) -> None:
    # Refused at its first page; what lies in the second may be there, if that could be written.
    n_first = PAGE - addr % PAGE
    rest = addr + n_first
    model = m.model
    if n_first >= len(data) or model.reach(rest, 1, WRITE) is not None:
        return
    kind = model.kinds[rest // PAGE]
    if kind.backing is not None:
        if kind.private and rest // PAGE not in model.own:
            return  # a file's own page: no CPU may write it
        if not kind.private:
            model.memory.will_change(kind.backing.store, rest // PAGE + kind.delta)
    model.own_cell(rest // PAGE).may_write(0, data[n_first:])


@rule(3, who=WHO, at=AT, offset=OFFSET)
def cpu_fetches(w: World, who: int, at: int, offset: int) -> None:
    """What is run is put there before, as a debugger would."""
    m = w.member(who)
    addr = w.page(m, at) * PAGE + min(offset, PAGE - len(CODE))
    fault = m.model.reach(addr, len(CODE), EXECUTE)
    if fault is None:
        is_writable = m.model.reach(addr, len(CODE), WRITE, ignore=True) is None
        if not is_writable or m.model.tail_bytes(addr, len(CODE)) < len(CODE):
            return
        m.mm.copy_out(addr, CODE, ignore_permissions=True)
        m.model.write(addr, CODE)
    _, error = w.attempt(lambda: w.backend.fetch(m.mm, addr))
    w.same_fault(error, fault)


# ---- what the host does ----


def _host_fault(m: Member, addr: int, n_bytes: int, access: int, *, ignore: bool) -> Fault | None:
    """Where a copy of the host's must stop: one that ends beyond all addresses does not begin."""
    max_addr = m.mm.max_addr
    if max_addr < addr + n_bytes:
        return Fault(max(addr, max_addr), 0, mapped=False)
    return m.model.reach(addr, n_bytes, access, ignore=ignore)


@rule(4, who=WHO, at=AT, offset=OFFSET, length=Either(OneOf(0), LENGTH), ignore=FLAG)
def host_reads(w: World, who: int, at: int, offset: int, length: int, ignore: bool) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    fault = _host_fault(m, addr, length, READ, ignore=ignore)
    dst = bytearray(b"\xee" * length)
    n_bytes, error = w.attempt(lambda: m.mm.copy_in(addr, dst, ignore_permissions=ignore))
    w.same_fault(error, fault, exact=True)
    assert fault is not None or n_bytes == length
    done = length if fault is None else fault.done
    assert m.model.sees(addr, bytes(dst[:done]))
    assert dst[done:] == b"\xee" * (length - done)


@rule(4, who=WHO, at=AT, offset=OFFSET, length=Either(OneOf(0), LENGTH), seed=SEED, ignore=FLAG)
def host_writes(
    w: World, who: int, at: int, offset: int, length: int, seed: int, ignore: bool
) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    data = PATTERN[seed : seed + m.model.tail_bytes(addr, length)]
    _host_writes(
        w, m, addr, data, lambda: m.mm.copy_out(addr, data, ignore_permissions=ignore), ignore
    )


@rule(2, who=WHO, at=AT, offset=OFFSET, length=Either(LENGTH, OneOf(150_000)), ignore=FLAG)
def host_zeroes(w: World, who: int, at: int, offset: int, length: int, ignore: bool) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    n_bytes = m.model.tail_bytes(addr, length)
    _host_writes(
        w, m, addr, bytes(n_bytes),
        lambda: m.mm.zero_out(addr, n_bytes, ignore_permissions=ignore), ignore,
    )  # fmt: skip


def _host_writes(
    w: World, m: Member, addr: int, data: bytes, act: Callable[[], int], ignore: bool
) -> None:
    fault = _host_fault(m, addr, len(data), WRITE, ignore=ignore)
    n_bytes, error = w.attempt(act)
    w.same_fault(error, fault, exact=True)
    assert fault is not None or n_bytes == len(data)
    m.model.write(addr, data[: len(data) if fault is None else fault.done])


@rule(2, who=WHO, at=AT, count=FEW)
def populate(w: World, who: int, at: int, count: int) -> None:
    m = w.member(who)
    page = w.page(m, at)
    done = w.agree(
        lambda: m.mm.populate(page * PAGE, count * PAGE) or True,
        lambda: m.model.populate(page * PAGE, count * PAGE) or True,
    )
    assert (
        not done
        or w.backend.may_evict
        or all(m.mm.address_space.is_mapped(p * PAGE, READ) for p in range(page, page + count))
    )


@rule(who=WHO)
def map_resident(w: World, who: int) -> None:
    w.member(who).mm.map_resident()


@rule(
    4, when=lambda world: bool(world.members) and len(world.pins) < 4, who=WHO, at=AT,
    offset=OFFSET, length=LENGTH, access=OneOf(READ, WRITE, READ_WRITE),
)  # fmt: skip
def pins(w: World, who: int, at: int, offset: int, length: int, access: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    made: list[Any] = []

    def pin() -> bool:
        made.append(m.mm.pin_frames(addr, length, access))
        return made[-1].error is None

    def model() -> bool:
        kept, is_all = m.model.pinned(addr, length, access)
        made.append(kept)
        return is_all

    w.agree(pin, model)
    if len(made) == 2:
        w.pins.append(Pinned(made[1], made[0], access))
        w.check_pin(w.pins[-1])


@rule(1, when=lambda world: bool(world.pins), which=Between(0, 3))
def unpins(w: World, which: int) -> None:
    w.pins.pop(which % len(w.pins)).pin.release()


@rule(2, when=lambda world: bool(world.pins), which=Between(0, 3), page=Between(0, 3), seed=SEED)
def device_writes(w: World, which: int, page: int, seed: int) -> None:
    """What it writes into pinned frames is seen behind the addresses that were pinned."""
    pinned = w.pins[which % len(w.pins)]
    page %= len(pinned.frames)
    (file, fo), (cell, store, index) = pinned.frames[page], pinned.kept[page]
    if not pinned.access & WRITE:
        return
    data = PATTERN[seed : seed + 100]
    if store is not None and not store.is_memory and store.size_bytes < index * PAGE + 100:
        return
    assert file.write_from(fo, memoryview(data)) == len(data)
    if store is not None and (cell is None or store.cells.get(index) is cell):
        w.memory.write_store(store, index, 0, data)
    elif cell is not None:
        cell.write(0, data)
