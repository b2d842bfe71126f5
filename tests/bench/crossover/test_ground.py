"""Memory in every layout, and the residency states: brought about, verified, and noticed if not."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmmm.bench.crossover import pool as pool_module
from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.ground import Fresh, Ground
from kvmmm.bench.crossover.pool import GroundError, Pool, offers_huge_pages
from kvmmm.bench.crossover.states import Pagemap, State
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.mm import IOOpts
from kvmmm.safemem.ffi import address_of, drop_pages, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


@pytest.mark.parametrize("residency", ["linear-cold", "cold"])
def test_entries_in_a_linear_mapping_that_should_have_none_are_noticed(
    ground: Ground, pagemap: Pagemap, residency: str
):
    state = State(ground, residency, pagemap)
    with state.prepared(AT, N_BYTES):
        assert ground.pool.arena.view[ground.offsets[5]] >= 0  # a touch
        with pytest.raises(GroundError, match="pages are in the linear mapping"):
            state.verify(AT, N_BYTES)


@pytest.mark.parametrize("residency", ["mirror-cold", "cold"])
def test_a_page_in_a_mirror_that_should_be_empty_is_noticed(
    ground: Ground, pagemap: Pagemap, residency: str
):
    state = State(ground, residency, pagemap)
    with state.prepared(AT, N_BYTES):
        state.mm.read(AT, 1, opts=IOOpts(mechanism="mirror"))
        with pytest.raises(GroundError, match="in the mirror"):
            state.verify(AT, N_BYTES)
    with state.prepared(AT, N_BYTES):
        pass


@pytest.mark.parametrize("residency", ["warm", "linear-cold"])
def test_a_hole_in_a_full_mirror_is_noticed(pool: Pool, pagemap: Pagemap, residency: str):
    ground = Ground(pool, "10", "contiguous")
    state = State(ground, residency, pagemap)
    assert state.mm.mirror is not None
    for at in (AT, AT + 50 * PAGE_BYTES):
        if state.is_linear_cold:
            state._linear("drop", cast("Any", lib).KVMMM_CROSS_DROP, at, N_BYTES)
        state.verify(at, N_BYTES)
    state.mm.mirror.forget(START + 6 * PAGE_BYTES, START + 7 * PAGE_BYTES)
    with pytest.raises(GroundError, match="1 pages are not in the mirror"):
        state.verify(AT, N_BYTES)
    # Wherever it is: what is timed is many places, of which one is looked at.
    with pytest.raises(GroundError, match="1 pages are not in the mirror"):
        state.verify(AT + 50 * PAGE_BYTES, N_BYTES)
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
        # Nothing has been copied yet.
        linear_cold.verify_after("mirror", AT, N_BYTES, 0)
        with pytest.raises(GroundError, match="took 2 page faults in resident memory"):
            linear_cold.verify_after("mirror", AT, N_BYTES, 2)
        with pytest.raises(GroundError, match="after internal 0 of 4 pages"):
            linear_cold.verify_after("internal", AT, N_BYTES, None)
        linear_cold.mm.read(AT, N_BYTES)
        linear_cold.verify_after("internal", AT, N_BYTES, 1)
        with pytest.raises(GroundError, match="took no page fault"):
            linear_cold.verify_after("internal", AT, N_BYTES, 0)
        with pytest.raises(GroundError, match="after mirror 4 of 4 pages"):
            linear_cold.verify_after("mirror", AT, N_BYTES, None)
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


def test_fresh_memory_that_is_none_is_noticed():
    fresh = Fresh()
    low, high = START, START + 4 * PAGE_BYTES
    fresh.mm.mmap(high - low, READ_WRITE, addr=low, fixed=True)
    fresh.verify(low, high)
    fresh.mm.write(low + PAGE_BYTES, b"x")
    with pytest.raises(GroundError, match="is backed"):
        fresh.verify(low, high)
    # Frames that the next mapping would be given, and that have memory already.
    fresh.mm.munmap(low, high - low)
    fresh.mm.mmap(high - low, READ_WRITE, addr=low, fixed=True)
    fresh.verify(low, high)
    used = fresh.arena.allocate(PAGE_BYTES)
    with fresh.arena.view_of(used) as view:
        view[0] = 1
    with pytest.raises(GroundError, match="have memory"):
        fresh.verify(low, high)
    fresh.arena.dec_ref(used)
    fresh.verify(low, high)
    fresh.close()


def test_pieces_are_where_the_bytes_are(ground: Ground):
    mm, view = ground.warm(), ground.pool.arena.view
    n_bytes = 3 * PAGE_BYTES + 200
    mm.write(AT, bytes(at * 13 & 255 for at in range(n_bytes)))
    pieces = list(ground.pieces(AT, n_bytes))
    assert [n for _, n in pieces] == [PAGE_BYTES - 100, PAGE_BYTES, PAGE_BYTES, 300]
    assert b"".join(bytes(view[fo : fo + n]) for fo, n in pieces) == mm.read(AT, n_bytes)


@pytest.mark.parametrize("residency", ["linear-cold", "cold", "mirror-cold"])
def test_whatever_is_timed_all_mechanisms_have_looked_up(
    ground: Ground, pagemap: Pagemap, residency: str, monkeypatch: pytest.MonkeyPatch
):
    # Verification reads the frame table; only to time a walk with its tables in no cache is unfair.
    state = State(ground, residency, pagemap)
    found: list[int] = []

    class Walk:
        def find(self, addr: int, _n_bytes: int, _access: int) -> None:
            found.append(addr)

    class Mm:
        walk = Walk()
        mirror = state.mm.mirror

    monkeypatch.setattr(State, "verify", lambda *_: None)
    monkeypatch.setattr(State, "_linear", lambda *_: 0)
    state.mm = cast("Any", Mm())
    with state.prepared(AT, N_BYTES):
        assert found == [AT]


def mapped(n_bytes: int, *, huge: bool) -> Iterator[int]:
    with mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        view = ffi.from_buffer(memory, require_writable=True)
        hva = address_of(view)
        start = -hva % HUGE_PAGE_BYTES
        for at in range(start, start + n_bytes, PAGE_BYTES):
            memory[at] = 1
        yield hva + start
        ffi.release(view)


def test_pages_of_2_mib_are_told_from_others(pagemap: Pagemap):
    if not pagemap.can_scan:
        pytest.skip("this kernel does not say which entries are of 2 MiB (Linux 6.7)")
    for hva in mapped(HUGE_PAGE_BYTES, huge=False):
        assert pagemap.huge_bytes(hva, HUGE_PAGE_BYTES) == 0
    for hva in mapped(HUGE_PAGE_BYTES, huge=True):
        got = pagemap.huge_bytes(hva + 5000, 100)
        if not got:
            pytest.skip("this host gives no 2 MiB pages now")
        assert got == PAGE_BYTES
        assert pagemap.huge_bytes(hva, HUGE_PAGE_BYTES) == HUGE_PAGE_BYTES


def test_a_cell_of_2_mib_pages_that_has_none_is_noticed(ground: Ground, pagemap: Pagemap):
    # In the one mapping, or in the other.
    state = State(ground, "warm", pagemap)
    state.verify(AT, N_BYTES)
    state._huge_mirror = True
    with pytest.raises(GroundError, match="0 of 16384 bytes of the mirror are in 2 MiB pages"):
        state.verify(AT, N_BYTES)
    state._huge_linear = True
    with pytest.raises(GroundError, match="of the linear mapping are in 2 MiB pages"):
        state.verify(AT, N_BYTES)


@pytest.mark.parametrize(
    ("of_all", "of_size", "offers"),
    [
        ("always [never]", None, False), ("always [advise] never", None, True),
        ("[never] always", "[inherit] always", False), ("[always]", "inherit [never]", False),
        ("[never]", "inherit [always]", True), ("[advise]", "[inherit]", True),
        ("[deny]", "[always]", False), ("[force]", "[never]", True), (None, None, False),
        ("nonsense", None, False),
    ],
)  # fmt: skip
def test_what_the_kernel_says_about_huge_pages_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_all: str | None, of_size: str | None,
    offers: bool,
):  # fmt: skip
    (tmp_path / "hugepages-2048kB").mkdir()
    if of_all is not None:
        (tmp_path / "shmem_enabled").write_text(of_all)
    if of_size is not None:
        (tmp_path / "hugepages-2048kB" / "shmem_enabled").write_text(of_size)
    monkeypatch.setattr(pool_module, "_THP", tmp_path)
    assert offers_huge_pages() == offers


def test_small_pages_that_are_huge_are_told(monkeypatch: pytest.MonkeyPatch):
    # A host may give huge pages to whoever does not ask: then both sides are not what they say.
    monkeypatch.setattr(pool_module, "_huge_bytes", lambda _: 4 << 20)
    with pytest.raises(GroundError, match="4 of 256 MiB are in 2 MiB pages"):
        Pool()


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
