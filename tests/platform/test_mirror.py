"""The mirror: where copies go, what the kernel has there, and the end."""

from __future__ import annotations

import mmap
import os
import signal
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.platform.mirror import Mirror
from kvmmm.safemem.ffi import address_of, ffi
from tests.platform.mirror_rig import (
    BASE,
    GIB,
    MAX_ADDR,
    N_PAGES,
    PAGE,
    at,
    check_windows,
    hva_of,
    peek,
    poke,
    stamp,
    window_vmas,
)

if TYPE_CHECKING:
    from tests.platform.mirror_rig import NewMirror

# ---- finding ----------------------------------------------------------------------------------


def test_a_run_is_found_at_the_guests_own_distances(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    mirror.map_run(BASE, BASE + 8 * PAGE, mirrored_fd, 3 * PAGE, READ_WRITE, (BASE, BASE + 1))
    hva = at(mirror, BASE)
    assert hva % (2 << 20) == BASE % (2 << 20)
    for page in range(8):
        assert at(mirror, BASE + page * PAGE) == hva + page * PAGE
        assert peek(hva + page * PAGE) == stamp(3 + page)
    assert mirror.find(BASE + 10, 1 << 40, READ) == (hva + 10, 8 * PAGE - 10)
    assert mirror.find(BASE + 10, 100, WRITE) == (hva + 10, 100)
    assert mirror.find(BASE + 8 * PAGE - 1, 2, READ) == (hva + 8 * PAGE - 1, 1)
    assert mirror.find(BASE - 1, 2, READ) is None
    assert mirror.find(BASE + 8 * PAGE, 1, READ) is None
    assert mirror.n_resident_pages == 8


@pytest.mark.parametrize("addr", [0, GIB, MAX_ADDR - 1, MAX_ADDR, (1 << 64) - 1])
def test_nothing_is_found_where_nothing_is(new_mirror: NewMirror, mirrored_fd: int, addr: int):
    mirror = new_mirror()
    assert mirror.find(addr, 1, READ) is None
    mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    assert mirror.find(addr, 1, READ) is None


@pytest.mark.parametrize(
    ("perms", "can_write"),
    [(READ, False), (READ_WRITE, True), (WRITE, True), (EXECUTE, False), (READ | EXECUTE, False)],
)
def test_permissions_are_the_bitmaps_and_the_kernels(
    new_mirror: NewMirror, mirrored_fd: int, perms: int, can_write: bool
):
    mirror = new_mirror()
    mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 0, perms, (BASE, BASE + 1))
    hva = at(mirror, BASE)
    assert (mirror.find(BASE, 1, WRITE) is not None) is can_write
    assert (mirror.find(BASE, 1, READ_WRITE) is not None) is can_write
    assert poke(hva, b"x") == (0 if can_write else signal.SIGSEGV)


