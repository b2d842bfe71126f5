"""`bench copies`: its memory is what it says, its floors copy, its groups measure."""

from __future__ import annotations

import errno
import os
import threading
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.bench import copies, copies_cold, copies_large, copies_many, copies_peers, copies_small
from kvmmm.bench.copies import FLOOR, START, GuestMemory
from kvmmm.bench.runner import measure
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.safemem.ffi import ffi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.bench.case import Group
    from kvmmm.hostarch.ranges import FileRange

pytestmark = pytest.mark.usefixtures("no_leak")
PATTERN = bytes(range(256)) * 16


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(8 * PAGE_BYTES) as memory:
        yield memory


def test_guest_memory_is_resident_and_one_pma(memory: GuestMemory) -> None:
    assert len(memory.mm.pmas) == 1
    assert memory.mm.read(START, 8 * PAGE_BYTES) == PATTERN * 8
    assert os.fstat(memory.arena.fd).st_blocks * 512 == 8 * PAGE_BYTES


def test_addresses_are_aligned_and_have_their_bytes(memory: GuestMemory) -> None:
    addresses = memory.addresses(500, 64)

    assert len(addresses) == 500
    assert all(not addr % 8 for addr in addresses)
    assert min(addresses) >= START
    assert max(addresses) + 64 <= START + 8 * PAGE_BYTES


def test_two_mms_have_the_same_frames_in_different_orders(memory: GuestMemory) -> None:
    order = copies_many.scattered(8)
    other = memory.map_again(order)

    for frame in range(8):
        memory.mm.copy_out(START + frame * PAGE_BYTES, bytes([frame]))
    assert [other.read(START + page * PAGE_BYTES, 1)[0] for page in range(8)] == order
    assert len(other.pmas) == 8


@pytest.mark.parametrize("n", [4, 10, 2000])
def test_scattered_pages_have_no_neighbours(n: int) -> None:
    order = copies_many.scattered(n)

    assert sorted(order) == list(range(n))
    assert all(b != a + 1 for a, b in pairwise(order))


def test_the_floor_copies_both_ways(memory: GuestMemory) -> None:
    buffer = bytearray(64)
    addresses = [START + 5, START + 2 * PAGE_BYTES]

    assert copies.by_memcpy([memory.hva_of(addr) for addr in addresses], buffer, out=False) > 0
    assert buffer == PATTERN[:64]

    buffer[:] = b"!" * 64
    copies.by_memcpy([memory.hva_of(addr) for addr in addresses], buffer, out=True)
    for addr in addresses:
        assert memory.mm.read(addr, 64) == b"!" * 64
    assert memory.mm.read(START, 5) == PATTERN[:5]


def test_the_mirror_by_hand_maps_copies_and_leaves_nothing(memory: GuestMemory) -> None:
    buffer = ffi.new("char[]", PAGE_BYTES)
    host = int(ffi.cast("uintptr_t", buffer))
    offsets = ffi.new("uint64_t[]", [memory.frames.start + 3 * PAGE_BYTES])

    fd = memory.arena.fd
    assert FLOOR.kvmmm_floor_mirror(fd, offsets, 1, host, PAGE_BYTES, False) > 0
    assert bytes(ffi.buffer(buffer)) == PATTERN
    ffi.memmove(buffer, b"from the host", 13)
    assert FLOOR.kvmmm_floor_mirror(fd, offsets, 1, host, PAGE_BYTES, True) > 0
    assert memory.mm.read(START + 3 * PAGE_BYTES, 13) == b"from the host"

    assert FLOOR.kvmmm_floor_mirror(-1, offsets, 1, host, PAGE_BYTES, False) == -errno.EBADF


def test_cold_sides_touch_no_more_pages_than_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    n_blocks: list[int] = []
    dec_ref = Arena.dec_ref

    def look(arena: Arena, fr: FileRange) -> None:
        n_blocks.append(os.fstat(arena.fd).st_blocks)
        dec_ref(arena, fr)

    monkeypatch.setattr(Arena, "dec_ref", look)
    cold = copies_cold._Cold()
    for n_bytes, n_pages in ((64, 1), (64 << 10, 16)):
        for measure_ns in (cold._copy_ns, cold._floor_ns):
            for is_out in (False, True):
                n_blocks.clear()
                assert measure_ns(n_bytes, is_out=is_out) > 0
                # What is read is zeros, and stays a hole: the floor fills it.
                is_spared = measure_ns == cold._copy_ns and not is_out
                n_filled = 0 if is_spared else copies_cold.COPIES * n_pages
                assert max(n_blocks) * 512 == n_filled * PAGE_BYTES
                assert not os.fstat(cold.arena.fd).st_blocks
    cold.close()


def test_both_sides_go_to_the_same_places_half_a_cycle_apart() -> None:
    first, second = (copies_large.Places(is_second=is_second) for is_second in (False, True))
    n_bytes = 1 << 20
    start, length_bytes = copies_large.REGIONS[n_bytes]

    addresses = [[a for _ in range(99) for a in side.cold(n_bytes)] for side in (first, second)]

    for places in addresses:
        assert all(START + start <= addr for addr in places)
        assert all(addr + n_bytes <= START + start + length_bytes for addr in places)
    assert abs(addresses[0][0] - addresses[1][0]) >= length_bytes // 2 - 4096
    assert first.hot(n_bytes) == second.hot(n_bytes)


# Every group, with everything small; what the times are does not matter.


def small_groups(monkeypatch: pytest.MonkeyPatch) -> dict[str, Group]:
    monkeypatch.setattr(copies_many, "PAGES", 64)
    monkeypatch.setattr(copies_many, "_COPIES", 50)
    monkeypatch.setattr(copies_many, "_ALONE_NS", 1_000_000)
    monkeypatch.setattr(copies_large, "COPIES", {64 << 10: 1, 1 << 20: 1, 16 << 20: 1})
    modules = (copies_small, copies_peers, copies_large, copies_many, copies_cold)
    return {
        case.name: group for module in modules for group in module.GROUPS for case in group.cases
    }


@pytest.mark.parametrize(
    "name",
    [
        "small_slice", "small_unicorn", "small_process_vm", "large_memcpy", "pma_scaling",
        "spinner", "cold_64", "mirror_first_touch", "vec_16x64",
    ],
)  # fmt: skip
def test_a_group_gives_the_records_of_its_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = small_groups(monkeypatch)[f"copies/{name}"]
    if missing := group.missing():
        pytest.skip(missing)
    group.rounds, group.warm_up = 1, 0

    records = measure(group)

    assert [record.case for record in records] == list(group.cases)
    for record in records:
        assert record.extra["worst"] in record.case.each
        assert set(record.case.each) <= set(record.extra)


def test_a_spinner_runs_only_inside() -> None:
    before = threading.active_count()
    with copies_many.spinning():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_unicorn_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    [group, _] = copies_peers.GROUPS

    assert "unicorn is not installed" in group.missing()
