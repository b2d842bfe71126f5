"""Memory in every layout, and the residency states: brought about, verified, and noticed if not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.ground import Fresh, Ground
from kvmmm.bench.crossover.pool import GroundError, Pool, offers_huge_pages
from kvmmm.bench.crossover.states import Pagemap, State
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.mm import IOOpts
from kvmmm.safemem.ffi import drop_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

N_BYTES = 3 * PAGE_BYTES
AT = START + 5 * PAGE_BYTES + 100
MECHANISMS = ("internal", "walk", "mirror")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool()
    yield found
    found.close()


@pytest.fixture(scope="module")
def ground(pool: Pool) -> Iterator[Ground]:
    found = Ground(pool, "1000", "scattered")
    yield found
    found.close()


@pytest.fixture(scope="module")
def pagemap() -> Iterator[Pagemap]:
    found = Pagemap()
    yield found
    found.close()


@pytest.mark.parametrize("layout", [("1", "contiguous"), ("10", "contiguous"), ("10", "scattered")])
@pytest.mark.parametrize("kind", ["warm", "cold"])
def test_all_mechanisms_find_the_same_bytes(pool: Pool, layout: tuple[str, str], kind: str):
    ground = Ground(pool, *layout)
    mm = ground.warm() if kind == "warm" else ground.cold()
    n = ground.geometry.segment_bytes
    try:
        addr = START + n - 100
        for index, mechanism in enumerate(MECHANISMS):
            data = bytes((7 * at + index) & 255 for at in range(200))
            data = data[: min(200, ground.geometry.length_bytes - n + 100)]
            opts = IOOpts(mechanism=mechanism)
            assert mm.copy_out(addr, data, opts=opts) == len(data)
            for other in MECHANISMS:
                assert mm.read(addr, len(data), opts=IOOpts(mechanism=other)) == data
            fo = ground.offsets[0] + n - 100
            assert bytes(pool.arena.view[fo : fo + 100]) == data[:100]
    finally:
        ground.close()


@pytest.mark.parametrize("residency", ["warm", "mirror-cold", "linear-cold", "cold"])
def test_a_state_is_there_again_and_again(ground: Ground, pagemap: Pagemap, residency: str):
    state = State(ground, residency, pagemap)
    buffer = bytearray(N_BYTES)
    for _ in range(3):
        for mechanism in MECHANISMS:
            with state.prepared(AT, N_BYTES):
                state.verify(AT, N_BYTES)
                state.mm.copy_in(AT, buffer, opts=IOOpts(mechanism=mechanism))
                state.verify_after(mechanism, AT, N_BYTES, None)
    if state.is_linear_cold:
        # And then it is warm, as others expect it.
        State(ground, "warm", pagemap).verify(AT, N_BYTES)


@pytest.mark.parametrize("residency", ["warm", "mirror-cold"])
def test_a_linear_mapping_without_entries_is_noticed(
    ground: Ground, pagemap: Pagemap, residency: str
):
    state = State(ground, residency, pagemap)
    drop_pages(ground.pool.arena.hva + ground.offsets[6], PAGE_BYTES)
    with pytest.raises(GroundError, match="3 of 4 pages are in the linear mapping"):
        state.verify(AT, N_BYTES)
    state.mend()
    state.verify(AT, N_BYTES)


def test_entries_in_a_linear_mapping_that_should_have_none_are_noticed(
    ground: Ground, pagemap: Pagemap
):
    state = State(ground, "linear-cold", pagemap)
    with state.prepared(AT, N_BYTES):
        assert ground.pool.arena.view[ground.offsets[5]] >= 0  # a touch
        with pytest.raises(GroundError, match="pages are in the linear mapping"):
            state.verify(AT, N_BYTES)


def test_a_page_in_a_mirror_that_should_be_empty_is_noticed(ground: Ground, pagemap: Pagemap):
    state = State(ground, "mirror-cold", pagemap)
    with state.prepared(AT, N_BYTES):
        state.mm.read(AT, 1, opts=IOOpts(mechanism="mirror"))
        with pytest.raises(GroundError, match="in the mirror"):
            state.verify(AT, N_BYTES)
    with state.prepared(AT, N_BYTES):
        pass


def test_a_hole_in_a_full_mirror_is_noticed(pool: Pool, pagemap: Pagemap):
    ground = Ground(pool, "10", "contiguous")
    state = State(ground, "warm", pagemap)
    assert state.mm.mirror is not None
    state.verify(AT, N_BYTES)
    state.mm.mirror.forget(START + 6 * PAGE_BYTES, START + 7 * PAGE_BYTES)
    with pytest.raises(GroundError, match="not all of it is in the mirror"):
        state.verify(AT, N_BYTES)
    ground.close()


def test_entries_missing_in_the_mirror_are_noticed(ground: Ground, pagemap: Pagemap):
    state = State(ground, "warm", pagemap)
    assert state.mm.mirror is not None
    found = state.mm.mirror.find(AT, N_BYTES, READ_WRITE)
    assert found is not None
    drop_pages(found[0] & -PAGE_BYTES, PAGE_BYTES)
    with pytest.raises(GroundError, match="of the mirror are present"):
        state.verify(AT, N_BYTES)
    state.mend()
    state.verify(AT, N_BYTES)


def test_costs_that_were_not_paid_are_noticed(ground: Ground, pagemap: Pagemap):
    linear_cold = State(ground, "linear-cold", pagemap)
    with linear_cold.prepared(AT, N_BYTES):
        linear_cold.verify_after("internal", AT, N_BYTES, 1)
        linear_cold.verify_after("mirror", AT, N_BYTES, 0)
        with pytest.raises(GroundError, match="took no page fault"):
            linear_cold.verify_after("internal", AT, N_BYTES, 0)
        with pytest.raises(GroundError, match="took 2 page faults in resident memory"):
            linear_cold.verify_after("mirror", AT, N_BYTES, 2)
    mirror_cold = State(ground, "mirror-cold", pagemap)
    with (
        mirror_cold.prepared(AT, N_BYTES),
        pytest.raises(GroundError, match="left 0 pages in the mirror"),
    ):
        mirror_cold.verify_after("mirror", AT, N_BYTES, 1)


def test_a_host_without_enough_vmas_is_told(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvmmm.bench.crossover.ground._VMAS_LEFT", 1 << 30)
    ground = Ground(pool, "10", "scattered")
    with pytest.raises(GroundError, match="max_map_count"):
        ground.warm()
    ground.close()


def test_huge_pages_that_are_not_given_are_told():
    if offers_huge_pages():
        pytest.skip("this host gives 2 MiB pages to shared memory")
    with pytest.raises(GroundError, match="in 2 MiB pages"):
        Pool(HUGE_PAGE_BYTES)


def test_fresh_memory_is_backed_by_its_first_touch_in_every_way():
    fresh = Fresh()
    for mechanism in MECHANISMS:
        fresh.mm.mmap(2 * PAGE_BYTES, READ_WRITE, addr=START, fixed=True)
        assert not fresh.mm.frames(START, START + 2 * PAGE_BYTES)
        opts = IOOpts(mechanism=mechanism)
        fresh.mm.copy_out(START + 4090, b"0123456789", opts=opts)
        assert fresh.mm.read(START + 4090, 10, opts=opts) == b"0123456789"
        fresh.mm.munmap(START, 2 * PAGE_BYTES)
    fresh.close()