def test_a_find_ends_with_the_gib(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    edge = 7 * GIB
    start, end = edge - 4 * PAGE, edge + 4 * PAGE
    mirror.map_run(start, end, mirrored_fd, 0, READ_WRITE, (start, end))
    assert mirror.n_windows == 2
    assert mirror.find(start, 1 << 30, READ) == (hva_of(mirror, start), 4 * PAGE)
    assert mirror.find(edge, 1 << 30, READ) == (hva_of(mirror, edge), 4 * PAGE)
    assert peek(at(mirror, edge)) == stamp(4)


def test_of_a_long_run_only_the_wanted_gibs_are_mapped(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    start = 2 * GIB + 5 * PAGE
    mirror.map_run(start, 9 * GIB, mirrored_fd, 0, READ, (4 * GIB + 1, 5 * GIB + 1))
    assert [addr for addr, _hva in mirror.windows()] == [4 * GIB, 5 * GIB]
    assert mirror.find(4 * GIB, 1 << 40, READ) == (hva_of(mirror, 4 * GIB), GIB)
    assert mirror.find(4 * GIB - 1, 1, READ) is None


def test_finds_of_every_length_and_place(new_mirror: NewMirror, mirrored_fd: int):
    # Runs of which each length crosses the words of the bitmap at another place.
    mirror = new_mirror()
    runs = [(page, page + n) for page, n in ((0, 1), (3, 60), (64, 64), (129, 1), (131, 125))]
    for low, high in runs:
        mirror.map_run(
            BASE + low * PAGE, BASE + high * PAGE, mirrored_fd, low * PAGE, READ, (BASE, BASE + 1)
        )
    for page in range(N_PAGES):
        stop = next((high for low, high in runs if low <= page < high), 0)
        for n_pages in (1, 2, 63, 64, 65, 200):
            found = mirror.find(BASE + page * PAGE, n_pages * PAGE, READ)
            want = min(stop - page, n_pages) * PAGE
            assert found == ((hva_of(mirror, BASE + page * PAGE), want) if stop else None)


# ---- changing ---------------------------------------------------------------------------------


def test_a_new_run_replaces_what_was_there(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    wanted = (BASE, BASE + 1)
    mirror.map_run(BASE, BASE + 10 * PAGE, mirrored_fd, 0, READ_WRITE, wanted)
    middle = BASE + 4 * PAGE
    mirror.map_run(middle, middle + PAGE, mirrored_fd, 50 * PAGE, READ, wanted)
    assert peek(at(mirror, middle)) == stamp(50)
    assert mirror.find(BASE, 1 << 20, WRITE) == (hva_of(mirror, BASE), 4 * PAGE)
    assert mirror.find(BASE, 1 << 20, READ) == (hva_of(mirror, BASE), 10 * PAGE)
    assert len(window_vmas(mirror)[5 * GIB]) == 5
    mirror.map_run(middle, middle + PAGE, mirrored_fd, 4 * PAGE, READ_WRITE, wanted)
    assert len(window_vmas(mirror)[5 * GIB]) == 3
    assert mirror.n_vmas == 4


def test_forget_hides_and_unmap_takes_away(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    mirror.map_run(BASE, BASE + 4 * PAGE, mirrored_fd, 0, READ_WRITE, (BASE, BASE + 1))
    hva = at(mirror, BASE)
    mirror.forget(BASE + PAGE, BASE + 2 * PAGE)
    assert mirror.find(BASE + PAGE, 1, READ) is None
    assert mirror.find(BASE + PAGE, 1, WRITE) is None
    assert mirror.n_resident_pages == 3
    assert peek(hva + PAGE) == stamp(1)  # a copy in flight ends well
    mirror.unmap(BASE + PAGE, BASE + 2 * PAGE)
    assert peek(hva + PAGE) == signal.SIGSEGV
    assert peek(hva + 2 * PAGE) == stamp(2)
    mirror.unmap(0, MAX_ADDR)
    assert mirror.n_resident_pages == 0
    assert mirror.n_vmas == 2
    assert peek(hva) == signal.SIGSEGV


def test_taking_away_nothing_costs_no_system_call(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    mirror.unmap(0, MAX_ADDR)
    mirror.forget(0, MAX_ADDR)
    mirror.forget(PAGE, PAGE)
    mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    mirror.unmap(BASE + PAGE, MAX_ADDR)
    mirror.unmap(0, BASE)
    assert mirror.n_clears == 0
    assert mirror.n_resident_pages == 1


def test_pages_one_by_one_become_one_vma(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror(budget_vmas=8)
    for page in (3, 1, 0, 2, 5, 4):
        addr = BASE + page * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, page * PAGE, READ_WRITE, (addr, addr + 1))
    assert mirror.n_vmas == 4
    assert mirror.n_evictions == 0
    assert len(window_vmas(mirror)[5 * GIB]) == 3
    assert peek(at(mirror, BASE + 5 * PAGE)) == stamp(5)


def test_the_file_and_the_mirror_are_one_memory(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    mirror.map_run(BASE, BASE + 64 * PAGE, mirrored_fd, 0, READ_WRITE, (BASE, BASE + 64 * PAGE))
    assert poke(at(mirror, BASE + 9 * PAGE, WRITE), b"written") == 0
    assert os.pread(mirrored_fd, 7, 9 * PAGE) == b"written"
    os.pwrite(mirrored_fd, b"changed", 9 * PAGE)
    assert peek(at(mirror, BASE + 9 * PAGE), 7) == b"changed"


def test_behind_the_end_of_a_file_is_a_bus_error(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    start, end = BASE, BASE + 2 * N_PAGES * PAGE
    mirror.map_run(
        start, end, mirrored_fd, 0, READ_WRITE, (start, end)
    )  # populating it does not matter
    assert peek(at(mirror, BASE + N_PAGES * PAGE)) == signal.SIGBUS


# ---- the end ----------------------------------------------------------------------------------


def test_release_gives_everything_back(mirrored_fd: int):
    mirror = Mirror(MAX_ADDR, lambda: None, budget_vmas=100)
    n_before = mirror.n_vmas_of_process
    mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    mirror.map_run(0, PAGE, mirrored_fd, 0, READ, (0, 1))
    hvas = [hva for _addr, hva in mirror.windows()]
    mirror.release()
    mirror.release()
    assert mirror.n_vmas == mirror.n_windows == mirror.n_resident_pages == 0
    assert mirror.n_vmas_of_process == n_before
    assert mirror.find(BASE, 1, READ) is None
    assert mirror.windows() == []
    assert all(peek(hva) == signal.SIGSEGV for hva in hvas)
    with pytest.raises(ValueError, match="released"):
        mirror.map(BASE, BASE + PAGE, mirrored_fd, 0, READ)


def test_a_dropped_mirror_gives_everything_back(mirrored_fd: int):
    mirror = Mirror(MAX_ADDR, lambda: None, budget_vmas=100)
    n_before = mirror.n_vmas_of_process
    mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 0, READ, (BASE, BASE + 1))
    other = Mirror(MAX_ADDR, lambda: None)
    del mirror
    assert other.n_vmas_of_process == n_before


def test_a_forked_process_goes_on(new_mirror: NewMirror, mirrored_fd: int):
    mirror = new_mirror()
    mirror.map_run(BASE, BASE + 2 * PAGE, mirrored_fd, 0, READ_WRITE, (BASE, BASE + 1))
    pid = os.fork()
    if not pid:
        status = 1
        try:
            assert peek(at(mirror, BASE + PAGE)) == stamp(1)
            assert poke(at(mirror, BASE, WRITE), b"by a child") == 0
            mirror.map_run(BASE, BASE + PAGE, mirrored_fd, 9 * PAGE, READ, (BASE, BASE + 1))
            assert peek(at(mirror, BASE)) == stamp(9)
            mirror.unmap(BASE, BASE + 2 * PAGE)
            check_windows(mirror)
            mirror.release()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert peek(at(mirror, BASE), 10) == b"by a child"
    assert peek(at(mirror, BASE + PAGE)) == stamp(1)


def test_what_is_mapped_beside_a_window_stays_outside(new_mirror: NewMirror, mirrored_fd: int):
    # Nobody's mapping lands in a window, whatever happens there.
    mirror = new_mirror(budget_vmas=12)
    others = []
    for i in range(60):
        addr = BASE + i % 20 * 64 * PAGE
        mirror.map_run(addr, addr + PAGE, mirrored_fd, i * PAGE, READ_WRITE, (addr, addr + 1))
        others.append(mmap.mmap(-1, 1 << 20))
        if i % 3 == 0:
            mirror.unmap(addr, addr + PAGE)
    hva = dict(mirror.windows())[5 * GIB]
    for other in others:
        place = address_of(ffi.from_buffer(other))
        assert not hva <= place < hva + GIB
        other.close()
